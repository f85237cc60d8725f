// Four fp32 lanes in plain C++ (vector extensions): see vec-inl.h for what a Vec offers.
#pragma once

#ifndef MOEJET_VEC_BITS
#error "include vec-inl.h"
#endif

#include "../lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

struct Vec {
  using V = float __attribute__((vector_size(16)));
  using Bits = int32_t __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;

  static V zero() { return V{}; }
  static V broadcast(float x) { return V{} + x; }
  static V load(const float* p) { return moejet::MOEJET_ISA_NS::load<V>(p); }
  static void store(float* p, V v) { moejet::MOEJET_ISA_NS::store(p, v); }
  static V load_bf16(const uint16_t* p) { return (V)(Bits{p[0], p[1], p[2], p[3]} << 16); }
  static constexpr float kE4m3Factor = 1.f;
  static V load_e4m3(const uint8_t* p) {
    const Bits codes = {p[0], p[1], p[2], p[3]};
    const Bits magnitude = codes & 0x7f;
    // Without exponent bits m is m 2^-9; with them, exponent and mantissa are those of fp32, up to
    // the bias.
    const V small = __builtin_convertvector(magnitude, V) * 0x1p-9f;
    const V value = magnitude < 8 ? small : (V)((magnitude << 20) + (120 << 23));
    return (V)((Bits)value | ((codes & 0x80) << 24));
  }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }
  static void transpose16(const float* src, int64_t ld, float* dst) {
    transpose16_by_element(src, ld, dst);
  }
  static V select_greater(V a, V b, V yes, V no) { return a > b ? yes : no; }
  // 2^x for x <= 0, to 1e-7.
  static V exp2(V x) {
    const V low = broadcast(-126.f);
    x = x < low ? low : x;  // keeps a NaN
    const V shifted = x + kRoundMagic;
    const V f = x - (shifted - kRoundMagic);
    V p = f * kExp2[5] + kExp2[4];
    for (int i = 3; i >= 0; --i) p = p * f + kExp2[i];
    return p * (V)(((Bits)shifted - 0x4b400000 + 127) << 23);
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
