// Attention's arithmetic on AVX512_BF16: vdpbf16ps adds two bf16 products to each fp32 lane.
#pragma once

#ifndef MOEJET_ISA_NS
#error "attention-vdpbf16-inl.h belongs into a file of isa/"
#endif

#include "attention-bf16-inl.h"
#include "attention-vectors-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

struct Bf16Dot : VectorProducts<Bf16Dot>, Bf16Elements {
  using Bf16Elements::Elem;
  using Operand = __m512i;
  static constexpr int kKeyBlock = 256, kKeyStep = 2, kMixPanels = 2;

  static Operand load(const Elem* p) { return _mm512_loadu_si512(p); }
  static Operand broadcast(Elem x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Vec::V add(Vec::V sum, Operand a, Operand b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  // Shuffles run beside the dot products: as fast as values interleaved in advance.
  template <int NP>
  static void load_values(const Elem* const* rows, int64_t column, Operand* dst) {
    const uint16_t* a = reinterpret_cast<const uint16_t*>(rows[0]) + column;
    const uint16_t* b = reinterpret_cast<const uint16_t*>(rows[1]) + column;
    if constexpr (NP == 2) {
      const __m512i va = _mm512_loadu_si512(a), vb = _mm512_loadu_si512(b);
      dst[0] = interleave_low(va, vb);
      dst[1] = interleave_high(va, vb);
    } else {
      dst[0] = interleave_low(
          _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
          _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b))));
    }
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
