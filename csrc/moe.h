// One MoE layer's routed experts on the CPU: routing, scratch memory and the parallel region.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "expert_weights.h"
#include "kernels.h"
#include "nodes.h"
#include "task.h"
#include "thread_pool.h"
#include "workspace.h"

namespace moejet {

struct MoeCall {
  int64_t num_tokens;
  int64_t top_k;
  const void* x;  // [num_tokens, hidden_size], rows x_stride elements apart, fp32 or bf16
  DType x_dtype;
  int64_t x_stride;
  const int32_t* topk_ids;    // [num_tokens, top_k], -1: skip; checked by the caller
  const float* topk_weights;  // [num_tokens, top_k]
  void* out;                  // [num_tokens, hidden_size], rows out_stride apart, fp32 or bf16
  DType out_dtype;
  int64_t out_stride;
};

// Routed rows of a chunk, sorted by expert (counting sort, stable in token order).
struct Routing {
  std::vector<int32_t> slot_expert, slot_begin, slot_tile;
  std::vector<const uint8_t*> slot_weights;  // of the first node's slots, then the second's, ...
  std::vector<int32_t> row_token;
  std::vector<float> row_weight;
  std::vector<int32_t> token_begin, token_tiles;
  int64_t num_rows, num_tile_rows;
  bool any_vector;
  // Per expert: its rows, its next row, and the same among tile rows.
  std::vector<int32_t> count, next, next_tile;
};

// out[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x_t) * up_e x_t), e = topk_ids[t, k], as a
// task; may be used for one call after another. The result does not depend on the number of
// threads. out may be x. Ids are read when the first phase begins. Scratch memory comes from
// `workspace`, which must not serve anything else during a call.
class MoeTask final : public Task {
 public:
  MoeTask(const ExpertWeights& weights, const KernelTable& table, Workspace* workspace,
          int num_threads);
  void begin(const MoeCall& call);
  bool next() override;
  void work(int worker) override;
  // Experts that have been read so far, in all calls, and their bytes; any thread may ask. A long
  // call is divided into chunks, each of which reads its experts.
  int64_t expert_loads() const { return expert_loads_.load(std::memory_order_relaxed); }
  int64_t bytes_read() const { return expert_loads() * weights_.expert_bytes(); }

 private:
  void begin_chunk();
  void route(const MoeCall& call);
  void plan();
  void divide_among_nodes();
  bool begin_gate_up();
  bool begin_quantize();
  bool begin_down();
  int64_t gate_up_tasks_per_slot(int node) const;

  const ExpertWeights& weights_;
  const FormatKernels& gate_up_kernels_;
  const FormatKernels& down_kernels_;
  const int min_tile_rows_;
  Workspace* workspace_;
  std::vector<WorkerScratch> scratch_;  // of each worker
  MoeCall call_{};
  int64_t chunk_ = 0, num_chunks_ = 0;
  enum class Phase { kChunk, kPrepare, kGateUp, kQuantize, kDown } phase_ = Phase::kChunk;
  Routing routing_;
  MoeBatch batch_{};
  std::vector<MoeBatch> node_batches_;  // batch_ with each node's weights
  const Slices units_;
  int64_t units_per_task_ = 0, pairs_per_task_ = 0;
  NodeItems items_;  // of the phase
  std::atomic<int64_t> expert_loads_{0};
};

void moe_forward(const ExpertWeights& weights, const MoeCall& call, ThreadPool* pool,
                 const KernelTable& table);

}  // namespace moejet
