// Sixteen fp32 lanes in plain C++ (vector extensions): packing, activation quantisation, silu.
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
inline F min_lanes(F a, F b) { return b < a ? b : a; }  // keeps a NaN in a
inline F max_lanes(F a, F b) { return b > a ? b : a; }

// Adding 1.5 * 2^23 leaves round(v) (ties to even) in the low mantissa bits, for |v| < 2^22.
constexpr float kRoundMagic = 12582912.f;
inline I round_lanes(F v) { return (I)(v + kRoundMagic) - 0x4b400000; }

inline F bf16_lanes(const uint16_t* p) {
  U bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = p[i];
  return (F)(bits << 16);
}

// fp32 to bf16 bits (in the low half of each lane), to nearest even; NaN stays NaN.
inline U bf16_round_bits(F v) {
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (U)(v == v ? (I)rounded : (I)((bits >> 16) | 0x40u));
}
inline F bf16_round(F v) { return (F)(bf16_round_bits(v) << 16); }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  // Shift exponent and mantissa into place and rescale by 2^112; infinity and NaN need a larger
  // step.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof(value));
  value *= 5.192296858534828e33f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((h & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000u;
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float element(const void* base, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(base)[i];
  const uint16_t bits = static_cast<const uint16_t*>(base)[i];
  if (dtype == DType::kF16) return half_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// n values to fp32, then zeros up to n_padded.
inline void load_row(const void* src, DType dtype, int64_t n, int64_t n_padded, float* dst) {
  int64_t i = 0;
  if (dtype == DType::kF32) {
    std::memcpy(dst, src, n * sizeof(float));
    i = n;
  } else if (dtype == DType::kBf16) {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    for (; i + kLanes <= n; i += kLanes) store(dst + i, bf16_lanes(p + i));
  }
  for (; i < n; ++i) dst[i] = element(src, dtype, i);
  for (; i < n_padded; ++i) dst[i] = 0.f;
}

inline void store_bf16(F v, uint16_t* dst) {
  const U bits = bf16_round_bits(v);
  for (int i = 0; i < kLanes; ++i) dst[i] = static_cast<uint16_t>(bits[i]);
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

// exp(x) to 2 ulp on [-87.3, 88]; clamped outside; NaN stays NaN. Range reduction to |r| <= ln2
// / 2.
inline F exp_lanes(F x) {
  x = min_lanes(max_lanes(x, splat(-87.3f)), splat(88.f));
  const F shifted = x * 1.44269504f + kRoundMagic;
  const F n = shifted - kRoundMagic;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts
  F p = r * (1.f / 5040.f) + (1.f / 720.f);
  p = p * r + (1.f / 120.f);
  p = p * r + (1.f / 24.f);
  p = p * r + (1.f / 6.f);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return p * (F)(((I)shifted - 0x4b400000 + 127) << 23);
}

inline F silu_mul(F gate, F up) { return gate / (1.f + exp_lanes(-gate)) * up; }

// 32 values to int8 codes with one scale; offset = -8 * sum of codes (the int4 zero point).
// A group with NaN or infinity gets a NaN scale: the NaN then reaches this row's results only.
// Magnitudes below 1e-30 count as zero, because 127 / amax must not overflow.
inline void quantize_group(const float* x, int8_t* q, float* scale, int32_t* offset) {
  const F a = load<F>(x), b = load<F>(x + kLanes);
  const I abs_a = (I)a & 0x7fffffff, abs_b = (I)b & 0x7fffffff;
  const I larger = abs_a > abs_b ? abs_a : abs_b;
  int32_t max_bits = 0;
  for (int i = 0; i < kLanes; ++i) max_bits = larger[i] > max_bits ? larger[i] : max_bits;
  float amax;
  std::memcpy(&amax, &max_bits, sizeof(amax));
  if (max_bits >= 0x7f800000 || amax < 1e-30f) {
    std::memset(q, 0, 2 * kLanes);
    *scale = max_bits >= 0x7f800000 ? __builtin_nanf("") : 0.f;
    *offset = 0;
    return;
  }
  const float inverse = 127.f / amax;
  const I qa = round_lanes(a * inverse), qb = round_lanes(b * inverse);
  const I pair_sum = qa + qb;
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) {
    q[i] = static_cast<int8_t>(qa[i]);
    q[kLanes + i] = static_cast<int8_t>(qb[i]);
    sum += pair_sum[i];
  }
  *scale = amax / 127.f;
  *offset = -8 * sum;
}

inline void quantize_row(const float* x, int64_t n_padded, int8_t* q, float* scale,
                         int32_t* offset) {
  for (int64_t g = 0; g < n_padded / kActGroup; ++g) {
    quantize_group(x + g * kActGroup, q + g * kActGroup, scale + g, offset + g);
  }
}

// ---- Packing. Lane r is row r of the panel; t[k] holds input k of all 16 rows. ----

// t[k][r] = src[r][k0 + k] for K inputs; zero outside the matrix. True if all values are finite.
template <int K>
inline bool load_columns(const void* src, DType dtype, int64_t row_stride, int rows, int64_t k0,
                         int64_t k, float (*t)[kLanes]) {
  const int valid = static_cast<int>(k - k0 < K ? k - k0 : K);
  if (rows < kLanes || valid < K) std::memset(t, 0, K * sizeof(t[0]));
  for (int r = 0; r < rows; ++r) {
    const int64_t start = r * row_stride + k0;
    if (dtype == DType::kBf16) {
      const uint16_t* p = static_cast<const uint16_t*>(src) + start;
      for (int i = 0; i < valid; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        std::memcpy(&t[i][r], &bits, sizeof(bits));
      }
    } else {
      for (int i = 0; i < valid; ++i) t[i][r] = element(src, dtype, start + i);
    }
  }
  I max_bits = {};
  for (int i = 0; i < K; ++i) {
    const I bits = load<I>(t[i]) & 0x7fffffff;
    max_bits = bits > max_bits ? bits : max_bits;
  }
  for (int r = 0; r < kLanes; ++r) {
    if (max_bits[r] >= 0x7f800000) return false;
  }
  return true;
}

// The value of largest magnitude in each lane, with its sign.
template <int K>
inline F extreme(const float (*t)[kLanes]) {
  F best = {}, magnitude = {};
  for (int i = 0; i < K; ++i) {
    const F v = load<F>(t[i]);
    const F a = v < 0.f ? -v : v;
    best = a > magnitude ? v : best;
    magnitude = a > magnitude ? a : magnitude;
  }
  return best;
}

inline F reciprocal_or_zero(F scale) {
  const F a = scale < 0.f ? -scale : scale;
  return a > 1e-37f ? 1.f / scale : F{};
}

inline I int4_codes(F v, F inverse) {
  return round_lanes(min_lanes(max_lanes(v * inverse, splat(-8.f)), splat(7.f)));
}

// The int4 scale of a group: codes run from -8 to 7, so the sign of the scale is chosen such that
// the extreme value is negative in code units, and it may lie at -8 (all 16 levels), at -7
// (symmetric) or beyond (clipped). A few positions are tried; the best is refined once by least
// squares. Relative error on Gaussian weights: 8.1 %; absmax / 7 gives 9.7 %, extreme / -8
// gives 8.6 %.
inline F int4_scale(const float (*t)[kLanes]) {
  constexpr float kDivisors[] = {7.f, 7.5f, 8.f, 8.5f, 9.f};
  const F ext = extreme<32>(t);
  F best_scale = {}, best_error = splat(__builtin_inff());
  const auto consider = [&](F scale) {
    const F inverse = reciprocal_or_zero(scale);
    F error = {}, dot = {}, norm = {};
    for (int i = 0; i < 32; ++i) {
      const F v = load<F>(t[i]);
      const F code = __builtin_convertvector(int4_codes(v, inverse), F);
      const F d = v - code * scale;
      error = error + d * d;
      dot = dot + code * v;
      norm = norm + code * code;
    }
    best_scale = error < best_error ? scale : best_scale;
    best_error = error < best_error ? error : best_error;
    return norm > 0.f ? dot / norm : F{};
  };
  F refined = {};
  for (const float divisor : kDivisors) {
    const F before = best_scale;
    const F fit = consider(bf16_round(ext / -divisor));
    refined = best_scale != before ? fit : refined;
  }
  consider(bf16_round(refined));
  return best_scale;
}

inline bool pack_int4(const void* src, DType dtype, int64_t row_stride, int rows, int64_t k,
                      uint8_t* dst, int64_t block_stride) {
  bool finite = true;
  float t[64][kLanes];
  for (int64_t k0 = 0; k0 < k; k0 += 64, dst += block_stride) {
    finite &= load_columns<64>(src, dtype, row_stride, rows, k0, k, t);
    const F scale0 = int4_scale(t), scale1 = int4_scale(t + 32);
    const F inverse0 = reciprocal_or_zero(scale0), inverse1 = reciprocal_or_zero(scale1);
    for (int v = 0; v < 8; ++v) {
      I word = {};
      for (int j = 0; j < 4; ++j) {
        const I low = int4_codes(load<F>(t[4 * v + j]), inverse0) + 8;
        const I high = int4_codes(load<F>(t[32 + 4 * v + j]), inverse1) + 8;
        word |= ((low & 15) | ((high & 15) << 4)) << (8 * j);
      }
      store(dst + 64 * v, word);
    }
    store(dst + 512, bf16_round_bits(scale0) | (bf16_round_bits(scale1) << 16));
  }
  return finite;
}

inline bool pack_int8(const void* src, DType dtype, int64_t row_stride, int rows, int64_t k,
                      uint8_t* dst, int64_t block_stride) {
  bool finite = true;
  float t[128][kLanes];
  for (int64_t k0 = 0; k0 < k; k0 += 128, dst += block_stride) {
    finite &= load_columns<128>(src, dtype, row_stride, rows, k0, k, t);
    const F ext = extreme<128>(t);
    const F scale = (ext < 0.f ? -ext : ext) / 127.f;
    const F inverse = reciprocal_or_zero(scale);
    for (int v = 0; v < 32; ++v) {
      I word = {};
      for (int j = 0; j < 4; ++j) {
        const F scaled = load<F>(t[4 * v + j]) * inverse;
        const I code = round_lanes(min_lanes(max_lanes(scaled, splat(-127.f)), splat(127.f)));
        word |= (code & 255) << (8 * j);
      }
      store(dst + 64 * v, word);
    }
    store(dst + 2048, scale);
  }
  return finite;
}

inline bool pack_bf16(const void* src, DType dtype, int64_t row_stride, int rows, int64_t k,
                      uint8_t* dst, int64_t block_stride) {
  float t[32][kLanes];
  for (int64_t k0 = 0; k0 < k; k0 += 32, dst += block_stride) {
    load_columns<32>(src, dtype, row_stride, rows, k0, k, t);
    for (int v = 0; v < 16; ++v) {
      const U even = bf16_round_bits(load<F>(t[2 * v])),
              odd = bf16_round_bits(load<F>(t[2 * v + 1]));
      store(dst + 64 * v, even | (odd << 16));
    }
  }
  return true;
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
