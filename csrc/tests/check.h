// A small test harness: TEST(name) { CHECK(...); } in any file beside main.cpp.
//
// A failed check ends its test by an exception, so it belongs on the thread that runs the test;
// bodies of thread pools may use it too, since a pool hands exceptions to its caller.
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace moejet::testing {

class CheckFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

struct Registration {
  Registration(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw CheckFailure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <class A, class B>
std::string shown(const char* text, const A& a, const B& b) {
  std::ostringstream out;
  out << text << ", here " << a << " and " << b;
  return out.str();
}

// Runs call and checks that it throws an E whose message contains `part`.
template <class E>
void check_throws(const char* file, int line, const std::string& part,
                  const std::function<void()>& call) {
  try {
    call();
  } catch (const E& error) {
    if (std::string(error.what()).find(part) != std::string::npos) return;
    fail(file, line, "message '" + std::string(error.what()) + "' lacks '" + part + "'");
  }
  fail(file, line, "nothing was thrown, expected '" + part + "'");
}

}  // namespace moejet::testing

#define TEST(name)                                                             \
  static void name();                                                          \
  static const ::moejet::testing::Registration name##_registered(#name, name); \
  static void name()

#define CHECK(condition) \
  ((condition) ? void() : ::moejet::testing::fail(__FILE__, __LINE__, #condition))

#define CHECK_OP(a, op, b)                                  \
  (((a)op(b)) ? void()                                      \
              : ::moejet::testing::fail(__FILE__, __LINE__, \
                                        ::moejet::testing::shown(#a " " #op " " #b, a, b)))

// CHECK_THROWS(type, "part of the message", expression)
#define CHECK_THROWS(type, part, ...) \
  ::moejet::testing::check_throws<type>(__FILE__, __LINE__, part, [&] { (void)(__VA_ARGS__); })
