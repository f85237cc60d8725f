// Ceilings of AVX-512 F and VNNI.
#define MOEJET_ISA_NS avx512
#include <immintrin.h>

#include "ceilings-inl.h"

namespace moejet {
namespace avx512 {
namespace {

struct FmaF32 {
  using Operand = __m512;
  using Sum = __m512;
  static constexpr int kOperations = 2 * 16;
  static Operand load(const uint8_t* p) { return _mm512_load_ps(p); }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, Operand a, Operand b) { return _mm512_fmadd_ps(a, b, sum); }
  static void keep(Sum* sum) { __asm__ volatile("" : "+v"(*sum)); }
  static uint64_t fold(Sum sum) {
    const __m128i low = _mm_castps_si128(_mm512_castps512_ps128(sum));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(low));
  }
};

struct VnniInt8 {
  using Operand = __m512i;
  using Sum = __m512i;
  static constexpr int kOperations = 2 * 64;
  static Operand load(const uint8_t* p) { return _mm512_load_si512(p); }
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum sum, Operand a, Operand b) { return _mm512_dpbusd_epi32(sum, a, b); }
  static void keep(Sum* sum) { __asm__ volatile("" : "+v"(*sum)); }
  static uint64_t fold(Sum sum) {
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm512_castsi512_si128(sum)));
  }
};

}  // namespace

extern const CeilingKernels ceilings = {
    &read_memory,
    {arithmetic_loop<FmaF32, 12>("12 sums"), arithmetic_loop<FmaF32, 24>("24 sums")},
    {arithmetic_loop<VnniInt8, 12>("12 sums"), arithmetic_loop<VnniInt8, 24>("24 sums")},
    {kNoLoop, kNoLoop}};

}  // namespace avx512
}  // namespace moejet
