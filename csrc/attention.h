// Multi-head latent attention over the paged latent cache, as one task.
//
// The cache holds a row of c_kv and k_pe per token (latent_layout.h). Either form of attention
// gives the same result:
//   absorbed   queries move into latent space (W_UK^T q_nope); all heads share the latent rows as
//              keys and values; results move back through W_UV. Long contexts are split, and the
//              splits merged, so that one query keeps many threads busy.
//   expanded   keys and values of all heads are rebuilt (W_UK c_kv, W_UV c_kv), one block of
//   context
//              tokens after the other, and every query attends to the block before the next.
// Few queries favour the first, long chunks of prefill the second: prefers_expanded. No memory
// grows with the context, except for the sums of up to kMaxSplits splits.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "task.h"
#include "thread_pool.h"
#include "workspace.h"

namespace moejet {

// H heads, N nope, R rope and V value dims, latent rank C. The matrices belong to the caller.
struct AttentionWeights {
  const LinearWeights* w_uk_transposed;  // H matrices [C, N]
  const LinearWeights* w_uk;             // H matrices [N, C]
  const LinearWeights* w_uv;             // H matrices [V, C]
  int64_t rope;
  float scale;

  int64_t heads() const { return w_uk->num_matrices(); }
  int64_t nope() const { return w_uk->rows(); }
  int64_t rank() const { return w_uk->cols(); }
  int64_t value() const { return w_uv->rows(); }
};

// Whether rebuilding keys and values costs fewer multiply-adds than absorbed attention, per context
// token and head.
bool prefers_expanded(const AttentionWeights& weights, int64_t query_len);

// kInvariant is absorbed with splits that depend on a key's position only: what comes out for a
// query is the same to the last bit whichever other queries are computed with it.
enum class AttentionForm { kAuto, kAbsorbed, kExpanded, kInvariant };

// B requests with T query tokens in all. Request i's are its last query_lens[i] of context_lens[i].
struct AttentionCall {
  int64_t num_requests;
  const int64_t* query_lens;    // [B], at least 1
  const int64_t* context_lens;  // [B], at least query_lens
  const int64_t* block_tables;  // [B, table_width]
  int64_t table_width;
  const float* q;  // [T, H, N + R], the rope part rotated; strides in elements
  int64_t q_stride, q_head_stride;
  const void* cache;  // [blocks, block_size] rows of latent_layout.h, with the query tokens' rows
  DType cache_dtype;  // fp32, bf16 or fp8
  int64_t block_size;
  float* out;  // [T, H, V]; strides in elements
  int64_t out_stride, out_head_stride;
  AttentionForm form;  // kAuto: each request by prefers_expanded
};

// Memory that the attention layers of a model can share, because they run one after another.
class AttentionScratch {
 public:
  explicit AttentionScratch(int num_threads) : workers_(static_cast<size_t>(num_threads)) {}

 private:
  friend class AttentionTask;
  std::vector<AttentionWorker> workers_;
  Workspace worker_memory_;
  Workspace data_;  // of a unit of work: a wave of absorbed parts, or one expanded request
};

// Attention as a task; may be used for one call after another. The result does not depend on the
// number of threads. `workspace` serves the W_UK and W_UV products and must not serve anything else
// during a call.
class AttentionTask final : public Task {
 public:
  AttentionTask(const AttentionWeights& weights, const KernelTable& table, Workspace* workspace,
                AttentionScratch* scratch, int num_threads);
  void begin(const AttentionCall& call);
  bool next() override;
  void work(int worker) override;

 private:
  enum class Phase {
    kUnit,
    kQuery,
    kAttend,
    kMerge,
    kValue,
    kGather,
    kKeys,
    kValues,
    kPack,
    kExpanded
  };
  // Rows [begin, end) of a part to merge, or its (group, split) to attend.
  struct Item {
    int32_t part;
    int32_t first, second;
  };

  bool begin_unit();
  void begin_wave();
  void add_part(int64_t request, int64_t query, int64_t num_queries);
  void place_wave(int64_t num_tokens);
  void begin_expanded();
  void begin_block();
  void gather(int64_t item);
  // As in the cache; of fp8, what its kernels compute in.
  DType latents_dtype() const {
    if (batch_.cache_dtype != DType::kFp8) return batch_.cache_dtype;
    return kernels_->pair == 2 ? DType::kBf16 : DType::kF32;
  }
  void run_item(int64_t item, AttentionWorker* worker);
  const int64_t* blocks_of(int64_t request) const {
    return call_.block_tables + request * call_.table_width;
  }

  const AttentionWeights weights_;
  const KernelTable& table_;
  AttentionScratch* scratch_;
  LinearTask query_task_, key_task_, value_task_;
  AttentionCall call_{};
  const AttentionKernels* kernels_ = nullptr;
  AttentionBatch batch_{};
  Phase phase_ = Phase::kUnit;
  // The next unit begins at this request, at this of its queries, at this token of q.
  int64_t request_ = 0, query_ = 0, token_ = 0;
  int64_t num_items_ = 0;
  std::atomic<int64_t> next_item_{0};
  // Absorbed: the wave.
  std::vector<AbsorbedPart> parts_;
  std::vector<Item> attend_items_, merge_items_;
  float* mixed_ = nullptr;
  int64_t wave_token_ = 0, wave_tokens_ = 0;
  // Expanded: the request.
  ExpandedBlock block_{};
  uint8_t* latents_ = nullptr;  // c_kv: [kContextBlock, rank] of latents_dtype()
  void *keys_ = nullptr, *values_ = nullptr;
  int64_t context_len_ = 0;
};

void mla_attention(const AttentionWeights& weights, const AttentionCall& call, ThreadPool* pool,
                   const KernelTable& table);

}  // namespace moejet
