// Eight fp32 lanes of AVX2: see vec-inl.h for what a Vec offers.
#pragma once

#ifndef MOEJET_VEC_BITS
#error "include vec-inl.h"
#endif

#include <immintrin.h>

#include "../lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

struct Vec {
  using V = __m256;
  static constexpr int kWidth = 8;

  static V zero() { return _mm256_setzero_ps(); }
  static V broadcast(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V load_bf16(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  // An e4m3 code reads as fp16, moved to its exponent and mantissa: they are of the same form but
  // for the bias, numbers without exponent bits included.
  static constexpr float kE4m3Factor = 256.f;
  static V load_e4m3(const uint8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
    return _mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16(static_cast<int16_t>(0xbf80))));
  }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }  // b if one is NaN
  static void transpose16(const float* src, int64_t ld, float* dst) {
    transpose16_by_element(src, ld, dst);
  }
  static V select_greater(V a, V b, V yes, V no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  // 2^x for x <= 0, to 1e-7.
  static V exp2(V x) {
    x = _mm256_max_ps(broadcast(-126.f), x);  // keeps a NaN
    const V n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const V f = _mm256_sub_ps(x, n);
    V p = fma(f, broadcast(kExp2[5]), broadcast(kExp2[4]));
    for (int i = 3; i >= 0; --i) p = fma(p, f, broadcast(kExp2[i]));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
