// bf16 elements of attention: two neighbours of the summed dimension in 32 bits. For bf16 caches.
#pragma once

#ifndef MOEJET_ISA_NS
#error "attention-bf16-inl.h belongs into a file of isa/"
#endif

#include "attention-inl.h"
#include "tiles512-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Word i of the low half of two rows of 32 words, then word i of the other.
inline __m512i interleaving() {
  alignas(64) static constexpr uint16_t kWords[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return load512(kWords);
}
inline __m512i interleave_low(__m512i a, __m512i b) {
  return _mm512_permutex2var_epi16(a, interleaving(), b);
}
inline __m512i interleave_high(__m512i a, __m512i b) {
  return _mm512_permutex2var_epi16(a, _mm512_add_epi16(interleaving(), _mm512_set1_epi16(16)), b);
}

struct Bf16Elements {
  using Elem = uint32_t;
  using Scalar = uint16_t;
  static constexpr int kPair = 2;

  static Vec::V exp2(Vec::V x) { return Vec::exp2_fast(x); }
  static void copy(const void* src, DType, int64_t n, uint16_t* dst) {
    std::memcpy(dst, src, n * sizeof(uint16_t));
  }
  static void pack_queries(const float* staging, int64_t ld, int64_t elements, Elem* dst) {
    alignas(64) float columns[16 * kQueryPanel];
    for (int64_t e = 0; e < elements; e += 8) {
      Vec::transpose16(staging + 2 * e, ld, columns);
      for (int64_t i = 0; i < 8; ++i) {
        store_weights(dst + (e + i) * kQueryPanel, Vec::load(columns + 32 * i),
                      Vec::load(columns + 32 * i + 16));
      }
    }
  }
  static void store_weights(Elem* dst, Vec::V even, Vec::V odd) {
    _mm512_storeu_si512(dst, bf16_pairs(even, odd));
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
