// Choosing a token from one row of logits.
#pragma once

#include <cstdint>

#include "ops.h"

namespace moejet {

struct SamplingRule {
  double temperature;  // 0: the largest logit
  int64_t top_k;       // 0: all
  double top_p;        // the smallest head of the distribution that holds this much; 1: all
  double min_p;        // relative to the largest probability; 0: all
  double u;            // in [0, 1), decides
};

constexpr int64_t kBadLogits = -1;  // NaN, +infinity, or nothing above -infinity
constexpr int64_t kUndecided = -2;  // the cut-offs leave more than kMaxTopLogits tokens

// The token that inverse transform sampling draws from softmax(logits / temperature) after top_k,
// top_p (of what top_k left) and min_p, computed in float64. Tokens are ordered by index without
// cut-offs, else by descending probability.
int64_t sample_row(const OpKernels& ops, const float* logits, int64_t n, const SamplingRule& rule);

}  // namespace moejet
