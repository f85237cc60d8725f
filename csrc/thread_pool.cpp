#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu_relax.h"
#include "packed_memory.h"

#if defined(__x86_64__) && defined(__GLIBCXX__) && _GLIBCXX_RELEASE >= 12
// GCC 12 gave wait() a new symbol version for being noexcept. With the one before, the extension
// loads wherever there are glibc 2.34 and the libstdc++ of GCC 11.
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif

namespace moejet {
namespace {

// Idle workers spin this long before they sleep: longer than the pause between two layers' regions
// would need in decode, short enough not to steal the CPU from what the caller does in between.
constexpr auto kIdleSpin = std::chrono::microseconds(100);
// Waits inside a region yield after this many pauses: another process may hold a worker's CPU.
constexpr int kSpinsBeforeYield = 4096;
// Longer limits than a year are none.
constexpr double kMostSeconds = 3e7;
constexpr char kStuck[] =
    "the CPU may be overloaded, or its memory swapped or read from a disk that does not answer";
// How long close() waits for workers of an abandoned region.
constexpr auto kCloseWait = std::chrono::seconds(2);

using Clock = std::chrono::steady_clock;

cpu_set_t single_cpu(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return set;
}

thread_local int worker_node = 0;

// The calling thread counts as a worker of this node until destruction.
class CallerNode {
 public:
  explicit CallerNode(int node) : saved_(std::exchange(worker_node, node)) {}
  ~CallerNode() { worker_node = saved_; }
  CallerNode(const CallerNode&) = delete;
  CallerNode& operator=(const CallerNode&) = delete;

 private:
  const int saved_;
};

bool runs_on_node(int node) {
  unsigned here = 0;
  return syscall(SYS_getcpu, nullptr, &here, nullptr) != 0 || static_cast<int>(here) == node;
}

// Keeps the calling thread off the other workers' CPUs and on its node (if it has a number) while
// it works, then restores its affinity.
class CallerPlacement {
 public:
  CallerPlacement(const std::vector<int>& cpus, bool pin, int node) {
    if (!pin || cpus.size() < 2) return;
    const int here = sched_getcpu();
    if (here < 0 || here == cpus[0]) return;
    if (std::find(cpus.begin() + 1, cpus.end(), here) == cpus.end() &&
        (node == kAnyNode || runs_on_node(node))) {
      return;
    }
    if (sched_getaffinity(0, sizeof(saved_), &saved_) != 0) return;
    const cpu_set_t target = single_cpu(cpus[0]);
    moved_ = sched_setaffinity(0, sizeof(target), &target) == 0;
  }
  ~CallerPlacement() {
    if (moved_) sched_setaffinity(0, sizeof(saved_), &saved_);
  }
  CallerPlacement(const CallerPlacement&) = delete;
  CallerPlacement& operator=(const CallerPlacement&) = delete;

 private:
  cpu_set_t saved_;
  bool moved_ = false;
};

void validate(const std::vector<int>& cpus) {
  if (cpus.empty()) throw std::invalid_argument("cpus is empty: name at least one CPU");
  std::set<int> seen;
  for (const int cpu : cpus) {
    if (cpu < 0 || cpu >= CPU_SETSIZE) {
      throw std::invalid_argument("cpus: " + std::to_string(cpu) + " is no CPU number");
    }
    if (!seen.insert(cpu).second) {
      throw std::invalid_argument("cpus: " + std::to_string(cpu) +
                                  " occurs twice: give every worker a CPU of its own");
    }
  }
}

// One entry per worker. check_nodes has counted the nodes.
std::vector<int> checked_worker_nodes(std::vector<int> worker_nodes, size_t num_workers,
                                      int num_nodes) {
  if (worker_nodes.empty()) worker_nodes.assign(num_workers, 0);
  if (worker_nodes.size() != num_workers) {
    throw std::invalid_argument("worker_nodes has " + std::to_string(worker_nodes.size()) +
                                " entries for " + std::to_string(num_workers) + " cpus");
  }
  for (const int node : worker_nodes) {
    if (node < 0 || node >= num_nodes) {
      throw std::invalid_argument("worker_nodes: " + std::to_string(node) + " is no index of the " +
                                  std::to_string(num_nodes) + " memory_nodes");
    }
  }
  return worker_nodes;
}

}  // namespace

struct ThreadPool::State {
  explicit State(int n) : num_workers(n), left(static_cast<size_t>(n)) {}

  // The last region that a worker has left.
  struct alignas(64) Left {
    std::atomic<uint32_t> epoch{0};
  };

  const int num_workers;
  std::vector<std::thread> threads;
  std::vector<Left> left;  // worker 0 keeps none
  Workspace workspace;     // the caller's
  Clock::time_point deadline{};

