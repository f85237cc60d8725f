// The bridge between a GPU and the CPU's routed experts: layers of a step whose other operations
// run on a stream, possibly inside a captured CUDA graph, are computed by the thread pool.
//
// Everything passes through host memory that the GPU can reach. Each layer has two flags, which
// only ever hold 0 or 1, so that a graph with constant values can be replayed:
//
//   stream: write x, topk_ids, topk_weights to the host     CPU: wait until submitted == 1
//           submitted = 1                                        submitted = 0
//           (shared and resident experts)                        out = experts(x)
//           wait until finished == 1                             finished = 1
//           finished = 0
//           copy out to the GPU
//
// Replays cannot overtake each other. Between replays both flags of a layer are 0 (at first: the
// owner's zeroes). The stream passes its wait only after the CPU's finished = 1, which follows, in
// this order, submitted = 0 and the stream's submitted = 1 of the same replay. So when the next
// replay sets submitted, the last value has been taken and cleared: none is lost or seen twice. And
// the stream clears finished before anything of the next replay; a stream's write has a fence
// before it, so the CPU that sees the next submitted == 1 writes finished after that 0 has arrived:
// it is not overwritten, and no wait passes on the answer to an earlier replay. This needs every
// layer's operations in one order, that is, on one stream or on streams joined by events.
//
// One set of x, ids, weights and out serves all layers and all replays: the stream overwrites x
// only after some finished == 1, by when the CPU has read the last one; the CPU writes out only
// after some submitted == 1, by when the stream has copied the last one. (Layers in flight at the
// same time would need a set each.)
//
// When a step fails, nobody may take it for a good one: out is filled with NaN and the rest of the
// step is answered without computing, or, if the stream submits no more, let through at once. There
// is one exception. Until the step's first layer is submitted, the stream may still be copying the
// out of the step before, which must not be spoiled, and a wait let through would pass on those old
// numbers. So its layers stay unfinished: should the stream submit them later, it waits until
// reset() answers them, with NaN. Only a stream that has failed is let through even then. The
// exception is thrown in any case, and further steps are refused until reset().
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "expert_weights.h"
#include "kernels.h"
#include "moe.h"
#include "thread_pool.h"

namespace moejet {

// Flags are 64 bytes apart: the GPU's write to one and the CPU's polling of another do not meet.
constexpr int kFlagStride = 16;
// For each layer submitted and finished, then one for trying out the driver.
constexpr int64_t num_flags(int64_t num_layers) { return 2 * num_layers + 1; }

// Host memory of the caller, pinned if a GPU is to reach it. Rows are adjacent.
struct BridgeBuffers {
  int64_t max_tokens, hidden_size, top_k;
  const void* x;  // [max_tokens, hidden_size], fp32 or bf16
  DType x_dtype;
  const int32_t* topk_ids;    // [max_tokens, top_k], -1: not for the CPU
  const float* topk_weights;  // [max_tokens, top_k]
  void* out;                  // [max_tokens, hidden_size], fp32 or bf16
  DType out_dtype;
  uint32_t* flags;  // [num_flags(layers), kFlagStride], on a 64-byte boundary, zeroed by the bridge
};

enum class StreamState { kBusy, kIdle };
// The state of the stream that submits; throws if the stream has failed. May be empty: not known.
using StreamQuery = std::function<StreamState()>;

struct BridgeCounters {
  int64_t steps = 0;            // completed: one each time that the last layer is served
  double wait_s = 0;            // run_step waiting for the stream
  std::vector<double> layer_s;  // run_step computing, by layer
  int64_t layers = 0;           // computed
  int64_t distinct_experts = 0;
  int64_t weight_bytes = 0;  // of those experts: what had to be read at least
};

class ExpertBridge {
 public:
  // layers: of equal hidden size; not owned, nor is the pool. worker_timeout_s: how long workers
  // may take for a layer, beside 2 ns for each multiplication of all its tokens. Throws
  // std::invalid_argument.
  ExpertBridge(ThreadPool* pool, const std::vector<const ExpertWeights*>& layers,
               const KernelTable& table, const BridgeBuffers& buffers,
               double worker_timeout_s = ThreadPool::kNoLimit);
  // To be destroyed only while the pool has no missing_workers().
  ExpertBridge(const ExpertBridge&) = delete;
  ExpertBridge& operator=(const ExpertBridge&) = delete;

