// Ceiling of the AVX512_BF16 dot product, vdpbf16ps.
#define MOEJET_ISA_NS avx512_bf16
#include <immintrin.h>

#include "ceilings-inl.h"

namespace moejet {
namespace avx512_bf16 {
namespace {

struct DotBf16 {
  using Operand = __m512bh;
  using Sum = __m512;
  static constexpr int kOperations = 2 * 32;
  static Operand load(const uint8_t* p) { return (__m512bh)_mm512_load_si512(p); }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }
  static void keep(Sum* sum) { __asm__ volatile("" : "+v"(*sum)); }
  static uint64_t fold(Sum sum) {
    const __m128i low = _mm_castps_si128(_mm512_castps512_ps128(sum));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(low));
  }
};

}  // namespace

extern const CeilingKernels ceilings = {
    nullptr,
    {kNoLoop, kNoLoop},
    {kNoLoop, kNoLoop},
    {arithmetic_loop<DotBf16, 12>("12 sums"), arithmetic_loop<DotBf16, 24>("24 sums")}};

}  // namespace avx512_bf16
}  // namespace moejet
