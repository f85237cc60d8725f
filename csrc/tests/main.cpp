// Runs the C++ tests whose names contain the first argument (all without one).
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"

using moejet::testing::all_tests;
using moejet::testing::CheckFailure;

TEST(failed_checks_throw) {
  CHECK_THROWS(CheckFailure, "1 == 2", CHECK(1 == 2));
  CHECK_THROWS(CheckFailure, "here 1 and 2", CHECK_OP(1, ==, 2));
  CHECK_THROWS(CheckFailure, "nothing was thrown", CHECK_THROWS(std::exception, "", 0));
}

int main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  int run = 0, failed = 0;
  for (const moejet::testing::Test& test : all_tests()) {
    if (std::strstr(test.name, filter) == nullptr) continue;
    ++run;
    const auto start = std::chrono::steady_clock::now();
    std::string message;
    try {
      test.run();
    } catch (const std::exception& error) {
      message = error.what();
      ++failed;
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%s %s (%.1f s)%s%s\n", message.empty() ? "ok    " : "FAILED", test.name, seconds,
                message.empty() ? "" : "\n       ", message.c_str());
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed\n", run, failed);
  return run > 0 && failed == 0 ? 0 : 1;
}
