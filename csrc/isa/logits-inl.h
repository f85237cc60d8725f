// Whole rows of logits: the largest, the k largest, and the softmax for sampling; see ops.h.
#pragma once

#include "op-lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// ---- The largest ----

inline Argmax argmax_row(const float* logits, int64_t n) {
  constexpr int64_t kBlock = 1024;
  constexpr float kInfinity = __builtin_inff();
  float best = -kInfinity;
  int64_t best_begin = 0;
  WI fine = WI{} - 1;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const float* p = logits + begin;
    W max[4] = {W{} - kInfinity, W{} - kInfinity, W{} - kInfinity, W{} - kInfinity};
    int64_t i = 0;
    for (; i + 4 * kWide <= size; i += 4 * kWide) {
      for (int j = 0; j < 4; ++j) {
        const W v = load<W>(p + i + j * kWide);
        max[j] = larger(max[j], v);
        fine &= v < kInfinity;
      }
    }
    for_wide(p + i, size - i, -kInfinity, [&](W v, int64_t, int) {
      max[0] = larger(max[0], v);
      fine &= v < kInfinity;
    });
    const W all = larger(larger(max[0], max[1]), larger(max[2], max[3]));
    if (wide_bits(all > best) == 0) continue;
    best = max_wide(all);
    best_begin = begin;
  }
  int64_t index = best_begin;
  while (index < n && logits[index] != best) ++index;
  if (index == n) index = 0;  // nothing but NaN
  return {index, best, wide_bits(~fine) != 0};
}

// ---- The k largest ----

// Block maxima bound the k-th largest from below: k of them are elements. What reaches that bound
// is collected in index order and sorted; a stable sort then leaves equal values in index order.
constexpr int64_t kMaxima = 16384;
constexpr int64_t kCandidates = 4096;  // at least 2 kMaxTopLogits

struct Candidate {
  uint32_t rank;  // in the order of the floats, as unsigned
  int32_t index;
};

// Sorts by rank, descending and stable. `other` is scratch for as many.
inline void sort_candidates(Candidate* items, Candidate* other, int64_t n) {
  uint32_t count[4][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int d = 0; d < 4; ++d) ++count[d][255 - (items[i].rank >> (8 * d) & 255)];
  }
  Candidate *from = items, *to = other;
  for (int d = 0; d < 4; ++d) {
    uint32_t begin = 0;
    bool one_digit = false;
    for (uint32_t& c : count[d]) {
      one_digit |= c == n;
      const uint32_t next = begin + c;
      c = begin;
      begin = next;
    }
    if (one_digit) continue;
    for (int64_t i = 0; i < n; ++i) {
      to[count[d][255 - (from[i].rank >> (8 * d) & 255)]++] = from[i];
    }
    Candidate* const swapped = from;
    from = to;
    to = swapped;
  }
  if (from != items) std::memcpy(items, from, static_cast<size_t>(n) * sizeof(Candidate));
}

// A value that at least k of the keys reach, and hardly more: the k-th largest without its lowest
// bits.
inline int32_t lower_bound_of_kth(const WI* keys, int64_t count, int64_t k) {
  constexpr int kLowestBit = 8;
  uint32_t bound = 0x80000000u;
  for (int bit = 31; bit >= kLowestBit; --bit) {
    const uint32_t trial = bound + (1u << bit);
    WI reached = {};
    for (int64_t i = 0; i < count; ++i) {
      reached = reached - (keys[i] >= static_cast<int32_t>(trial));
    }
    int64_t total = 0;
    for (int lane = 0; lane < kWide; ++lane) total += reached[lane];
    if (total >= k) bound = trial;
  }
  return static_cast<int32_t>(bound);
}

// A lower bound of the k-th largest key, from the maxima of lanes over blocks of vectors. At least
// k maxima exist: n is above kCandidates, and the last block may be short but has all its lanes.
inline int32_t threshold(const float* logits, int64_t n, int64_t k, WI* maxima) {
  const int64_t vectors = n / kWide;
  int64_t wanted = 8 * k > 1024 ? 8 * k : 1024;
  wanted = (wanted < kMaxima ? wanted : kMaxima) / kWide;
  const int64_t block = (vectors + wanted - 1) / wanted;
  int64_t count = 0;
  for (int64_t begin = 0; begin < vectors; begin += block) {
    const int64_t end = begin + block < vectors ? begin + block : vectors;
    WI max = ordered(load<W>(logits + begin * kWide));
    for (int64_t i = begin + 1; i < end; ++i) {
      max = larger(max, ordered(load<W>(logits + i * kWide)));
    }
    maxima[count++] = max;
  }
  return lower_bound_of_kth(maxima, count, k);
}

