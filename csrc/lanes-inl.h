// Sixteen fp32 lanes in plain C++ (vector extensions): conversions, activation quantisation, silu.
// Included by the files in isa/ only, once per instruction set, with their flags. Every operation
// is one IEEE operation in a fixed order (no contraction), so all instruction sets give the same
// bits.
#pragma once

#ifndef MOEJET_ISA_NS
#error "lanes-inl.h belongs into a file of isa/"
#endif

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// No std::min: its instantiation would be a weak symbol with this file's instructions in it.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int kLanes = 16;
using F = float __attribute__((vector_size(4 * kLanes)));
using I = int32_t __attribute__((vector_size(4 * kLanes)));
using U = uint32_t __attribute__((vector_size(4 * kLanes)));

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}
inline F splat(float value) { return F{} + value; }

// Vectors of native width. GCC 12 splits wider ones well in arithmetic, but compares and selects in
// them element by element, and moves them in small pieces where it does not keep them in registers.
#if defined(__AVX512F__)
constexpr int kWide = 16;
#elif defined(__AVX2__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif
using W = float __attribute__((vector_size(4 * kWide)));
using WI = int32_t __attribute__((vector_size(4 * kWide)));
using WU = uint32_t __attribute__((vector_size(4 * kWide)));
using WideU16 = uint16_t __attribute__((vector_size(2 * kWide)));
using WideU8 = uint8_t __attribute__((vector_size(kWide)));

template <class V>
union Parts {
  using Element = decltype(V{}[0] + V{}[0]);
  V whole;
  Element __attribute__((vector_size(4 * kWide))) part[kLanes / kWide];
};

// a < b ? x : y in each lane.
template <class T, class V>
inline V if_less(T a, T b, V x, V y) {
  const Parts<T> pa = {a}, pb = {b};
  const Parts<V> px = {x}, py = {y};
  Parts<V> result;
  for (int i = 0; i < kLanes / kWide; ++i) {
    result.part[i] = pa.part[i] < pb.part[i] ? px.part[i] : py.part[i];
  }
  return result.whole;
}
inline F min_lanes(F a, F b) { return if_less(b, a, b, a); }  // keeps a NaN in a
inline F max_lanes(F a, F b) { return if_less(a, b, b, a); }
inline I max_lanes(I a, I b) { return if_less(a, b, b, a); }
inline I magnitude_bits(F v) { return (I)v & 0x7fffffff; }

// Adding 1.5 * 2^23 leaves round(v) (ties to even) in the low mantissa bits, for |v| < 2^22.
constexpr float kRoundMagic = 12582912.f;
inline I round_lanes(F v) { return (I)(v + kRoundMagic) - 0x4b400000; }

// The same of native width.
inline WI wide_magnitude(W v) { return (WI)v & 0x7fffffff; }
inline WI wide_round(W v) { return (WI)(v + kRoundMagic) - 0x4b400000; }

// fp8: blocks whose largest magnitude is below this become zero: their scale would not be a normal
// number.
constexpr float kFp8MinAmax = 1e-30f;
constexpr float kFp8Max = 448.f;

