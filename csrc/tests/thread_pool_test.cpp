#include "../thread_pool.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

namespace moejet {
namespace {

const std::vector<int> kThree = {0, 1, 2};  // unpinned: also on a machine with fewer CPUs

// Plain memory on purpose: only the pool's barriers order it, which ThreadSanitizer checks.
class Relay final : public Task {
 public:
  Relay(int num_workers, int num_phases) : num_phases_(num_phases), values_(num_workers) {}
  bool next() override {
    ++phase_;
    int64_t sum = 0;
    for (const int64_t value : values_) sum += value;
    expected_ = sum;
    return phase_ <= num_phases_;
  }
  void work(int worker) override {
    // Each phase adds its number to the worker's value; all saw the sum that next() took.
    if (expected_ != static_cast<int64_t>(values_.size()) * phase_ * (phase_ - 1) / 2) {
      throw std::runtime_error("a worker ran ahead");
    }
    values_[static_cast<size_t>(worker)] += phase_;
  }
  int64_t sum() const { return expected_; }

 private:
  const int num_phases_;
  int phase_ = 0;
  int64_t expected_ = 0;
  std::vector<int64_t> values_;
};

class ThrowingNext final : public Task {
 public:
  bool next() override {
    if (++phase_ == 2) throw std::runtime_error("next failed");
    return true;
  }
  void work(int) override { CHECK(phase_ == 1); }

