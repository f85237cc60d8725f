// Sixteen fp32 lanes of AVX-512: see vec-inl.h for what a Vec offers.
#pragma once

#ifndef MOEJET_VEC_BITS
#error "include vec-inl.h"
#endif

#include <immintrin.h>

#include "../lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

struct Vec {
  using V = __m512;
  static constexpr int kWidth = 16;

  static V zero() { return _mm512_setzero_ps(); }
  static V broadcast(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V load_bf16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  // An e4m3 code reads as fp16, moved to its exponent and mantissa: they are of the same form but
  // for the bias, numbers without exponent bits included.
  static constexpr float kE4m3Factor = 256.f;
  static V load_e4m3(const uint8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    return _mm512_cvtph_ps(
        _mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
  }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b if one is NaN
  static V select_greater(V a, V b, V yes, V no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  // 2^x for x <= 0, to 1e-7.
  static V exp2(V x) {
    const V n = _mm512_roundscale_ps(x, 0);
    const V f = _mm512_sub_ps(x, n);
    V p = fma(f, broadcast(kExp2[5]), broadcast(kExp2[4]));
    for (int i = 3; i >= 0; --i) p = fma(p, f, broadcast(kExp2[i]));
    return _mm512_scalef_ps(p, n);
  }
  // The same to 8e-5, for results that are rounded to bf16.
  static V exp2_fast(V x) {
    const V n = _mm512_roundscale_ps(x, 0);
    const V f = _mm512_sub_ps(x, n);
    V p = fma(f, broadcast(0.05517167f), broadcast(0.24261113f));
    p = fma(p, f, broadcast(0.69326097f));
    p = fma(p, f, broadcast(0.99992806f));
    return _mm512_scalef_ps(p, n);
  }
  static void transpose16(const float* src, int64_t ld, float* dst) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * ld);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int j = 0; j < 2; ++j) {
        const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
        a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    }
    // a[4 g + c], 128-bit lane l: rows 4 g .. 4 g + 3 of column 4 l + c
    for (int c = 0; c < 4; ++c) {
      const __m512 x = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
      const __m512 y = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
      const __m512 z = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
      const __m512 w = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
      _mm512_storeu_ps(dst + 16 * c, _mm512_shuffle_f32x4(x, y, 0x88));
      _mm512_storeu_ps(dst + 16 * (8 + c), _mm512_shuffle_f32x4(x, y, 0xdd));
      _mm512_storeu_ps(dst + 16 * (4 + c), _mm512_shuffle_f32x4(z, w, 0x88));
      _mm512_storeu_ps(dst + 16 * (12 + c), _mm512_shuffle_f32x4(z, w, 0xdd));
    }
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