  int num_layers() const { return static_cast<int>(layers_.size()); }
  // Throws std::invalid_argument if there is no such layer.
  void check_layer(int layer) const;

  // Serves these layers, in the order in which the stream submits them, for num_tokens rows; the
  // calling thread is worker 0 of the pool. To be called once the step has been launched. A wait
  // for one layer's submission longer than timeout_s, a stream that fails or that runs out of work
  // without submitting, ids out of range and workers that fail or take too long throw
  // std::runtime_error that names the layer. The pool is held while a layer is computed, not while
  // waiting.
  void run_step(int64_t num_tokens, const std::vector<int>& layers, double timeout_s,
                const StreamQuery& query);

  // Makes the bridge ready again after a failure, or after a step was launched and not served:
  // answers all that the stream submits with NaN until it is idle, then clears all flags. Throws
  // what query throws, or std::runtime_error after timeout_s; until a later call succeeds, what the
  // stream submits is left waiting. Without query the stream must be idle. A worker that is not
  // back from an earlier step may still write to out: as long as one is missing, throws
  // std::runtime_error when the stream is idle.
  void reset(double timeout_s, const StreamQuery& query);

  // The stream's side, for streams that call host functions. wait() returns when the layer is
  // finished, and clears the flag.
  void submit(int layer);
  void wait(int layer);

  uint32_t* submitted_flag(int layer) const { return flag(2 * layer); }
  uint32_t* finished_flag(int layer) const { return flag(2 * layer + 1); }
  uint32_t* trial_flag() const { return flag(2 * num_layers()); }

  BridgeCounters counters() const;

  // Whether layers are computed (as at first) or answered at once, with zeros: what a step takes
  // then is the stream's share of it. Answers are not counted as layers. Not during a step.
  void set_computing(bool computes) { computes_ = computes; }

  // For tests: the worker throws when it next computes this layer, after so many seconds.
  void fail_once(int layer, int worker, double after_s = 0);

 private:
  struct Layer {
    const ExpertWeights* weights;
    std::unique_ptr<MoeTask> task;
    std::vector<int64_t> last_use;  // of each expert: number of the call
    std::unique_ptr<Task> failing;  // instead of task, once; kept, lest a late worker use it
    bool is_failing = false;
  };

  uint32_t* flag(int index) const { return buffers_.flags + int64_t{index} * kFlagStride; }
  void check_process() const;
  std::unique_lock<std::mutex> only_caller();
  void wake_workers(const std::vector<int>& layers);
  bool take_submission(int layer);
  void await_submission(int layer, double timeout_s, const StreamQuery& query);
  void await_slow_submission(int layer, double timeout_s, const StreamQuery& query);
  void serve(int layer, int64_t num_tokens);
  int64_t count_experts(int layer, int64_t num_tokens);
  void compute(Layer* layer, int64_t num_tokens);
  double limit_seconds(const Layer& layer, int64_t num_tokens) const;
  void abandon(const std::vector<int>& layers, size_t position, bool was_submitted,
               const StreamQuery& query);
  void spoil();
  bool answer_all();

  ThreadPool* const pool_;
  const BridgeBuffers buffers_;
  const double worker_timeout_s_;
  const pid_t pid_;
  std::vector<Layer> layers_;
  int64_t num_calls_ = 0;
  bool computes_ = true;
  std::mutex caller_mutex_;
  std::string failure_;  // of the last step; empty: ready. Under caller_mutex_
  mutable std::mutex counters_mutex_;
  BridgeCounters counters_;
};

}  // namespace moejet
