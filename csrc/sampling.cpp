#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace moejet {
namespace {

// Most distributions are decided by far fewer tokens than kMaxTopLogits.
constexpr int64_t kShortHead = 64;

// The largest logits as weights, relative to the largest one's.
struct Head {
  int64_t size;
  int32_t ids[kMaxTopLogits];
  float logits[kMaxTopLogits];
  double weights[kMaxTopLogits];

  double sum() const {
    double total = 0.;
    for (int64_t i = 0; i < size; ++i) total += weights[i];
    return total;
  }
};

void take_head(const OpKernels& ops, const float* logits, int64_t n, int64_t size,
               double temperature, Head* head) {
  ops.topk_row(logits, n, size, head->ids, head->logits);
  head->size = size;
  for (int64_t i = 0; i < size; ++i) {
    const double below = static_cast<double>(head->logits[i]) - head->logits[0];
    head->weights[i] = below == 0. ? 1. : std::exp(below / temperature);
  }
}

// Keeps the shortest head whose weights reach `mass`.
void cut_mass(double mass, Head* head) {
  double before = 0.;
  int64_t kept = 0;
  while (kept < head->size && before < mass) before += head->weights[kept++];
  head->size = kept;
}

void cut_small(double smallest, Head* head) {
  while (head->size > 1 && head->weights[head->size - 1] < smallest) --head->size;
}

int32_t draw(const Head& head, double u) {
  const double target = u * head.sum();
  double sum = 0.;
  int64_t last = 0;
  for (int64_t i = 0; i < head.size; ++i) {
    if (head.weights[i] == 0.) continue;
    last = i;
    sum += head.weights[i];
    if (sum > target) break;
  }
  return head.ids[last];
}

int64_t sample_top_k(const OpKernels& ops, const float* logits, int64_t n,
                     const SamplingRule& rule) {
  const int64_t k = std::min(rule.top_k, n);
  if (k > kMaxTopLogits) return kUndecided;
  Head head;
  take_head(ops, logits, n, k, rule.temperature, &head);
  if (rule.top_p < 1.) cut_mass(rule.top_p * head.sum(), &head);
  cut_small(rule.min_p, &head);
  return draw(head, rule.u);
}

int64_t sample_head(const OpKernels& ops, const float* logits, int64_t n, float max,
                    const SamplingRule& rule) {
  const bool nucleus = rule.top_p < 1.;
  double mass = std::numeric_limits<double>::infinity();
  if (nucleus) mass = rule.top_p * ops.exp_sum_row(logits, n, max, rule.temperature);
  Head head;
  for (const int64_t size : {kShortHead, kMaxTopLogits}) {
    take_head(ops, logits, n, std::min(size, n), rule.temperature, &head);
    const bool whole = head.size == n || head.weights[head.size - 1] < rule.min_p;
    if (!whole && head.sum() < mass) continue;
    if (nucleus) cut_mass(mass, &head);
    cut_small(rule.min_p, &head);
    return draw(head, rule.u);
  }
  return kUndecided;
}

}  // namespace

int64_t sample_row(const OpKernels& ops, const float* logits, int64_t n, const SamplingRule& rule) {
  const Argmax best = ops.argmax_row(logits, n);
  if (best.bad || best.value == -std::numeric_limits<float>::infinity()) return kBadLogits;
  if (rule.temperature == 0.) return best.index;
  if (rule.top_k > 0) return sample_top_k(ops, logits, n, rule);
  if (rule.top_p < 1. || rule.min_p > 0.) return sample_head(ops, logits, n, best.value, rule);
  return ops.draw_row(logits, n, best.value, rule.temperature, rule.u);
}

}  // namespace moejet
