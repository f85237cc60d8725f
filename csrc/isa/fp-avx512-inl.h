// Vector microkernels for AVX-512 of the formats that need no activation scales beside bf16: fp8
// and fp32 weights times fp32 activations.
//
// An e4m3 code seeeemmm becomes bf16 in two operations: widened to 16 bits with its sign and
// multiplied by 16, it has exponent and mantissa where bf16 has them; then the copies of the sign
// give way to exponent bits 4 to 6. These read the code as its value times 2^-8 (its bias is 7
// instead of 127), and the factor is made good once per block. Only codes without exponent bits
// come out wrong (2^-15 (1 + m / 8) for 2^-14 m / 8), and need four more operations for 16 weights;
// vectors that hold none are marked (Fp8BlockData).
#pragma once

#ifndef MOEJET_ISA_NS
#error "fp-avx512-inl.h belongs into a file of isa/"
#endif

#include "avx512-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

constexpr float kFp8Factor = 256.f;  // a decoded code is its value / kFp8Factor

constexpr int kAndThenOr = 0xea;  // of _mm512_ternarylogic: (a & b) | c

// The codes in the low or high bytes of 32 words, widened with their signs and multiplied by 16.
// Below the high ones remain four bits of the low ones.
inline __m512i fp8_low_words(__m512i codes) {
  return _mm512_maddubs_epi16(_mm512_set1_epi16(16), codes);
}
inline __m512i fp8_high_words(__m512i codes) { return _mm512_srai_epi16(codes, 4); }

inline __m512i fp8_to_bf16(__m512i words) {
  return _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(static_cast<int>(0x87f087f0)),
                                   _mm512_set1_epi32(0x38003800), kAndThenOr);
}

// Corrects the lanes of decoded codes without exponent bits.
inline __m512 fp8_correct_small(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 small = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x07800000));
  // 2^-14 (1 + m / 8) - 2^-14, both with the code's sign.
  const __m512 next =
      _mm512_castsi512_ps(_mm512_mask_add_epi32(bits, small, bits, _mm512_set1_epi32(0x00800000)));
  const __m512 one = _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(static_cast<int>(0x80000000)),
                                _mm512_set1_epi32(0x38800000), kAndThenOr));
  return _mm512_mask_sub_ps(next, small, next, one);
}

// As prefetch, but stays where it is: the compiler would gather those of an unrolled loop.
[[gnu::always_inline]] inline void prefetch_here(const uint8_t* line) {
  __asm__ volatile("prefetcht0 %0" : : "m"(line[kPrefetchBytes]));
}

// Inputs 4 v + J, J = 0..3, of 16 rows from vector v, as values / kFp8Factor.
template <bool kSmall>
struct Fp8Vectors {
  explicit Fp8Vectors(__m512i codes)
      : low(fp8_to_bf16(fp8_low_words(codes))), high(fp8_to_bf16(fp8_high_words(codes))) {}
  template <int J>
  __m512 get() const {
    const __m512i words = J < 2 ? low : high;
    const __m512 v = J % 2 == 0 ? low_halves(words) : high_halves(words);
    return kSmall ? fp8_correct_small(v) : v;
  }
  __m512i low, high;
};

struct Fp8 {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr int kMr = 6;  // 24 sums of 32 registers
  static constexpr int kManyRows = 0;

  // Eight vectors, 32 inputs. Four sums for each row: a single one would wait for the latency of
  // the multiply-adds.
  template <int MR, bool kSmall>
  [[gnu::always_inline]] static void add_group(const uint8_t* codes, const RowRefs& rows, int64_t k,
                                               __m512 (*sum)[4]) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      prefetch_here(codes + 64 * v);
      const Fp8Vectors<kSmall> w(load512(codes + 64 * v));
      const __m512 w0 = w.template get<0>(), w1 = w.template get<1>();
      const __m512 w2 = w.template get<2>(), w3 = w.template get<3>();
      for (int m = 0; m < MR; ++m) {
        const float* x = rows.f32[m] + k + 4 * v;
        sum[m][0] = _mm512_fmadd_ps(w0, _mm512_set1_ps(x[0]), sum[m][0]);
        sum[m][1] = _mm512_fmadd_ps(w1, _mm512_set1_ps(x[1]), sum[m][1]);
        sum[m][2] = _mm512_fmadd_ps(w2, _mm512_set1_ps(x[2]), sum[m][2]);
        sum[m][3] = _mm512_fmadd_ps(w3, _mm512_set1_ps(x[3]), sum[m][3]);
      }
    }
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 2; ++i)
        _mm512_storeu_ps(out + m * kPairCols + 16 * i, _mm512_setzero_ps());
    }
    for (int64_t b = 0; b < num_blocks; ++b) {
      for (int panel = 0; panel < 2; ++panel) {
        const Fp8Block<const uint8_t> block = fp8_block(pair + (2 * b + panel) * 2080);
        if (panel == 0) prefetch_here(block.data);
        Fp8BlockData data;
        std::memcpy(&data, block.data, sizeof(data));
        __m512 sum[MR][4];
        for (int m = 0; m < MR; ++m) {
          for (int j = 0; j < 4; ++j) sum[m][j] = _mm512_setzero_ps();
        }
        for (int group = 0; group < 4; ++group, data.small >>= 8) {
          reload_activations();
          const uint8_t* codes = block.codes + 512 * group;
          const int64_t k = 128 * b + 32 * group;
          if ((data.small & 255) == 0) {
            add_group<MR, false>(codes, rows, k, sum);
          } else {
            add_group<MR, true>(codes, rows, k, sum);
          }
        }
        const __m512 scale = _mm512_set1_ps(data.scale), factor = _mm512_set1_ps(kFp8Factor);
        for (int m = 0; m < MR; ++m) {
          float* to = out + m * kPairCols + 16 * panel;
          const __m512 in_block = _mm512_mul_ps(_mm512_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]),
                                                              _mm512_add_ps(sum[m][2], sum[m][3])),
                                                factor);
          _mm512_storeu_ps(to, _mm512_fmadd_ps(in_block, scale, _mm512_loadu_ps(to)));
        }
      }
    }
  }
};

struct Fp32 {
  static constexpr Format kFormat = Format::kFp32;
  static constexpr int kMr = 8;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    __m512 sum[MR][2];
    for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    const uint8_t* block = pair;
    for (int64_t b = 0; b < num_blocks; ++b) {
      // Panel after panel, in memory order: alternating between the two halves the rate from DRAM.
#pragma GCC unroll 2
      for (int panel = 0; panel < 2; ++panel, block += 2048) {
        reload_activations();
#pragma GCC unroll 8
        for (int v = 0; v < 32; ++v) {
          prefetch(block + 64 * v);
          const __m512 w = _mm512_load_ps(block + 64 * v);
          for (int m = 0; m < MR; ++m) {
            const __m512 x = _mm512_set1_ps(rows.f32[m][32 * b + v]);
            sum[m][panel] = _mm512_fmadd_ps(w, x, sum[m][panel]);
          }
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      _mm512_storeu_ps(out + m * kPairCols, sum[m][0]);
      _mm512_storeu_ps(out + m * kPairCols + 16, sum[m][1]);
    }
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
