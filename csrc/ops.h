// Small operations of the forward pass and of sampling, one row (a token) per call unless stated.
// Each instruction set provides them as the member `ops` of its table (kernels.h).
//
// Elements of a row are adjacent; sizes may be odd and nothing needs alignment. Values are fp32
// unless a DType says otherwise. Sums run in a fixed order: a row's result depends neither on
// threads nor on the other rows of a call, and all instruction sets give the same bits, except
// router_logits, where vector instruction sets use fused multiply-adds. All memory belongs to the
// caller, who has checked sizes and indices.
#pragma once

#include <cstdint>

namespace moejet {

enum class DType;  // kernels.h

struct EmbedTable {
  const void* weight;  // [vocab_size, hidden_size], fp32 or bf16
  DType dtype;
  int64_t vocab_size, hidden_size;
  int64_t row_stride;  // elements
};

struct RmsNorm {
  const float* weight;  // [dim]
  int64_t dim;
  float eps;
};

constexpr int64_t kMaxRopeDim = 512;

// Rotary embedding of one token: pair i turns by the angle whose cos and sin are cos_sin[i] and
// cos_sin[dim / 2 + i]. A pair is (x[2i], x[2i + 1]) with interleave, else (x[i], x[dim / 2 + i]);
// it is written to (y[i], y[dim / 2 + i]) either way.
struct RopeRow {
  const float* cos_sin;  // [dim]
  int64_t dim;           // even, at most kMaxRopeDim
  bool interleave;
  int64_t num_heads;
  const float* x;  // [num_heads, dim], heads x_stride elements apart
  int64_t x_stride;
  float* y;  // [num_heads, dim], heads y_stride elements apart; x itself, or no part of it
  int64_t y_stride;
};

// One token's row of the latent cache: rms_norm(c_kv) and rope(k_pe), as latent_layout.h has them.
struct LatentRow {
  const float* c_kv;         // [rank]
  const float* k_pe;         // [rope_dim]
  int64_t rank, rope_dim;    // rope_dim even, at most kMaxRopeDim
  const float* norm_weight;  // [rank]; null: c_kv is stored as it is
  float eps;
  const float* cos_sin;  // [rope_dim], as in RopeRow; null: k_pe is stored as it is
  bool interleave;
  void* out;
  DType out_dtype;  // fp32, bf16 or fp8 (to nearest even)
};

struct RouterMatrix {
  const void*
      weight;  // [num_experts, hidden_size], fp32 or bf16 (exact: fp32 arithmetic either way)
  DType weight_dtype;
  int64_t weight_stride;  // elements between rows
  int64_t hidden_size;
  const float* x;  // [num_tokens, hidden_size], rows x_stride apart
  int64_t x_stride;
  float* logits;  // [num_tokens, num_experts], rows logits_stride apart
  int64_t logits_stride;
};

constexpr int64_t kMaxRouterExperts = 1024;

enum class Scoring { kSoftmax = 0, kSigmoid };
// How the groups of experts are ranked of which the best keep their experts: not at all (greedy),
// by their best score (group_limited_greedy), by the sum of their two best (noaux_tc).
enum class GroupRank { kNone = 0, kBest, kBestTwo };

struct RouterChoice {
  int64_t num_experts;  // at most kMaxRouterExperts
  int64_t top_k;        // 1 .. num_experts
  Scoring scoring;
  GroupRank group_rank;
  int64_t num_groups, top_groups;  // num_groups divides num_experts; unused with kNone
  bool norm_topk_prob;
  float scaling_factor;
  const float* bias;  // [num_experts], added to the scores for the selection only; null: none
};

constexpr int64_t kMaxTopLogits = 1024;

struct Argmax {
  int64_t index;  // the smallest among equal values; in range also if bad
  float value;
  bool bad;  // some value is NaN or +infinity
};

struct OpKernels {
  // out[0 .. hidden_size) = the embedding of `token`, as fp32.
  void (*embed_row)(const EmbedTable& table, int64_t token, float* out);

  // h += a + b; b may be null.
  void (*add_row)(int64_t n, const float* a, const float* b, float* h);

  // y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
  void (*rms_norm_row)(const RmsNorm& norm, const float* x, float* y);
  // h += a + b (b may be null), then y = rms_norm(h), in one go.
  void (*add_rms_norm_row)(const RmsNorm& norm, const float* a, const float* b, float* h, float* y);

  void (*rope_row)(const RopeRow& row);
  void (*store_latent_row)(const LatentRow& row);

  // logits[t][e] = weight[e] . x[t] for tokens [token_begin, token_end) and experts
  // [expert_begin, expert_end). One token streams the weights in memory order; with many tokens
  // a share of 32 to 64 tokens and all experts per call keeps the caches busy.
  void (*router_logits)(const RouterMatrix& router, int64_t token_begin, int64_t token_end,
                        int64_t expert_begin, int64_t expert_end);
  // ids [top_k], the chosen experts from the best on, the smaller index first among equals; weights
  // [top_k]. A NaN among the logits counts as the largest value: ids stay valid and distinct, and
  // its weight is NaN.
  void (*router_topk_row)(const RouterChoice& choice, const float* logits, int32_t* ids,
                          float* weights);

  // Sampling. n >= 1 logits; -infinity masks a token.
  Argmax (*argmax_row)(const float* logits, int64_t n);
  // The k largest in descending order, the smaller index first among equals. 1 <= k <= n,
  // k <= kMaxTopLogits. Without NaN among the logits, else any distinct indices.
  void (*topk_row)(const float* logits, int64_t n, int64_t k, int32_t* ids, float* values);
  // sum of exp((logits[i] - max) / temperature) in float64; max is the largest logit, finite. Any
  // temperature > 0. max + log of it at temperature 1 is the row's logsumexp.
  double (*exp_sum_row)(const float* logits, int64_t n, float max, double temperature);
  // Inverse transform: the first index whose running sum of those terms exceeds u times the total,
  // 0 <= u < 1; never one whose term is zero.
  int64_t (*draw_row)(const float* logits, int64_t n, float max, double temperature, double u);
};

}  // namespace moejet
