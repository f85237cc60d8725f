// A pool of pinned threads for short parallel regions.
//
// The caller works as worker 0, the pool owns the other num_threads - 1 threads: a caller that
// waits would need a wake-up per region and would compete with a worker for its CPU. A region has
// phases; between two of them all workers meet, and one prepares the next phase (task.h). Workers
// spin for a short time after a region, then sleep.
//
// One caller at a time: further callers wait. A pool does not survive fork: in the child acquire()
// throws, because its threads do not exist there.
//
// A caller may give a region a time limit. When it is over, the caller leaves and the workers that
// are waiting go home; nobody may use the pool until those have come back that are not: they still
// work on the task, its memory and the workspace. The calling thread itself has no limit.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "nodes.h"
#include "task.h"
#include "workspace.h"

namespace moejet {

class ThreadPool {
 public:
  // One worker per entry of cpus (distinct logical CPU numbers). With pin, worker i runs on
  // cpus[i]; worker 0, the caller, is only moved away from CPUs that belong to other workers.
  // worker_nodes[i] is the index in memory_nodes of worker i's node (empty: 0); a node's number in
  // the system, or kAnyNode, is what weights are placed by. With numbered nodes and pin, the caller
  // is also moved to its node. Throws std::invalid_argument if a CPU may not be used by this
  // process.
  ThreadPool(std::vector<int> cpus, bool pin, std::vector<int> worker_nodes = {},
             std::vector<int> memory_nodes = {kAnyNode});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }
  const std::vector<int>& worker_nodes() const { return worker_nodes_; }
  const std::vector<int>& memory_nodes() const { return memory_nodes_; }

  // The node of the worker that this thread is, as an index in its pool's memory_nodes; 0 outside
  // of regions.
  static int current_node();

  static constexpr double kNoLimit = std::numeric_limits<double>::infinity();

  // Waits for the region in progress, ends the threads, frees the workspace. Idempotent. Does
  // nothing in a forked child. Throws std::runtime_error if workers of an abandoned region are not
  // back after 2 s; the pool is closed then too, but their threads and the workspace stay for good.
  void close();

  // Workers that are not back from an abandoned region, as "worker 1, 3"; empty: none. Does not
  // wait for the pool.
  std::string missing_workers() const;

  // The right to use the pool, held from acquire() until destruction.
  class Lease {
   public:
    // Runs the task's phases on all workers. If one throws, the later phases are skipped and the
    // first exception is thrown here. After timeout_s (more or less) throws std::runtime_error if
    // workers are missing, which may use the task until missing_workers() does not name them.
    void run(Task* task, double timeout_s = kNoLimit) { pool_->run_region(task, timeout_s); }

    // The same for body(phase, worker), phase 0 .. num_phases - 1.
    template <class Body>
    void run(int num_phases, const Body& body, double timeout_s = kNoLimit) {
      class Phases final : public Task {
       public:
        Phases(int num_phases, const Body& body) : num_phases_(num_phases), body_(body) {}
        bool next() override { return ++phase_ < num_phases_; }
        void work(int worker) override { body_(phase_, worker); }

       private:
        const int num_phases_;
        const Body& body_;
        int phase_ = -1;
      } phases(num_phases, body);
      run(&phases, timeout_s);
    }
    Workspace& workspace();
    int num_threads() const { return pool_->num_threads_; }

   private:
    friend class ThreadPool;
    explicit Lease(ThreadPool* pool) : pool_(pool), lock_(pool->caller_mutex_) {}
    ThreadPool* pool_;
    std::unique_lock<std::mutex> lock_;
  };

  // While one exists, workers without work keep looking for some instead of falling asleep, which
  // saves a wake-up where regions follow one another at short intervals. Not longer than the pool.
  class KeepAwake {
   public:
    explicit KeepAwake(ThreadPool* pool) : pool_(pool) { pool_->keep_awake(1); }
    ~KeepAwake() { pool_->keep_awake(-1); }
    KeepAwake(const KeepAwake&) = delete;
    KeepAwake& operator=(const KeepAwake&) = delete;

   private:
    ThreadPool* const pool_;
  };

  // Waits until no other caller uses the pool. Throws std::runtime_error if it is closed, if
  // workers are missing, or if this process was forked after the pool was made.
  Lease acquire();

 private:
  struct State;

  void run_region(Task* task, double timeout_s);
  void keep_awake(int count);
  void check_process() const;
  static void work(State* state, int worker, int node);
  static void run_task(State* state, int worker);
  void stop_threads();

  const int num_threads_;
  const std::vector<int> cpus_;
  const bool pin_;
  const std::vector<int> worker_nodes_, memory_nodes_;
  const pid_t pid_;
  std::mutex caller_mutex_;
  bool closed_ = false;          // under caller_mutex_
  bool is_left_behind_ = false;  // state_ is not to be freed: threads that did not end use it
  std::unique_ptr<State> state_;
};

}  // namespace moejet