inline void topk_row(const float* logits, int64_t n, int64_t k, int32_t* ids, float* values) {
  union alignas(64) Scratch {
    WI maxima[kMaxima / kWide];
    Candidate candidates[2][kCandidates];
  } scratch;
  int32_t bound = -0x7fffffff - 1;
  if (n > kCandidates) bound = threshold(logits, n, k, scratch.maxima);
  Candidate* found = scratch.candidates[0];
  int64_t count = 0;
  for_wide(logits, n, 0.f, [&](W v, int64_t i, int valid) {
    const WI keys = ordered(v);
    uint32_t bits = wide_bits(keys >= bound) & (0xffffu >> (16 - valid));
    if (bits == 0) return;
    if (count + kWide > kCandidates) {
      sort_candidates(found, scratch.candidates[1], count);
      count = k;
      // Later elements must be larger than the k-th: they lose to equal ones.
      const int32_t kth = static_cast<int32_t>(found[k - 1].rank ^ 0x80000000u);
      bound = kth == 0x7fffffff ? kth : kth + 1;
      bits &= wide_bits(keys >= bound);
    }
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      found[count++] = {static_cast<uint32_t>(keys[lane]) ^ 0x80000000u,
                        static_cast<int32_t>(i + lane)};
    }
  });
  sort_candidates(found, scratch.candidates[1], count);
  for (int64_t i = 0; i < k; ++i) {
    ids[i] = found[i].index;
    values[i] = logits[found[i].index];
  }
}

// ---- Softmax ----

// Terms exp((logit - max) / temperature) of a row, fp32.
class SoftmaxTerms {
 public:
  static constexpr int64_t kBlock = 256;  // terms at a time

  SoftmaxTerms(float max, double temperature) : max_(max) {
    // The limits keep 0 / tiny and -infinity / huge what they are.
    const double inverse = 1. / temperature;
    inverse_ = inverse > 1e38 ? 1e38f : inverse < 1e-37 ? 1e-37f : static_cast<float>(inverse);
  }
  // Of n <= kBlock logits; zeros behind them up to a multiple of 16.
  void compute(const float* logits, int64_t n, float* terms) const {
    for_wide(logits, n, -__builtin_inff(),
             [&](W v, int64_t i, int) { store(terms + i, exp_wide((v - max_) * inverse_)); });
    for (int64_t i = (n + kWide - 1) / kWide * kWide; i % kLanes != 0; ++i) terms[i] = 0.f;
  }

 private:
  float max_, inverse_;
};

// Sums in float64, 16 running ones; element i goes to sum i % 16.
class TermSum {
 public:
  // n terms, zeros behind them up to a multiple of 16.
  void add(const float* terms, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int j = 0; j < kParts; ++j) {
        const Narrow part = load<Narrow>(terms + i + j * kDoubles);
        part_[j] = part_[j] + __builtin_convertvector(part, Double);
      }
    }
  }
  double total() const {
    double lane[kLanes];
    std::memcpy(lane, part_, sizeof(lane));
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
  }

 private:
  static constexpr int kDoubles = kWide / 2, kParts = kLanes / kDoubles;
  using Narrow = float __attribute__((vector_size(4 * kDoubles)));
  using Double = double __attribute__((vector_size(8 * kDoubles)));
  Double part_[kParts] = {};
};

// A row is summed in this many shares at most, whole multiples of a block.
constexpr int64_t kMaxShares = 256;

// The sums of all shares, and how many logits one has.
inline int64_t share_sums(const SoftmaxTerms& softmax, const float* logits, int64_t n,
                          double* sums) {
  constexpr int64_t kBlock = SoftmaxTerms::kBlock;
  const int64_t size = (n + kMaxShares * kBlock - 1) / (kMaxShares * kBlock) * kBlock;
  alignas(64) float terms[kBlock];
  for (int64_t begin = 0; begin < n; begin += size) {
    const int64_t end = begin + size < n ? begin + size : n;
    TermSum sum;
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t count = end - i < kBlock ? end - i : kBlock;
      softmax.compute(logits + i, count, terms);
      sum.add(terms, count);
    }
    *sums++ = sum.total();
  }
  return size;
}

inline double exp_sum_row(const float* logits, int64_t n, float max, double temperature) {
  double sums[kMaxShares], total = 0.;
  const int64_t size = share_sums(SoftmaxTerms(max, temperature), logits, n, sums);
  for (int64_t share = 0; share * size < n; ++share) total += sums[share];
  return total;
}

// The first of the logits [begin, end) at which the running sum exceeds target, or the last one
// whose term is not zero.
inline int64_t draw_within(const SoftmaxTerms& softmax, const float* logits, int64_t begin,
                           int64_t end, double sum, double target) {
  alignas(64) float terms[SoftmaxTerms::kBlock];
  int64_t last = begin;
  for (int64_t i = begin; i < end; i += SoftmaxTerms::kBlock) {
    const int64_t count = end - i < SoftmaxTerms::kBlock ? end - i : SoftmaxTerms::kBlock;
    softmax.compute(logits + i, count, terms);
    for (int64_t j = 0; j < count; ++j) {
      if (terms[j] == 0.f) continue;
      last = i + j;
      sum += terms[j];
      if (sum > target) return last;
    }
  }
  return last;
}

inline int64_t draw_row(const float* logits, int64_t n, float max, double temperature, double u) {
  const SoftmaxTerms softmax(max, temperature);
  double sums[kMaxShares], total = 0.;
  const int64_t size = share_sums(softmax, logits, n, sums);
  for (int64_t share = 0; share * size < n; ++share) total += sums[share];
  const double target = u * total;
  // The share searched for, or the last one with a term that is not zero.
  int64_t found = 0;
  double sum = 0., before = 0.;
  for (int64_t share = 0; share * size < n && !(sum > target); ++share) {
    if (sums[share] == 0.) continue;
    found = share;
    before = sum;
    sum += sums[share];
  }
  const int64_t end = (found + 1) * size < n ? (found + 1) * size : n;
  return draw_within(softmax, logits, found * size, end, before, target);
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
