// What the operations of ops.h share beyond lanes-inl.h: ragged ends, sums in a fixed order, and
// vectors of the width that the instruction set has.
#pragma once

#ifndef MOEJET_ISA_NS
#error "op-lanes-inl.h belongs into a file of isa/"
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../lanes-inl.h"
#include "../ops.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// ---- Rows of any length ----

// The first n < 16 elements, zeros behind.
inline F load_first(const float* p, int64_t n) {
  F v = {};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
}
inline void store_first(float* p, F v, int64_t n) {
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
}

// body(lanes, i, count) for i = 0, 16, ...: 16 elements of p from i on, the last ones padded with
// zeros.
template <class Body>
inline void for_lanes(const float* p, int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(load<F>(p + i), i, kLanes);
  if (i < n) body(load_first(p + i, n - i), i, static_cast<int>(n - i));
}

// n fp32 values to a row of fp32 or bf16.
inline void store_row(const float* src, int64_t n, DType dtype, void* dst) {
  if (dtype == DType::kF32) {
    std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(dst);
  for_lanes(src, n, [&](F v, int64_t i, int count) {
    uint16_t rounded[kLanes];
    store_bf16(v, rounded);
    std::memcpy(out + i, rounded, static_cast<size_t>(count) * sizeof(uint16_t));
  });
}

// ---- Reductions, in the same order everywhere ----

inline float sum_lanes(F v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// Sums of many vectors in four parts, which hides the latency of additions.
struct SumLanes {
  F part[4] = {};
  float total() const { return sum_lanes((part[0] + part[1]) + (part[2] + part[3])); }
};

// ---- Vectors of native width ----
// Used where the width cannot change the result, or only the speed counts.

// body(vector, i, count) for i = 0, kWide, ...: elements of p from i on, `padding` behind the last.
template <class Body>
inline void for_wide(const float* p, int64_t n, float padding, Body&& body) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) body(load<W>(p + i), i, kWide);
  if (i == n) return;
  W v = W{} + padding;
  std::memcpy(&v, p + i, static_cast<size_t>(n - i) * sizeof(float));
  body(v, i, static_cast<int>(n - i));
}

// Bit i: lane i of a comparison's result.
inline uint32_t wide_bits(WI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWide; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

inline W larger(W a, W b) { return b > a ? b : a; }  // keeps a if b is NaN
inline WI larger(WI a, WI b) { return b > a ? b : a; }

inline float max_wide(W v) {
  float max = v[0];
  for (int i = 1; i < kWide; ++i) max = v[i] > max ? v[i] : max;
  return max;
}
inline int32_t max_wide(WI v) {
  int32_t lane[kWide];
  store(lane, v);
  for (int width = kWide / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    }
  }
  return lane[0];
}

// Integers in the order of the floats; both zeros are equal, a NaN lies beyond infinity or, with
// its sign set, below -infinity.
inline WI ordered(W v) {
  const WI bits = (WI)(v + 0.f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// exp(x), as exp_lanes computes it, for x <= 88; 0 below -87.3, where it would become subnormal.
inline W exp_wide(W x) {
  const W value = exp_in_range<W, WI>(x < -87.3f ? W{} - 87.3f : x);
  return x < -87.3f ? W{} : value;
}

inline W multiply_add(W a, W b, W c) {
#if defined(__AVX512F__)
  return (W)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (W)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline float sum_wide(W v) {
#if defined(__AVX512F__)
  // Not the plain extract: GCC 12 warns about its own undefined operand.
  const __m512d all = _mm512_castps_pd((__m512)v);
  const __m256 half = _mm256_add_ps(_mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xff, all, 0)),
                                    _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xff, all, 1)));
#elif defined(__AVX2__)
  const __m256 half = (__m256)v;
#endif
#if defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
