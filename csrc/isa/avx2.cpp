// Kernels for AVX2 + FMA. 8-bit products come from vpmaddubsw (unsigned x signed, pairs summed to
// 16 bits with saturation), whose operands are kept so small that nothing saturates:
//   int4: codes 0..15 times -127..127; eight such pairs of products stay below 2^15, so a whole
//         group of 32 is summed in 16 bits and widened once;
//   int8: |w| <= 127 times x with w's sign, pairs of products below 2^15, widened at once.
#define MOEJET_ISA_NS avx2
#define MOEJET_VEC_BITS 256
#include <immintrin.h>

#include "../gguf_blocks.h"
#include "../moe-inl.h"
#include "attention-vectors-inl.h"
#include "ops-inl.h"

namespace moejet {
namespace avx2 {
namespace {

constexpr int64_t kPrefetchBytes = 2048;

// Called beside the load of the same line: a burst of prefetches would fill the line buffers.
// Always inlined, because GCC 12 drops calls of a function that does nothing else.
[[gnu::always_inline]] inline void prefetch(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
}
inline __m256i load256(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
inline __m256i broadcast_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  return _mm256_set1_epi32(quad);
}
inline __m256 high_halves(__m256i v) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline __m256 low_halves(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }

// All panel halves use the same activation quads: load them again rather than spill other
// registers.
inline void reload_activations() { __asm__ volatile("" : : : "memory"); }

struct Int4 {
  static constexpr Format kFormat = Format::kInt4G32;
  static constexpr int kMr = 4;
  static constexpr int kManyRows = 0;

  // Adds one group: 16-bit sums, their zero point, and both scales.
  static __m256 add_group(__m256 sum, __m256i sum16, int32_t offset, __m256 scale, float x_scale) {
    const __m256i dot =
        _mm256_add_epi32(_mm256_madd_epi16(sum16, _mm256_set1_epi16(1)), _mm256_set1_epi32(offset));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, _mm256_set1_ps(x_scale)),
                           sum);
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    __m256 sum[MR][4];
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 4; ++i) sum[m][i] = _mm256_setzero_ps();
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    const uint8_t* block = pair;
    for (int64_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 2
      for (int panel = 0; panel < 2; ++panel, block += 576) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          reload_activations();
          __m256i low[MR], high[MR];
          for (int m = 0; m < MR; ++m) low[m] = high[m] = _mm256_setzero_si256();
          for (int v = 0; v < 8; ++v) {
            if (half == 0) prefetch(block + 64 * v);
            const __m256i w = load256(block + 64 * v + 32 * half);
            const __m256i w_low = _mm256_and_si256(w, nibble);
            const __m256i w_high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
            for (int m = 0; m < MR; ++m) {
              const int8_t* x = rows.q[m] + 64 * b + 4 * v;
              low[m] = _mm256_add_epi16(low[m], _mm256_maddubs_epi16(w_low, broadcast_quad(x)));
              high[m] =
                  _mm256_add_epi16(high[m], _mm256_maddubs_epi16(w_high, broadcast_quad(x + 32)));
            }
          }
          if (half == 0) prefetch(block + 512);
          const __m256i scales = load256(block + 512 + 32 * half);
          for (int m = 0; m < MR; ++m) {
            __m256& s = sum[m][2 * panel + half];
            s = add_group(s, low[m], rows.offset[m][2 * b], low_halves(scales),
                          rows.scale[m][2 * b]);
            s = add_group(s, high[m], rows.offset[m][2 * b + 1], high_halves(scales),
                          rows.scale[m][2 * b + 1]);
          }
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + m * kPairCols + 8 * i, sum[m][i]);
    }
  }
};

struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kMr = 4;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    __m256 sum[MR][4];
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 4; ++i) sum[m][i] = _mm256_setzero_ps();
    }
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t* block = pair;
    for (int64_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 2
      for (int panel = 0; panel < 2; ++panel, block += 2112) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          reload_activations();
          __m256 in_block[MR];
          for (int m = 0; m < MR; ++m) in_block[m] = _mm256_setzero_ps();
          for (int group = 0; group < 4; ++group) {
            __m256i dot[MR];
            for (int m = 0; m < MR; ++m) dot[m] = _mm256_setzero_si256();
            for (int v = 8 * group; v < 8 * group + 8; ++v) {
              if (half == 0) prefetch(block + 64 * v);
              const __m256i w = load256(block + 64 * v + 32 * half);
              const __m256i magnitude = _mm256_abs_epi8(w);
              for (int m = 0; m < MR; ++m) {
                const __m256i x = _mm256_sign_epi8(broadcast_quad(rows.q[m] + 128 * b + 4 * v), w);
                dot[m] = _mm256_add_epi32(
                    dot[m], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones));
              }
            }
            for (int m = 0; m < MR; ++m) {
              in_block[m] =
                  _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m]),
                                  _mm256_set1_ps(rows.scale[m][4 * b + group]), in_block[m]);
            }
          }
          if (half == 0) prefetch(block + 2048);
          const __m256 scale =
              _mm256_load_ps(reinterpret_cast<const float*>(block + 2048) + 8 * half);
          for (int m = 0; m < MR; ++m) {
            __m256& s = sum[m][2 * panel + half];
            s = _mm256_fmadd_ps(in_block[m], scale, s);
          }
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + m * kPairCols + 8 * i, sum[m][i]);
    }
  }
};

struct Bf16 {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kMr = 3;  // 12 sums of 16 registers
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    __m256 sum[MR][4];
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 4; ++i) sum[m][i] = _mm256_setzero_ps();
    }
    const uint8_t* block = pair;
    for (int64_t b = 0; b < num_blocks; ++b) {
      // Panel after panel, in memory order: alternating between the two halves the rate from DRAM.
#pragma GCC unroll 2
      for (int panel = 0; panel < 2; ++panel, block += 1024) {
        reload_activations();
        for (int v = 0; v < 16; ++v) {
          prefetch(block + 64 * v);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const __m256i w = load256(block + 64 * v + 32 * half);
            const __m256 even = low_halves(w), odd = high_halves(w);
            for (int m = 0; m < MR; ++m) {
              const float* x = rows.f32[m] + 32 * b + 2 * v;
              __m256& s = sum[m][2 * panel + half];
              s = _mm256_fmadd_ps(even, _mm256_set1_ps(x[0]), s);
              s = _mm256_fmadd_ps(odd, _mm256_set1_ps(x[1]), s);
            }
          }
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + m * kPairCols + 8 * i, sum[m][i]);
    }
  }
};

#include "fp-avx2-inl.h"
#include "gguf-avx2-inl.h"

}  // namespace

extern const KernelTable table = {
    Isa::kAvx2,
    {format_kernels<Int4, NoTiles>(), format_kernels<Int8, NoTiles>(),
     format_kernels<Bf16, NoTiles>(), format_kernels<Fp8, NoTiles>(),
     format_kernels<Fp32, NoTiles>(), format_kernels<GgufPlain<Format::kQ4_0>, NoTiles>(),
     format_kernels<GgufPlain<Format::kQ8_0>, NoTiles>(),
     format_kernels<GgufMins<Format::kQ4K>, NoTiles>(),
     format_kernels<GgufMins<Format::kQ5K>, NoTiles>(), format_kernels<GgufQ6, NoTiles>()},
    op_kernels(),
    {attention_kernels<Fp32Dot>(), attention_kernels<Fp32Dot>()}};

}  // namespace avx2
}  // namespace moejet
