// One MoE layer's routed experts on the CPU: routing, scratch memory and the parallel region.
#pragma once

#include <cstdint>

#include "expert_weights.h"
#include "kernels.h"
#include "thread_pool.h"

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

// out[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x_t) * up_e x_t), e = topk_ids[t, k].
// The result does not depend on the number of threads. out may be x.
void moe_forward(const ExpertWeights& weights, const MoeCall& call, ThreadPool* pool,
                 const KernelTable& table);

}  // namespace moejet
