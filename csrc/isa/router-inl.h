// The router: logits of all experts, and the choice of top_k among them; see ops.h.
#pragma once

#include "op-lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// ---- Logits ----

// A dot product runs in chunks of this many inputs: in each, kWide running sums that are added up
// and go to the logit. The order is the same for every blocking, so tokens do not see each other.
// A chunk of a block's operands (4 experts, 6 tokens) stays in L1.
constexpr int64_t kRouterChunk = 1024;
constexpr int kRouterExperts = 4;
// One token: rows stream from memory fastest one by one while the input stays in L1, else eight at
// a time (measured with 1, 2, 4 and 8 rows).
constexpr int kStreamExperts = 8;
constexpr int64_t kMaxL1Inputs = 4096;
// Few tokens: all their inputs stay in L2, and the weights are read in memory order.
constexpr int64_t kMaxL2Inputs = 64 * 1024;
#if defined(__AVX512F__)
constexpr int kRouterTokens = 6;  // 24 sums, 4 weights and an input in 32 registers
#else
constexpr int kRouterTokens = 2;  // 8 sums, 4 weights and an input in 16 registers
#endif

struct Fp32Weight {
  using Element = float;
  static W load_wide(const float* p) { return load<W>(p); }
  static float widen(float value) { return value; }
};
struct Bf16Weight {
  using Element = uint16_t;
  static W load_wide(const uint16_t* p) {
    using Narrow = uint16_t __attribute__((vector_size(2 * kWide)));
    using Bits = uint32_t __attribute__((vector_size(4 * kWide)));
    return (W)(__builtin_convertvector(load<Narrow>(p), Bits) << 16);
  }
  static float widen(uint16_t bits) { return element(&bits, DType::kBf16, 0); }
};

// logits[t][e] += the products of inputs [begin, end), or = if begin is 0, for E experts from e0
// and T tokens from t0 on.
template <class Weight, int E, int T>
inline void router_block(const RouterMatrix& router, int64_t t0, int64_t e0, int64_t begin,
                         int64_t end) {
  using Element = typename Weight::Element;
  const Element* w[E];
  const float* x[T];
  for (int e = 0; e < E; ++e) {
    w[e] = static_cast<const Element*>(router.weight) + (e0 + e) * router.weight_stride;
  }
  for (int t = 0; t < T; ++t) x[t] = router.x + (t0 + t) * router.x_stride;
  W sum[E][T];
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[e][t] = W{};
  }
  int64_t k = begin;
  for (; k + kWide <= end; k += kWide) {
    W weight[E];
    for (int e = 0; e < E; ++e) weight[e] = Weight::load_wide(w[e] + k);
    for (int t = 0; t < T; ++t) {
      const W input = load<W>(x[t] + k);
      for (int e = 0; e < E; ++e) sum[e][t] = multiply_add(weight[e], input, sum[e][t]);
    }
  }
  float parts[T][E];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) parts[t][e] = sum_wide(sum[e][t]);
  }
  for (int t = 0; t < T; ++t) {
    float* logits = router.logits + (t0 + t) * router.logits_stride + e0;
    for (int e = 0; e < E; ++e) {
      float part = parts[t][e];
      for (int64_t i = k; i < end; ++i) part += Weight::widen(w[e][i]) * x[t][i];
      logits[e] = begin == 0 ? part : logits[e] + part;
    }
  }
}

// T tokens from t on, `E` experts at a time.
template <class Weight, int E, int T>
inline void router_experts(const RouterMatrix& router, int64_t t, int64_t expert_begin,
                           int64_t expert_end, int64_t begin, int64_t end) {
  int64_t e = expert_begin;
  for (; e + E <= expert_end; e += E) router_block<Weight, E, T>(router, t, e, begin, end);
  for (; e < expert_end; ++e) router_block<Weight, 1, T>(router, t, e, begin, end);
}

