// A model's forward pass as a recorded sequence of operations over buffers that are bound once: the
// CPU's counterpart of a CUDA graph. One call runs the whole sequence in one parallel region.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "moe.h"
#include "ops.h"
#include "task.h"
#include "thread_pool.h"
#include "workspace.h"

namespace moejet {

// What changes from step to step: B requests with num_tokens query tokens in all.
struct Step {
  int64_t num_tokens;
  const int64_t* token_ids;     // [num_tokens]
  const int64_t* positions;     // [num_tokens]
  const int64_t* slot_mapping;  // [num_tokens], row of the latent cache
  int64_t num_requests;
  const int64_t* query_lens;    // [B]
  const int64_t* context_lens;  // [B]
  const int64_t* block_tables;  // [B, table_width]
  int64_t table_width;
  int64_t num_logits;
  const int64_t* logits_indices;  // [num_logits], rows of the tokens
};

// fp32 values of up to max_tokens rows, `stride` elements apart. The memory is the caller's.
struct Rows {
  float* data;
  int64_t stride;
  int64_t cols;
  float* row(int64_t r) const { return data + r * stride; }
};

// One operation: a task that is told about the step before its first phase.
class Operation : public Task {
 public:
  virtual void begin(const Step& step) = 0;
  virtual const char* name() const = 0;
};

// A recorded sequence. Operations hold references to weights and buffers, which the owner keeps
// alive. Not for concurrent use.
class Program final : public Task {
 public:
  Program(ThreadPool* pool, const KernelTable& table);

  // Recording, in the order of execution. A step has T tokens and L logits rows.
  // out[t] = table[token_ids[t]]
  void embed(const EmbedTable& table, Rows out);
  // h[t] += each delta [t] (at most two), then out[t] = norm(h[t]). only_logits_rows: for
  // t = logits_indices[l] only, into out[l].
  void rms_norm(Rows h, std::vector<Rows> deltas, const RmsNorm& norm, Rows out,
                bool only_logits_rows);
  // out[t] = W x[t] (+ bias). x and out may be columns of wider rows. All run side by side.
  struct Projection {
    const LinearWeights* weights;  // one matrix
    const float* bias;             // [out.cols] or null
    Rows x, out;
  };
  void linear(std::vector<Projection> projections);
  // Rotates the last rope_dim values of every head of q in place, and stores
  // norm(c_kv) and rotated k_pe of latent [T, rank + rope_dim] in the cache.
  struct Latent {
    Rows q;
    int64_t heads, head_dim;
    Rows latent;
    int64_t rank, rope_dim;
    bool interleave;
    const float* norm_weight;  // [rank]
    float norm_eps;
    const float* cos_sin;  // [positions, rope_dim]
    void* cache;           // [slots] rows of latent_layout.h
    DType cache_dtype;     // fp32, bf16 or fp8
  };
  void rope_and_store(const Latent& latent);
  // bound: everything but the step's part.
  void attention(const AttentionWeights& weights, const AttentionCall& bound);
  void router(const RouterMatrix& matrix, const RouterChoice& choice, int32_t* topk_ids,
              float* topk_weights);
  // out[t] = weighted sum of the experts in topk_ids[t]. All groups run side by side.
  struct Experts {
    const ExpertWeights* weights;
    int64_t top_k;
    const int32_t* topk_ids;    // [max_tokens, top_k]
    const float* topk_weights;  // [max_tokens, top_k]
    Rows x, out;
  };
  void experts(std::vector<Experts> groups);
  // logits[l] = W x[l], into the memory given to run().
  void lm_head(const LinearWeights& weights, Rows x);

  // Runs everything for one step. logits: [step.num_logits, V].
  void run(const Step& step, float* logits);
  int64_t num_operations() const { return static_cast<int64_t>(operations_.size()); }
  // Name of every operation and the wall time in seconds that it took in all runs so far.
  std::vector<std::pair<const char*, double>> operation_seconds() const;
  // Of every group of experts, in the order of recording: experts read in all runs so far, and
  // their bytes. Any thread may ask.
  std::vector<std::pair<int64_t, int64_t>> expert_loads() const;

  bool next() override;
  void work(int worker) override { current_->work(worker); }

 private:
  Workspace* workspace(size_t lane);

  ThreadPool* pool_;
  const KernelTable& table_;
  // Scratch memory by lane: operations that run side by side need one each.
  std::vector<std::unique_ptr<Workspace>> workspaces_;
  AttentionScratch attention_scratch_;
  struct Timed {
    std::unique_ptr<Operation> operation;
    std::chrono::nanoseconds spent{0};
  };
  void add(std::unique_ptr<Operation> operation) { operations_.push_back({std::move(operation)}); }
  std::vector<Timed> operations_;
  std::vector<const MoeTask*> expert_tasks_;  // of the operations
  std::chrono::steady_clock::time_point last_change_;
  Step step_{};
  float* logits_ = nullptr;
  size_t position_ = 0;
  bool begun_ = false;
  Operation* current_ = nullptr;
};

}  // namespace moejet