 private:
  int phase_ = 0;
};

std::string closed_or_ok(ThreadPool* pool) {
  try {
    pool->acquire().run(1, [](int, int) {});
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace

TEST(phases_are_ordered_and_complete) {
  for (const int workers : {1, 2, 3, 5}) {
    std::vector<int> cpus;
    for (int i = 0; i < workers; ++i) cpus.push_back(i);
    ThreadPool pool(cpus, false);
    for (int phases = 0; phases < 40; ++phases) {
      Relay relay(workers, phases);
      pool.acquire().run(&relay);
      CHECK_OP(relay.sum(), ==, int64_t{workers} * phases * (phases + 1) / 2);
    }
  }
}

TEST(many_short_regions) {
  ThreadPool pool(kThree, false);
  std::vector<int> counts(3);
  for (int i = 0; i < 3000; ++i) {
    pool.acquire().run(2, [&](int, int worker) { ++counts[static_cast<size_t>(worker)]; });
  }
  for (const int count : counts) CHECK_OP(count, ==, 6000);
}

TEST(sleeping_workers_wake_up) {
  ThreadPool pool(kThree, false);
  for (int i = 0; i < 20; ++i) {
    std::vector<int> seen(3);
    pool.acquire().run(1, [&](int, int worker) { seen[static_cast<size_t>(worker)] = 1; });
    CHECK(seen == std::vector<int>({1, 1, 1}));
    // Around and beyond the time that idle workers spin.
    std::this_thread::sleep_for(std::chrono::microseconds(20 * i));
  }
}

TEST(workers_that_are_kept_awake_work_sleep_and_end) {
  ThreadPool pool(kThree, false);
  for (int i = 0; i < 10; ++i) {
    {
      const ThreadPool::KeepAwake first(&pool), second(&pool);
      std::this_thread::sleep_for(std::chrono::microseconds(200 * i));
      Relay relay(3, 2);
      pool.acquire().run(&relay);
      CHECK_OP(relay.sum(), ==, 9);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200 * i));
    Relay relay(3, 1);
    pool.acquire().run(&relay);
    CHECK_OP(relay.sum(), ==, 3);
  }
  const ThreadPool::KeepAwake open_end(&pool);
  pool.close();
}

TEST(exceptions_reach_the_caller_and_skip_later_phases) {
  ThreadPool pool(kThree, false);
  for (int worker = 0; worker < 3; ++worker) {
    std::vector<int> phases(3);
    CHECK_THROWS(std::runtime_error, "as asked", pool.acquire().run(3, [&](int phase, int w) {
      ++phases[static_cast<size_t>(w)];
      if (phase == 1 && w == worker) throw std::runtime_error("as asked");
    }));
    CHECK(phases == std::vector<int>({2, 2, 2}));
    CHECK_THROWS(std::runtime_error, "all",
                 pool.acquire().run(1, [&](int, int) { throw std::runtime_error("all"); }));
    Relay relay(3, 4);
    pool.acquire().run(&relay);
    CHECK_OP(relay.sum(), ==, 30);
  }
  ThrowingNext throwing;
  CHECK_THROWS(std::runtime_error, "next failed", pool.acquire().run(&throwing));
}

// Workers do their parts of it late, each by so many milliseconds.
class Late final : public Task {
 public:
  explicit Late(std::vector<int> delays) : delays_(std::move(delays)), done_(delays_.size()) {}
  bool next() override { return ++phase_ <= 2; }
  void work(int worker) override {
    std::this_thread::sleep_for(std::chrono::milliseconds(delays_[static_cast<size_t>(worker)]));
    ++done_[static_cast<size_t>(worker)];
  }
  int64_t done(int worker) const { return done_[static_cast<size_t>(worker)]; }

 private:
  const std::vector<int> delays_;
  std::vector<int64_t> done_;
  int phase_ = 0;
};

TEST(a_late_worker_is_waited_for_so_long_and_no_longer) {
  ThreadPool pool(kThree, false);
  for (int round = 0; round < 3; ++round) {
    Late in_time({0, 10, 20}), late({0, 0, 300});
    pool.acquire().run(&in_time, 20.0);
    CHECK_OP(in_time.done(2), ==, 2);
    CHECK_THROWS(std::runtime_error, "worker 2 did not finish within 0.05 s",
                 pool.acquire().run(&late, 0.05));
    CHECK(pool.missing_workers() == "worker 2");
    CHECK_THROWS(std::runtime_error, "worker 2 is not back", pool.acquire());
    while (!pool.missing_workers().empty()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    CHECK_OP(late.done(1), ==, 1);  // the second phase does not take place
    CHECK_OP(late.done(2), ==, 1);
    Relay relay(3, 4);
    pool.acquire().run(&relay, 20.0);
    CHECK_OP(relay.sum(), ==, 30);
  }
}

TEST(workers_that_are_all_late) {
  ThreadPool pool(kThree, false);
  Late late({0, 150, 100});
  CHECK_THROWS(std::runtime_error, "worker 1, 2 did not finish", pool.acquire().run(&late, 0.03));
  pool.close();  // waits for them
}

TEST(callers_take_turns_and_pools_are_independent) {
  ThreadPool first(kThree, false), second({0, 1}, false);
  int64_t in_first = 0, in_second = 0;  // plain: a lease is a lock
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(6);
  for (size_t c = 0; c < sums.size(); ++c) {
    callers.emplace_back([&, c] {
      for (int i = 0; i < 50; ++i) {
        const bool is_first = (c + static_cast<size_t>(i)) % 2 == 0;
        ThreadPool::Lease lease = (is_first ? first : second).acquire();
        ++(is_first ? in_first : in_second);
        Relay relay(lease.num_threads(), 3);
        lease.run(&relay);
        sums[c] += relay.sum() / lease.num_threads();
        // The workspace belongs to the lease.
        std::memset(lease.workspace().reserve(4096), static_cast<int>(c), 4096);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int64_t sum : sums) CHECK_OP(sum, ==, 50 * 6);
  CHECK_OP(in_first, ==, 150);
  CHECK_OP(in_second, ==, 150);
}

TEST(close_is_idempotent_and_final_also_under_load) {
  for (int round = 0; round < 20; ++round) {
    ThreadPool pool(kThree, false);
    std::vector<std::string> errors(3);
    std::vector<std::thread> callers;
    for (std::string& error : errors) {
      callers.emplace_back([&pool, &error] {
        while ((error = closed_or_ok(&pool)).empty()) {
        }
      });
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
    pool.close();
    pool.close();
    for (std::thread& caller : callers) caller.join();
    for (const std::string& error : errors) CHECK(error.find("closed") != std::string::npos);
  }
}

TEST(pools_come_and_go) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(kThree, false);
    if (i % 3 == 0) continue;  // never used
    Relay relay(3, 1);
    pool.acquire().run(&relay);
    CHECK_OP(relay.sum(), ==, 3);
  }
}

TEST(pinned_workers_stay_and_the_caller_keeps_its_affinity) {
  cpu_set_t before, after;
  CHECK(sched_getaffinity(0, sizeof(before), &before) == 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE && cpus.size() < 2; ++cpu) {
    if (CPU_ISSET(cpu, &before)) cpus.push_back(cpu);
  }
  ThreadPool pool(cpus, true);
  for (int i = 0; i < 50; ++i) {
    std::vector<int> seen(cpus.size());
    pool.acquire().run(
        1, [&](int, int worker) { seen[static_cast<size_t>(worker)] = sched_getcpu(); });
    for (size_t worker = 1; worker < cpus.size(); ++worker) {
      CHECK_OP(seen[worker], ==, cpus[worker]);
      CHECK_OP(seen[0], !=, cpus[worker]);
    }
  }
  CHECK(sched_getaffinity(0, sizeof(after), &after) == 0);
  CHECK(CPU_EQUAL(&before, &after));
}

TEST(wrong_cpus_are_refused) {
  CHECK_THROWS(std::invalid_argument, "empty", ThreadPool({}, false));
  CHECK_THROWS(std::invalid_argument, "twice", ThreadPool({1, 1}, false));
  CHECK_THROWS(std::invalid_argument, "no CPU number", ThreadPool({-1}, false));
  CHECK_THROWS(std::invalid_argument, "may not run on CPU 1023", ThreadPool({0, 1023}, true));
}

TEST(a_forked_child_is_refused) {
  auto pool = std::make_unique<ThreadPool>(kThree, false);
  pool->acquire().run(1, [](int, int) {});
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    int code = closed_or_ok(pool.get()).find("fork") != std::string::npos ? 0 : 1;
    pool->close();
#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer allows no threads in a forked child
    ThreadPool own(kThree, false);
    Relay relay(3, 2);
    own.acquire().run(&relay);
    code |= relay.sum() == 9 ? 0 : 4;
#endif
    pool.reset();
    _exit(code);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK_OP(WEXITSTATUS(status), ==, 0);
  Relay relay(3, 2);
  pool->acquire().run(&relay);
  CHECK_OP(relay.sum(), ==, 9);
}

}  // namespace moejet