// All tokens, at most T at a time.
template <class Weight, int T>
inline void router_tokens(const RouterMatrix& router, int64_t token_begin, int64_t token_end,
                          int64_t expert_begin, int64_t expert_end, int64_t begin, int64_t end) {
  int64_t t = token_begin;
  for (; t + T <= token_end; t += T) {
    router_experts<Weight, kRouterExperts, T>(router, t, expert_begin, expert_end, begin, end);
  }
  if constexpr (T > 1) {
    // Halves: 5 tokens after the sixes as 3 + 1 + 1.
    router_tokens<Weight, T / 2>(router, t, token_end, expert_begin, expert_end, begin, end);
  }
}

// body(expert, expert end, input, input end) for blocks of E experts and chunks of inputs: the
// weights in memory order, or chunk by chunk so that the tokens' inputs of one stay in cache.
template <int E, class Body>
inline void for_weight_blocks(int64_t inputs, int64_t expert_begin, int64_t expert_end,
                              bool memory_order, Body&& body) {
  const int64_t blocks = (expert_end - expert_begin + E - 1) / E;
  const int64_t chunks = (inputs + kRouterChunk - 1) / kRouterChunk;
  for (int64_t i = 0; i < blocks * chunks; ++i) {
    const int64_t e = expert_begin + (memory_order ? i / chunks : i % blocks) * E;
    const int64_t k = (memory_order ? i % chunks : i / blocks) * kRouterChunk;
    body(e, e + E < expert_end ? e + E : expert_end, k,
         k + kRouterChunk < inputs ? k + kRouterChunk : inputs);
  }
}

template <class Weight, int E>
inline void stream_logits(const RouterMatrix& router, int64_t token, int64_t expert_begin,
                          int64_t expert_end) {
  for_weight_blocks<E>(router.hidden_size, expert_begin, expert_end, true,
                       [&](int64_t e, int64_t e_end, int64_t k, int64_t end) {
                         router_experts<Weight, E, 1>(router, token, e, e_end, k, end);
                       });
}

template <class Weight>
inline void router_logits_of(const RouterMatrix& router, int64_t token_begin, int64_t token_end,
                             int64_t expert_begin, int64_t expert_end) {
  const int64_t n = router.hidden_size, tokens = token_end - token_begin;
  if (tokens == 1 && n <= kMaxL1Inputs) {
    stream_logits<Weight, 1>(router, token_begin, expert_begin, expert_end);
  } else if (tokens == 1) {
    stream_logits<Weight, kStreamExperts>(router, token_begin, expert_begin, expert_end);
  } else {
    for_weight_blocks<kRouterExperts>(n, expert_begin, expert_end, tokens * n <= kMaxL2Inputs,
                                      [&](int64_t e, int64_t e_end, int64_t k, int64_t end) {
                                        router_tokens<Weight, kRouterTokens>(
                                            router, token_begin, token_end, e, e_end, k, end);
                                      });
  }
}

inline void router_logits(const RouterMatrix& router, int64_t token_begin, int64_t token_end,
                          int64_t expert_begin, int64_t expert_end) {
  if (router.weight_dtype == DType::kF32) {
    router_logits_of<Fp32Weight>(router, token_begin, token_end, expert_begin, expert_end);
  } else {
    router_logits_of<Bf16Weight>(router, token_begin, token_end, expert_begin, expert_end);
  }
}

// ---- Choice ----

struct alignas(64) ExpertScores {
  float score[kMaxRouterExperts];   // what weights are made of
  float choice[kMaxRouterExperts];  // what is compared
  int32_t key[kMaxRouterExperts];   // choice as ordered integers, kMasked or kTaken
};
constexpr int32_t kMasked = -0x7fffffff, kTaken = -0x7fffffff - 1;

// A NaN of either sign is the largest.
inline WI choice_keys(W choice) { return choice == choice ? ordered(choice) : WI{} + 0x7fffffff; }
inline int32_t choice_key(float choice) { return choice_keys(W{} + choice)[0]; }

inline void softmax_scores(const float* logits, int64_t n, float* score) {
  constexpr float kInfinity = __builtin_inff();
  W max = W{} - kInfinity;
  for_wide(logits, n, -kInfinity, [&](W v, int64_t, int) { max = larger(max, v); });
  const float largest = max_wide(max);
  for_wide(logits, n, -kInfinity,
           [&](W v, int64_t i, int) { store(score + i, exp_wide(v - largest)); });
  F sum = {};
  for_lanes(score, n, [&](F v, int64_t, int) { sum = sum + v; });
  const float total = sum_lanes(sum);
  for (int64_t i = 0; i < n; i += kWide) store(score + i, load<W>(score + i) / total);
}

