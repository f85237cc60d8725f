// Vector microkernels for AVX-512 with VNNI; included by avx512.cpp and, for experts with few rows,
// by the tile sources.
//
// vpdpbusd multiplies unsigned by signed bytes and sums four products per 32-bit lane:
//   int4: codes 0..15 are unsigned already; the zero point enters as the sum's start value -8
//   sum(x).
//         High nibbles stay where they are: their sums are 16 times too large, exactly, until one
//         arithmetic shift per group.
//   int8: flipping the sign bit makes w + 128; the start value is -128 sum(x) = 16 * offset.
#pragma once

#ifndef MOEJET_ISA_NS
#error "avx512-inl.h belongs into a file of isa/"
#endif

#include <immintrin.h>

#include "../moe-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Two panels ahead in int4: enough to cover DRAM latency, short enough to stay in L1.
constexpr int64_t kPrefetchBytes = 2304;

// Called beside the load of the same line: a burst of prefetches would fill the line buffers.
// Always inlined, because GCC 12 drops calls of a function that does nothing else.
[[gnu::always_inline]] inline void prefetch(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
}
inline __m512i load512(const void* p) { return _mm512_load_si512(p); }
inline __m512i broadcast_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  return _mm512_set1_epi32(quad);
}
inline __m512 high_halves(__m512i v) {
  return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline __m512 low_halves(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }

// Both panels use the same activation quads. Loading them again is free (they are operands in
// memory); keeping all of them in registers, as the compiler would, spills everything else.
inline void reload_activations() { __asm__ volatile("" : : : "memory"); }

struct Int4 {
  static constexpr Format kFormat = Format::kInt4G32;
  static constexpr int kMr = 6;  // 12 integer + 12 float sums of 32 registers
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    __m512 sum[MR][2];
    for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    const __m512i low_mask = _mm512_set1_epi8(0x0f);
    const uint8_t* block = pair;
    for (int64_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 2
      for (int panel = 0; panel < 2; ++panel, block += 576) {
        reload_activations();
        __m512i low[MR], high[MR];
        for (int m = 0; m < MR; ++m) {
          low[m] = _mm512_set1_epi32(rows.offset[m][2 * b]);
          high[m] = _mm512_slli_epi32(_mm512_set1_epi32(rows.offset[m][2 * b + 1]), 4);
        }
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
          prefetch(block + 64 * v);
          const __m512i w = load512(block + 64 * v);
          const __m512i w_low = _mm512_and_si512(w, low_mask);
          const __m512i w_high = _mm512_andnot_si512(low_mask, w);
          for (int m = 0; m < MR; ++m) {
            const int8_t* x = rows.q[m] + 64 * b + 4 * v;
            low[m] = _mm512_dpbusd_epi32(low[m], w_low, broadcast_quad(x));
            high[m] = _mm512_dpbusd_epi32(high[m], w_high, broadcast_quad(x + 32));
          }
        }
        prefetch(block + 512);
        const __m512i scales = load512(block + 512);
        const __m512 scale_low = low_halves(scales), scale_high = high_halves(scales);
        for (int m = 0; m < MR; ++m) {
          const float* x_scale = rows.scale[m] + 2 * b;
          sum[m][panel] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[m]),
                              _mm512_mul_ps(scale_low, _mm512_set1_ps(x_scale[0])), sum[m][panel]);
          sum[m][panel] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(high[m], 4)),
                              _mm512_mul_ps(scale_high, _mm512_set1_ps(x_scale[1])), sum[m][panel]);
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      _mm512_storeu_ps(out + m * kPairCols, sum[m][0]);
      _mm512_storeu_ps(out + m * kPairCols + 16, sum[m][1]);
    }
  }
};

struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kMr = 6;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    __m512 sum[MR][2];
    for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    const __m512i sign_bit = _mm512_set1_epi8(static_cast<char>(0x80));
    const uint8_t* block = pair;
    for (int64_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 2
      for (int panel = 0; panel < 2; ++panel, block += 2112) {
        reload_activations();
        __m512 in_block[MR];
        for (int m = 0; m < MR; ++m) in_block[m] = _mm512_setzero_ps();
        for (int group = 0; group < 4; ++group) {
          __m512i dot[MR];
          for (int m = 0; m < MR; ++m) {
            dot[m] = _mm512_slli_epi32(_mm512_set1_epi32(rows.offset[m][4 * b + group]), 4);
          }
#pragma GCC unroll 8
          for (int v = 0; v < 8; ++v) {
            const uint8_t* line = block + 64 * (8 * group + v);
            prefetch(line);
            const __m512i w = _mm512_xor_si512(load512(line), sign_bit);
            for (int m = 0; m < MR; ++m) {
              const int8_t* x = rows.q[m] + 128 * b + 32 * group + 4 * v;
              dot[m] = _mm512_dpbusd_epi32(dot[m], w, broadcast_quad(x));
            }
          }
          for (int m = 0; m < MR; ++m) {
            in_block[m] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m]),
                                _mm512_set1_ps(rows.scale[m][4 * b + group]), in_block[m]);
          }
        }
        prefetch(block + 2048);
        const __m512 scale = _mm512_load_ps(block + 2048);
        for (int m = 0; m < MR; ++m) {
          sum[m][panel] = _mm512_fmadd_ps(in_block[m], scale, sum[m][panel]);
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      _mm512_storeu_ps(out + m * kPairCols, sum[m][0]);
      _mm512_storeu_ps(out + m * kPairCols + 16, sum[m][1]);
    }
  }
};

struct Bf16 {
  static constexpr Format kFormat = Format::kBf16;
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
      for (int panel = 0; panel < 2; ++panel, block += 1024) {
        reload_activations();
#pragma GCC unroll 4
        for (int v = 0; v < 16; ++v) {
          prefetch(block + 64 * v);
          const __m512i w = load512(block + 64 * v);
          const __m512 even = low_halves(w), odd = high_halves(w);
          for (int m = 0; m < MR; ++m) {
            const float* x = rows.f32[m] + 32 * b + 2 * v;
            sum[m][panel] = _mm512_fmadd_ps(even, _mm512_set1_ps(x[0]), sum[m][panel]);
            sum[m][panel] = _mm512_fmadd_ps(odd, _mm512_set1_ps(x[1]), sum[m][panel]);
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