  // The region: written by the caller before epoch is raised, read by workers after they see it.
  Task* task = nullptr;
  std::atomic<bool> stop{false};  // a late worker reads it at any time
  bool has_phase = false;         // written by worker 0 while all others wait
  std::exception_ptr error;       // under error_mutex
  std::mutex error_mutex;
  std::atomic<bool> failed{false};

  alignas(64) std::atomic<uint32_t> epoch{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint32_t> phase_epoch{0};
  alignas(64) std::atomic<int> sleepers{0};
  alignas(64) std::atomic<int> watchers{0};  // KeepAwake objects
  alignas(64) std::atomic<bool> abandoned{false};
  std::mutex sleep_mutex;
  std::condition_variable wake;

  void record_error() {
    std::lock_guard<std::mutex> lock(error_mutex);
    if (!error) error = std::current_exception();
    failed.store(true, std::memory_order_release);
  }

  // False: it is past the deadline, which has begun to be looked at.
  template <class Ready>
  static bool spin_until(Ready&& ready, Clock::time_point deadline = Clock::time_point::max()) {
    for (int spins = 0; !ready(); ++spins) {
      if (spins < kSpinsBeforeYield) {
        cpu_relax();
        continue;
      }
      sched_yield();
      if (deadline != Clock::time_point::max() && Clock::now() >= deadline) return ready();
    }
    return true;
  }

  // Worker 0: waits for the others, prepares the next phase, lets all go. If some do not come in
  // time, those that wait are sent home, and the others leave when they are done.
  bool lead_into_phase() {
    const auto all = [&] { return arrived.load(std::memory_order_acquire) == num_workers - 1; };
    if (!spin_until(all, deadline)) {
      abandoned.store(true, std::memory_order_release);
      return false;
    }
    arrived.store(0, std::memory_order_relaxed);
    has_phase = false;
    if (!failed.load(std::memory_order_acquire)) {
      try {
        has_phase = task->next();
      } catch (...) {
        record_error();
      }
    }
    const bool result = has_phase;  // at its end the next region may begin at once
    phase_epoch.store(phase_epoch.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    return result;
  }

  bool follow_into_phase() {
    const uint32_t now = phase_epoch.load(std::memory_order_relaxed);
    arrived.fetch_add(1, std::memory_order_acq_rel);
    spin_until([&] {
      return phase_epoch.load(std::memory_order_acquire) != now ||
             abandoned.load(std::memory_order_acquire);
    });
    return !abandoned.load(std::memory_order_acquire) && has_phase;
  }

  // Of an abandoned region.
  std::vector<int> missing() const {
    std::vector<int> workers;
    if (!abandoned.load(std::memory_order_acquire)) return workers;
    const uint32_t last = epoch.load();
    for (int worker = 1; worker < num_workers; ++worker) {
      const Left& one = left[static_cast<size_t>(worker)];
      if (one.epoch.load(std::memory_order_acquire) != last) workers.push_back(worker);
    }
    return workers;
  }
  bool wait_for_missing(std::chrono::milliseconds most) const {
    const Clock::time_point deadline = Clock::now() + most;
    while (!missing().empty()) {
      if (Clock::now() >= deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }

  void start_region() {
    // Sequentially consistent on both sides (here and in wait_for_region): either the sleeper sees
    // the new epoch before it sleeps, or we see the sleeper and wake it.
    epoch.fetch_add(1);
    if (sleepers.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(sleep_mutex);
      }
      wake.notify_all();
    }
  }

  void wait_for_region(uint32_t last) {
    const auto deadline = std::chrono::steady_clock::now() + kIdleSpin;
    for (;;) {
      for (int i = 0; i < 64; ++i) {
        if (epoch.load(std::memory_order_acquire) != last) return;
        cpu_relax();
      }
      if (std::chrono::steady_clock::now() < deadline) continue;
      if (watchers.load(std::memory_order_relaxed) == 0) break;
      sched_yield();
    }
    std::unique_lock<std::mutex> lock(sleep_mutex);
    sleepers.fetch_add(1);
    wake.wait(lock, [&] { return epoch.load() != last; });
    sleepers.fetch_sub(1);
  }
};

ThreadPool::ThreadPool(std::vector<int> cpus, bool pin, std::vector<int> worker_nodes,
                       std::vector<int> memory_nodes)
    : num_threads_((validate(cpus), static_cast<int>(cpus.size()))),
      cpus_(std::move(cpus)),
      pin_(pin),
      worker_nodes_(
          checked_worker_nodes(std::move(worker_nodes), cpus_.size(), check_nodes(memory_nodes))),
      memory_nodes_(std::move(memory_nodes)),
      pid_(getpid()),
      state_(std::make_unique<State>(num_threads_)) {
  try {
    if (pin_) {
      cpu_set_t allowed;
      if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
        for (const int cpu : cpus_) {
          if (!CPU_ISSET(cpu, &allowed)) {
            throw std::invalid_argument("cpus: this process may not run on CPU " +
                                        std::to_string(cpu) + ": leave it out, or use pin=False");
          }
        }
      }
    }
    for (int worker = 1; worker < num_threads_; ++worker) {
      state_->threads.emplace_back(&ThreadPool::work, state_.get(), worker,
                                   worker_nodes_[static_cast<size_t>(worker)]);
      if (!pin_) continue;
      const cpu_set_t set = single_cpu(cpus_[worker]);
      const int rc =
          pthread_setaffinity_np(state_->threads.back().native_handle(), sizeof(set), &set);
      if (rc != 0) {
        throw std::invalid_argument("cpus: cannot pin a thread to CPU " +
                                    std::to_string(cpus_[worker]) + " (" + std::strerror(rc) +
                                    "): leave it out, or use pin=False");
      }
    }
  } catch (...) {
    stop_threads();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != pid_) {
    // In a forked child the threads do not exist: joining would hang, destroying them would abort.
    (void)state_.release();
    return;
  }
  try {
    close();
  } catch (const std::exception&) {  // workers are stuck, and nobody is left to be told
  }
  if (is_left_behind_) (void)state_.release();
}

void ThreadPool::stop_threads() {
  state_->stop = true;
  state_->start_region();
  for (std::thread& thread : state_->threads) thread.join();
  state_->threads.clear();
}

void ThreadPool::close() {
  if (getpid() != pid_) return;
  std::lock_guard<std::mutex> lock(caller_mutex_);
  if (closed_) return;
  closed_ = true;
  if (!state_->wait_for_missing(kCloseWait)) {
    const std::string missing = missing_workers();
    is_left_behind_ = true;
    state_->stop = true;  // the others end now, and those if they ever come back
    state_->start_region();
    throw std::runtime_error(missing + " of this ThreadPool cannot be ended: " + kStuck);
  }
  stop_threads();
  state_->workspace.release();
}

std::string ThreadPool::missing_workers() const {
  std::string text;
  for (const int worker : state_->missing()) {
    text += (text.empty() ? "worker " : ", ") + std::to_string(worker);
  }
  return text;
}

Workspace& ThreadPool::Lease::workspace() { return pool_->state_->workspace; }

void ThreadPool::check_process() const {
  if (getpid() != pid_) {
    throw std::runtime_error(
        "this ThreadPool belongs to the parent process, and its threads do not exist in a forked "
        "child: load the model after the fork, or start the process with 'spawn'");
  }
}

ThreadPool::Lease ThreadPool::acquire() {
  check_process();
  Lease lease(this);
  if (closed_) throw std::runtime_error("this ThreadPool is closed: make a new one");
  if (state_->abandoned.load(std::memory_order_acquire)) {
    const std::string missing = missing_workers();
    if (!missing.empty()) throw std::runtime_error(missing + " is not back from work: " + kStuck);
    state_->arrived.store(0, std::memory_order_relaxed);
    state_->abandoned.store(false, std::memory_order_release);
  }
  return lease;
}

void ThreadPool::run_task(State* state, int worker) {
  while (worker == 0 ? state->lead_into_phase() : state->follow_into_phase()) {
    try {
      state->task->work(worker);
    } catch (...) {
      state->record_error();
    }
  }
}

int ThreadPool::current_node() { return worker_node; }

void ThreadPool::work(State* state, int worker, int node) {
  worker_node = node;
  for (uint32_t seen = 0;;) {
    state->wait_for_region(seen);
    ++seen;  // a region's first phase waits for all workers, so none is missed
    if (state->stop) return;
    run_task(state, worker);
    state->left[static_cast<size_t>(worker)].epoch.store(seen, std::memory_order_release);
  }
}

void ThreadPool::keep_awake(int count) { state_->watchers.fetch_add(count); }

void ThreadPool::run_region(Task* task, double timeout_s) {
  State* state = state_.get();
  const CallerNode caller_node(worker_nodes_[0]);
  const CallerPlacement placement(cpus_, pin_,
                                  memory_nodes_[static_cast<size_t>(worker_nodes_[0])]);
  state->task = task;
  state->deadline = Clock::time_point::max();
  if (timeout_s < kMostSeconds) {
    const std::chrono::duration<double> limit(timeout_s);
    state->deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(limit);
  }
  state->error = nullptr;
  state->failed.store(false, std::memory_order_relaxed);
  state->start_region();
  run_task(state, 0);
  if (state->abandoned.load(std::memory_order_relaxed)) {
    // Those that were only waiting for the others leave at once.
    state->wait_for_missing(std::chrono::milliseconds(10));
    const std::string missing = missing_workers();
    char limit[32];
    std::snprintf(limit, sizeof(limit), "%.3g", timeout_s);
    throw std::runtime_error((missing.empty() ? "workers" : missing) + " did not finish within " +
                             limit + " s: " + kStuck);
  }
  if (state->error) std::rethrow_exception(std::exchange(state->error, nullptr));
}

}  // namespace moejet
