// Decoding of fp8 rows of the latent cache (latent_layout.h): exact codes times their scale,
// rounded once.
#pragma once

#ifndef MOEJET_ISA_NS
#error "latent-fp8-inl.h belongs into a file of isa/"
#endif

#include "../latent_layout.h"
#include "vec-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// body(first code, end, factor) for each group of a row; a loaded code is its value / kE4m3Factor,
// which the factor makes good. NaN as one of its forms only: rounding its bits must not overflow.
template <class Body>
inline void for_latent_groups(const uint8_t* row, const LatentLayout& layout, int64_t rank,
                              const Body& body) {
  const uint8_t* scales = row + layout.scales;
  for (int64_t begin = 0; begin < rank; begin += kLatentGroup, scales += sizeof(float)) {
    float scale;
    std::memcpy(&scale, scales, sizeof(scale));
    body(begin, smaller(begin + kLatentGroup, rank),
         scale == scale ? scale * Vec::kE4m3Factor : __builtin_nanf(""));
  }
}

// c_kv of a row to fp32. Whole vectors of codes are read: they end within the row, which takes a
// multiple of 16 bytes.
inline void decode_latent(const uint8_t* row, const LatentLayout& layout, int64_t rank,
                          float* dst) {
  for_latent_groups(row, layout, rank, [&](int64_t begin, int64_t end, float factor) {
    const Vec::V scale = Vec::broadcast(factor);
    for (int64_t i = begin; i < end; i += Vec::kWidth) {
      store_part(dst + i, Vec::load_e4m3(row + i) * scale, end - i);
    }
  });
}

#if MOEJET_VEC_BITS == 512
// 32 values to bf16, to nearest even. NaN must not have all bits set.
inline __m512i bf16_even(__m512 low, __m512 high) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  const auto rounded = [](__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, half), 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(low)), rounded(high), 1);
#endif
}

// c_kv of a row to bf16.
inline void decode_latent(const uint8_t* row, const LatentLayout& layout, int64_t rank,
                          uint16_t* dst) {
  for_latent_groups(row, layout, rank, [&](int64_t begin, int64_t end, float factor) {
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t i = begin; i < end; i += 32) {
      const int64_t n = end - i;
      const __m512 low = _mm512_mul_ps(Vec::load_e4m3(row + i), scale);
      const __m512 high =
          n > 16 ? _mm512_mul_ps(Vec::load_e4m3(row + i + 16), scale) : _mm512_setzero_ps();
      const __mmask32 valid = n >= 32 ? 0xffffffffu : (1u << n) - 1;
      _mm512_mask_storeu_epi16(dst + i, valid, bf16_even(low, high));
    }
  });
}
#endif

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