// exp(88) in the denominator leaves a subnormal: zero then.
inline void sigmoid_scores(const float* logits, int64_t n, float* score) {
  for_wide(logits, n, 0.f, [&](W v, int64_t i, int) {
    const W negative = v < -87.3f ? W{} : -v;
    store(score + i, v < -87.3f ? W{} : 1.f / (1.f + exp_wide(negative)));
  });
}

// Scores of all experts; keys behind the last one are kTaken.
inline void score_experts(const RouterChoice& c, const float* logits, ExpertScores* s) {
  const int64_t n = c.num_experts;
  if (c.scoring == Scoring::kSoftmax) {
    softmax_scores(logits, n, s->score);
  } else {
    sigmoid_scores(logits, n, s->score);
  }
  if (c.bias == nullptr) {
    std::memcpy(s->choice, s->score, static_cast<size_t>(n) * sizeof(float));
  } else {
    for_wide(c.bias, n, 0.f,
             [&](W v, int64_t i, int) { store(s->choice + i, load<W>(s->score + i) + v); });
  }
  for_wide(s->choice, n, 0.f, [&](W v, int64_t i, int count) {
    store(s->key + i, choice_keys(v));
    for (int j = count; j < kWide; ++j) s->key[i + j] = kTaken;
  });
}

// Masks the experts of all but the best top_groups groups, the smaller group first among equals.
inline void mask_groups(const RouterChoice& c, ExpertScores* s) {
  const int64_t size = c.num_experts / c.num_groups;
  int32_t rank[kMaxRouterExperts];
  for (int64_t g = 0; g < c.num_groups; ++g) {
    const int32_t* key = s->key + g * size;
    int64_t best = 0, second = -1;
    for (int64_t i = 1; i < size; ++i) {
      if (key[i] > key[best]) {
        second = best;
        best = i;
      } else if (second < 0 || key[i] > key[second]) {
        second = i;
      }
    }
    const float* choice = s->choice + g * size;
    const bool two = c.group_rank == GroupRank::kBestTwo && second >= 0;
    rank[g] = two ? choice_key(choice[best] + choice[second]) : key[best];
  }
  bool kept[kMaxRouterExperts] = {};
  for (int64_t n = 0; n < c.top_groups; ++n) {
    int64_t best = -1;
    for (int64_t g = 0; g < c.num_groups; ++g) {
      if (!kept[g] && (best < 0 || rank[g] > rank[best])) best = g;
    }
    if (best >= 0) kept[best] = true;
  }
  for (int64_t g = 0; g < c.num_groups; ++g) {
    for (int64_t i = 0; !kept[g] && i < size; ++i) s->key[g * size + i] = kMasked;
  }
}

// The first index of the largest key, which becomes kTaken.
inline int32_t take_best(int32_t* keys, int64_t n) {
  WI best = load<WI>(keys);
  for (int64_t i = kWide; i < n; i += kWide) best = larger(best, load<WI>(keys + i));
  const int32_t largest = max_wide(best);
  int64_t i = 0;
  uint32_t bits = 0;
  while ((bits = wide_bits(load<WI>(keys + i) == largest)) == 0) i += kWide;
  i += __builtin_ctz(bits);
  keys[i] = kTaken;
  return static_cast<int32_t>(i);
}

inline void router_topk_row(const RouterChoice& c, const float* logits, int32_t* ids,
                            float* weights) {
  ExpertScores scores;
  score_experts(c, logits, &scores);
  if (c.group_rank != GroupRank::kNone && c.num_groups > 1) mask_groups(c, &scores);
  float total = 0.f;
  for (int64_t k = 0; k < c.top_k; ++k) {
    ids[k] = take_best(scores.key, c.num_experts);
    weights[k] = scores.score[ids[k]];
    total += weights[k];
  }
  for (int64_t k = 0; k < c.top_k; ++k) {
    if (c.norm_topk_prob) weights[k] = weights[k] / (total + 1e-20f);
    weights[k] = weights[k] * c.scaling_factor;
  }
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
