// Ceilings of AVX2 + FMA. 16 registers hold 12 sums and the operands, not more.
#define MOEJET_ISA_NS avx2
#include <immintrin.h>

#include "ceilings-inl.h"

namespace moejet {
namespace avx2 {
namespace {

struct FmaF32 {
  using Operand = __m256;
  using Sum = __m256;
  static constexpr int kOperations = 2 * 8;
  static Operand load(const uint8_t* p) {
    return _mm256_load_ps(reinterpret_cast<const float*>(p));
  }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum add(Sum sum, Operand a, Operand b) { return _mm256_fmadd_ps(a, b, sum); }
  static void keep(Sum* sum) { __asm__ volatile("" : "+x"(*sum)); }
  static uint64_t fold(Sum sum) {
    return static_cast<uint64_t>(_mm256_extract_epi64(_mm256_castps_si256(sum), 0));
  }
};

// vpmaddubsw and a 16-bit sum: the least work that AVX2 has for products of 8 bits.
struct MaddInt8 {
  using Operand = __m256i;
  using Sum = __m256i;
  static constexpr int kOperations = 2 * 32;
  static Operand load(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum add(Sum sum, Operand a, Operand b) {
    Sum products;  // as assembly, because the compiler would compute equal products once
    __asm__ volatile("vpmaddubsw %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
    return _mm256_add_epi16(sum, products);
  }
  static void keep(Sum* sum) { __asm__ volatile("" : "+x"(*sum)); }
  static uint64_t fold(Sum sum) { return static_cast<uint64_t>(_mm256_extract_epi64(sum, 0)); }
};

}  // namespace

extern const CeilingKernels ceilings = {
    &read_memory,
    {arithmetic_loop<FmaF32, 10>("10 sums"), arithmetic_loop<FmaF32, 12>("12 sums")},
    {arithmetic_loop<MaddInt8, 8>("8 sums"), kNoLoop},
    {kNoLoop, kNoLoop}};

}  // namespace avx2
}  // namespace moejet