// e4m3 codes of v, |v| <= 448 (1 + 2^-20), to nearest even.
inline WideU8 fp8_codes(W v) {
  const WI magnitude = wide_magnitude(v);
  const WI rounded = (magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  const WI normal = rounded - (120 << 3);
  const WI subnormal = wide_round((W)magnitude * 512.f);  // 8 becomes the smallest normal number
  const WI code = (W)magnitude < 0x1p-6f ? subnormal : normal;
  const WU signed_code = (WU)code | (((WU)v >> 24) & 0x80u);
  return __builtin_convertvector(__builtin_convertvector(signed_code, WideU16), WideU8);
}

using Half = uint16_t __attribute__((vector_size(2 * kLanes)));
inline F bf16_lanes(const uint16_t* p) {
  return (F)(__builtin_convertvector(load<Half>(p), U) << 16);
}

// fp32 to bf16 bits (in the low half of each lane), to nearest even; NaN stays NaN.
inline U bf16_round_bits(F v) {
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return if_less(I{} + 0x7f800000, magnitude_bits(v), (bits >> 16) | 0x40u, rounded);
}
inline F bf16_round(F v) { return (F)(bf16_round_bits(v) << 16); }

// Of fp32 or bf16 values.
inline float element(const void* base, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(base)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(base)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// n values, fp32 or bf16, to fp32, then zeros up to n_padded.
inline void load_row(const void* src, DType dtype, int64_t n, int64_t n_padded, float* dst) {
  int64_t i = 0;
  if (dtype == DType::kF32) {
    std::memcpy(dst, src, n * sizeof(float));
    i = n;
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    for (; i + kLanes <= n; i += kLanes) store(dst + i, bf16_lanes(p + i));
  }
  for (; i < n; ++i) dst[i] = element(src, dtype, i);
  for (; i < n_padded; ++i) dst[i] = 0.f;
}

inline void store_bf16(F v, uint16_t* dst) {
  store(dst, __builtin_convertvector(bf16_round_bits(v), Half));
}

// First n of 32 results to a row of the output.
inline void store_outputs(const float* src, int n, DType dtype, void* dst) {
  if (dtype == DType::kF32) {
    std::memcpy(dst, src, n * sizeof(float));
    return;
  }
  uint16_t rounded[2 * kLanes];
  store_bf16(load<F>(src), rounded);
  store_bf16(load<F>(src + kLanes), rounded + kLanes);
  std::memcpy(dst, rounded, n * sizeof(uint16_t));
}

// exp(x) to 2 ulp for x in [-87.3, 88], floats V beside integers VI. Range reduction to |r| <= ln2
// / 2.
template <class V, class VI>
inline V exp_in_range(V x) {
  const V shifted = x * 1.44269504f + kRoundMagic;
  const V n = shifted - kRoundMagic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts
  V p = r * (1.f / 5040.f) + (1.f / 720.f);
  p = p * r + (1.f / 120.f);
  p = p * r + (1.f / 24.f);
  p = p * r + (1.f / 6.f);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return p * (V)(((VI)shifted - 0x4b400000 + 127) << 23);
}

// Clamped outside the range; NaN stays NaN.
inline F exp_lanes(F x) {
  return exp_in_range<F, I>(min_lanes(max_lanes(x, splat(-87.3f)), splat(88.f)));
}

inline F silu_mul(F gate, F up) { return gate / (1.f + exp_lanes(-gate)) * up; }

// 32 values to int8 codes with one scale; offset = -8 * sum of codes (the int4 zero point),
// half_offset[i] = -32 * sum of one half's codes (the q6_k zero point).
// A group with NaN or infinity gets a NaN scale: the NaN then reaches this row's results only.
// Magnitudes below 1e-30 count as zero, because 127 / amax must not overflow.
inline void quantize_group(const float* x, int8_t* q, float* scale, int32_t* offset,
                           int32_t* half_offset) {
  const F a = load<F>(x), b = load<F>(x + kLanes);
  const I larger = max_lanes(magnitude_bits(a), magnitude_bits(b));
  int32_t max_bits = 0;
  for (int i = 0; i < kLanes; ++i) max_bits = larger[i] > max_bits ? larger[i] : max_bits;
  float amax;
  std::memcpy(&amax, &max_bits, sizeof(amax));
  if (max_bits >= 0x7f800000 || amax < 1e-30f) {
    std::memset(q, 0, 2 * kLanes);
    *scale = max_bits >= 0x7f800000 ? __builtin_nanf("") : 0.f;
    *offset = half_offset[0] = half_offset[1] = 0;
    return;
  }
  const float inverse = 127.f / amax;
  const I qa = round_lanes(a * inverse), qb = round_lanes(b * inverse);
  int32_t first = 0, second = 0;
  for (int i = 0; i < kLanes; ++i) {
    q[i] = static_cast<int8_t>(qa[i]);
    q[kLanes + i] = static_cast<int8_t>(qb[i]);
    first += qa[i];
    second += qb[i];
  }
  *scale = amax / 127.f;
  *offset = -8 * (first + second);
  half_offset[0] = -32 * first;
  half_offset[1] = -32 * second;
}

// One row of activations, n_padded values.
inline void quantize_row(const float* x, int64_t n_padded, const Activations& acts, int64_t row) {
  const int64_t groups = row * acts.ld_groups;
  for (int64_t g = 0; g < n_padded / kActGroup; ++g) {
    quantize_group(x + g * kActGroup, acts.q + row * acts.ld + g * kActGroup,
                   acts.scale + groups + g, acts.offset + groups + g,
                   acts.half_offset + 2 * (groups + g));
  }
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
