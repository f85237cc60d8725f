// Attention's arithmetic on AVX512_BF16: vdpbf16ps adds two bf16 products to each fp32 lane.
#pragma once

#ifndef MOEJET_ISA_NS
#error "attention-vdpbf16-inl.h belongs into a file of isa/"
#endif

#include "attention-bf16-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

struct Bf16Dot : Bf16Elements<Bf16Dot, 64, 2> {
  using Operand = __m512i;
  struct Scope {};
  static constexpr int kDimStep = 16, kGroup = 1;

  static Operand load(const Elem* p) { return _mm512_loadu_si512(p); }
  static Operand broadcast(Elem x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Vec::V add(Vec::V sum, Operand a, Operand b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static void finish_weights(Elem*, int, int) {}
  static void scores(Scope&, const Keys<Bf16Dot>& keys, const Elem* queries, int64_t elements,
                     int panels, AttentionWorker* worker) {
    vector_scores<Bf16Dot>(keys, queries, elements, panels, worker->scores);
  }
  static void mix(Scope&, const Keys<Bf16Dot>& keys, const float* decay, const Sums& sums,
                  AttentionWorker* worker) {
    vector_mix<Bf16Dot>(keys, static_cast<const Elem*>(worker->weights), decay, sums);
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
