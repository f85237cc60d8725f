// Vector microkernels for AVX-512 with VNNI of GGUF's formats (gguf_blocks.h).
//
// One loop serves all formats: the codes of a chunk become unsigned bytes of its two groups, whose
// products with int8 activations vpdpbusd sums. Zero points enter as start values, as in the
// integer formats; the minimum of q4_k and q5_k is a product with the sum of activations.
#pragma once

#ifndef MOEJET_ISA_NS
#error "gguf-avx512-inl.h belongs into a file of isa/"
#endif

#include "../gguf_blocks.h"
#include "avx512-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Sixteen fp16 values; i = 0, 1: the block's first or second.
template <Format kFormat>
inline __m512 gguf_halves(const uint8_t* block, int i) {
  return _mm512_cvtph_ps(_mm256_load_si256(
      reinterpret_cast<const __m256i*>(block + gguf_halves_at(kFormat) + 32 * i)));
}

// Codes of one chunk.
template <Format kFormat>
struct GgufCodes {
  // Codes of the second group come multiplied by 1 << kHighShift: high nibbles as they stand.
  static constexpr int kHighShift = kFormat == Format::kQ4_0 || kFormat == Format::kQ4K ? 4 : 0;

  GgufCodes(const uint8_t* block, int chunk) : block_(block), chunk_(chunk) {
    // Rotations that bring the planes' bits above the nibble.
    const int by = kFormat == Format::kQ6K ? 2 * (chunk % 2) : 2 * chunk;
    low_rotation_ = _mm512_set1_epi32(by - 4);
    high_rotation_ = _mm512_set1_epi32(kFormat == Format::kQ6K ? by : by - 3);
  }

  // Inputs 4 v .. 4 v + 3 of both groups. Memory is read in order.
  [[gnu::always_inline]] void get(int v, __m512i* low, __m512i* high) const {
    const uint8_t* line = block_ + gguf_codes_at(kFormat, chunk_, v);
    if constexpr (kFormat == Format::kQ8_0) {
      const __m512i sign_bit = _mm512_set1_epi8(static_cast<char>(0x80));
      prefetch(line);
      prefetch(line + 64);
      *low = _mm512_xor_si512(load512(line), sign_bit);
      *high = _mm512_xor_si512(load512(line + 64), sign_bit);
      return;
    }
    const __m512i nibble = _mm512_set1_epi8(15);
    prefetch(line);
    const __m512i w = load512(line);
    *low = _mm512_and_si512(w, nibble);
    if constexpr (kHighShift == 4) {
      *high = _mm512_andnot_si512(nibble, w);
      return;
    }
    *high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
    if constexpr (kFormat == Format::kQ5K || kFormat == Format::kQ6K) {
      const uint8_t* plane_line = block_ + gguf_plane_at(kFormat, chunk_, v);
      if (kFormat == Format::kQ6K ? chunk_ % 2 == 0 : chunk_ == 0) prefetch(plane_line);
      const __m512i plane = load512(plane_line);
      const __m512i bits = _mm512_set1_epi8(kFormat == Format::kQ5K ? 0x10 : 0x30);
      constexpr int kAndThenOr = 0xea;  // of _mm512_ternarylogic: (a & b) | c
      *low = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(plane, low_rotation_), bits, *low,
                                       kAndThenOr);
      *high = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(plane, high_rotation_), bits, *high,
                                        kAndThenOr);
    }
  }

 private:
  const uint8_t* block_;
  const int chunk_;
  __m512i low_rotation_, high_rotation_;
};

// Adds the products of vectors [kBegin, kEnd) of a chunk whose groups begin at inputs k and k +
// 32 gguf_group_step.
template <Format kFormat, int MR, int kBegin, int kEnd>
[[gnu::always_inline]] inline void gguf_products(const GgufCodes<kFormat>& codes,
                                                 const RowRefs& rows, int64_t k,
                                                 __m512i (*dot)[2]) {
#pragma GCC unroll 8
  for (int v = kBegin; v < kEnd; ++v) {
    __m512i low, high;
    codes.get(v, &low, &high);
    for (int m = 0; m < MR; ++m) {
      const int8_t* x = rows.q[m] + k + 4 * v;
      dot[m][0] = _mm512_dpbusd_epi32(dot[m][0], low, broadcast_quad(x));
      dot[m][1] =
          _mm512_dpbusd_epi32(dot[m][1], high, broadcast_quad(x + 32 * gguf_group_step(kFormat)));
    }
  }
}

// q4_0 and q8_0.
template <Format kF>
struct GgufPlain {
  static constexpr Format kFormat = kF;
  static constexpr int kMr = 6;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    constexpr int kHighShift = GgufCodes<kF>::kHighShift;
    // The start values are -8 or -128 sum(x).
    constexpr int kStartShift = kF == Format::kQ8_0 ? 4 : 0;
    __m512 sum[MR][2];
    for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    const uint8_t* block = pair;
    for (int64_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 2
      for (int panel = 0; panel < 2; ++panel, block += block_shape(kF).bytes) {
        reload_activations();
        __m512i dot[MR][2];
        for (int m = 0; m < MR; ++m) {
          const int32_t* offset = rows.offset[m] + 2 * b;
          dot[m][0] = _mm512_slli_epi32(_mm512_set1_epi32(offset[0]), kStartShift);
          dot[m][1] = _mm512_slli_epi32(_mm512_set1_epi32(offset[1]), kStartShift + kHighShift);
        }
        gguf_products<kF, MR, 0, 8>(GgufCodes<kF>(block, 0), rows, 64 * b, dot);
        prefetch(block + gguf_halves_at(kF));
        const __m512 scale0 = gguf_halves<kF>(block, 0), scale1 = gguf_halves<kF>(block, 1);
        for (int m = 0; m < MR; ++m) {
          const float* x_scale = rows.scale[m] + 2 * b;
          const __m512i second = _mm512_srai_epi32(dot[m][1], kHighShift);
          sum[m][panel] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][0]),
                              _mm512_mul_ps(scale0, _mm512_set1_ps(x_scale[0])), sum[m][panel]);
          sum[m][panel] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(second),
                              _mm512_mul_ps(scale1, _mm512_set1_ps(x_scale[1])), sum[m][panel]);
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      _mm512_storeu_ps(out + m * kPairCols, sum[m][0]);
      _mm512_storeu_ps(out + m * kPairCols + 16, sum[m][1]);
    }
  }
};

// Four unsigned or signed bytes of a lane at a time, as fp32.
inline __m512 gguf_byte(__m512i quads, int i) {
  return _mm512_cvtepi32_ps(
      _mm512_and_si512(_mm512_srli_epi32(quads, 8 * i), _mm512_set1_epi32(255)));
}
inline __m512 gguf_signed_byte(__m512i quads, int i) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quads, 24 - 8 * i), 24));
}

// sc and m of q4_k and q5_k, four groups in a lane: of groups 0..3 and 4..7.
struct GgufScaleMins {
  explicit GgufScaleMins(const uint8_t* block) {
    const __m512i six = _mm512_set1_epi8(0x3f), four = _mm512_set1_epi8(0x0f);
    const __m512i top = _mm512_set1_epi8(0x30);
    const auto line = [&](int i) {
      prefetch(block + kGgufScalesAt + 64 * i);
      return load512(block + kGgufScalesAt + 64 * i);
    };
    const __m512i s = line(0), m = line(1), both = line(2);
    const auto upper = [&](__m512i low_bits, __m512i high_bits) {
      return _mm512_or_si512(_mm512_and_si512(low_bits, four),
                             _mm512_and_si512(_mm512_srli_epi16(high_bits, 2), top));
    };
    scale[0] = _mm512_and_si512(s, six);
    min[0] = _mm512_and_si512(m, six);
    scale[1] = upper(both, s);
    min[1] = upper(_mm512_srli_epi16(both, 4), m);
  }
  __m512i scale[2], min[2];
};

// Adds to 16 results of a row.
inline void gguf_add(float* out, __m512 a, __m512 b) {
  _mm512_storeu_ps(out, _mm512_fmadd_ps(a, b, _mm512_loadu_ps(out)));
}

// q4_k and q5_k.
template <Format kF>
struct GgufMins {
  static constexpr Format kFormat = kF;
  static constexpr int kMr = 6;
  static constexpr int kManyRows = 0;

  // scales, mins: bytes 0 and 1 belong to the chunk's groups.
  template <int MR>
  [[gnu::always_inline]] static void add_chunk(const GgufCodes<kF>& codes, __m512i scales,
                                               __m512i mins, const RowRefs& rows, int64_t k,
                                               __m512 (*sum)[2]) {
    reload_activations();
    __m512i dot[MR][2];
    for (int m = 0; m < MR; ++m) dot[m][0] = dot[m][1] = _mm512_setzero_si512();
    gguf_products<kF, MR, 0, 8>(codes, rows, k, dot);
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      const __m512 scale = gguf_byte(scales, side), min = gguf_byte(mins, side);
      for (int m = 0; m < MR; ++m) {
        const __m512i products =
            side == 0 ? dot[m][0] : _mm512_srai_epi32(dot[m][1], GgufCodes<kF>::kHighShift);
        const __m512i offset = _mm512_set1_epi32(rows.offset[m][k / 32 + side]);
        const __m512 x_scale = _mm512_set1_ps(rows.scale[m][k / 32 + side]);
        sum[m][0] =
            _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(products), scale), x_scale, sum[m][0]);
        sum[m][1] =
            _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(offset), min), x_scale, sum[m][1]);
      }
    }
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    for (int m = 0; m < MR; ++m) std::memset(out + m * kPairCols, 0, kPairCols * sizeof(float));
    const uint8_t* block = pair;
    for (int64_t b = 0; b < 2 * num_blocks; ++b, block += block_shape(kF).bytes) {
      prefetch(block);
      const GgufScaleMins packed(block);
      __m512i scales = packed.scale[0], mins = packed.min[0];
      __m512 sum[MR][2];
      for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
      for (int c = 0; c < 4; ++c) {
        add_chunk<MR>(GgufCodes<kF>(block, c), scales, mins, rows, b / 2 * 256 + 64 * c, sum);
        scales = c == 1 ? packed.scale[1] : _mm512_srli_epi32(scales, 16);
        mins = c == 1 ? packed.min[1] : _mm512_srli_epi32(mins, 16);
      }
      // offset is -8 times the sum of activations.
      const __m512 d = gguf_halves<kF>(block, 0);
      const __m512 dmin = _mm512_mul_ps(gguf_halves<kF>(block, 1), _mm512_set1_ps(0.125f));
      for (int m = 0; m < MR; ++m) {
        float* to = out + m * kPairCols + b % 2 * kPanelRows;
        gguf_add(to, sum[m][0], d);
        gguf_add(to, sum[m][1], dmin);
      }
    }
  }
};

// q6_k.
struct GgufQ6 {
  static constexpr Format kFormat = Format::kQ6K;
  static constexpr int kMr = 6;
  static constexpr int kManyRows = 0;

  // Adds the halves kHalf of a chunk's groups. first, second: bytes 0 and 1 are the scales of the
  // two groups' halves.
  template <int MR, int kHalf>
  [[gnu::always_inline]] static void add_half(const GgufCodes<kFormat>& codes, __m512i first,
                                              __m512i second, const RowRefs& rows, int64_t k,
                                              __m512 (*both)[2]) {
    reload_activations();
    __m512i dot[MR][2];
    for (int m = 0; m < MR; ++m) {
      const int32_t* start = rows.half_offset[m] + k / 16 + kHalf;
      dot[m][0] = _mm512_set1_epi32(start[0]);
      dot[m][1] = _mm512_set1_epi32(start[2 * gguf_group_step(kFormat)]);
    }
    gguf_products<kFormat, MR, 4 * kHalf, 4 * kHalf + 4>(codes, rows, k, dot);
    const __m512 scale0 = gguf_signed_byte(first, kHalf), scale1 = gguf_signed_byte(second, kHalf);
    for (int m = 0; m < MR; ++m) {
      both[m][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][0]), scale0, both[m][0]);
      both[m][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][1]), scale1, both[m][1]);
    }
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    for (int m = 0; m < MR; ++m) std::memset(out + m * kPairCols, 0, kPairCols * sizeof(float));
    const uint8_t* block = pair;
    for (int64_t b = 0; b < 2 * num_blocks; ++b, block += block_shape(kFormat).bytes) {
      prefetch(block);
      for (int i = 0; i < 4; ++i) prefetch(block + kGgufScalesAt + 64 * i);
      __m512 sum[MR];
      for (int m = 0; m < MR; ++m) sum[m] = _mm512_setzero_ps();
      for (int c = 0; c < 4; ++c) {
        const uint8_t* scales = block + kGgufScalesAt + 128 * (c / 2);
        const __m512i by = _mm512_set1_epi32(16 * (c % 2));
        const __m512i first = _mm512_srlv_epi32(load512(scales), by);
        const __m512i second = _mm512_srlv_epi32(load512(scales + 64), by);
        const int64_t k = b / 2 * 256 + 32 * gguf_first_group(kFormat, c);
        const GgufCodes<kFormat> codes(block, c);
        __m512 both[MR][2];
        for (int m = 0; m < MR; ++m) both[m][0] = both[m][1] = _mm512_setzero_ps();
        add_half<MR, 0>(codes, first, second, rows, k, both);
        add_half<MR, 1>(codes, first, second, rows, k, both);
        for (int m = 0; m < MR; ++m) {
          const float* x_scale = rows.scale[m] + k / 32;
          sum[m] = _mm512_fmadd_ps(both[m][0], _mm512_set1_ps(x_scale[0]), sum[m]);
          sum[m] = _mm512_fmadd_ps(both[m][1], _mm512_set1_ps(x_scale[gguf_group_step(kFormat)]),
                                   sum[m]);
        }
      }
      const __m512 d = gguf_halves<kFormat>(block, 0);
      for (int m = 0; m < MR; ++m) gguf_add(out + m * kPairCols + b % 2 * kPanelRows, sum[m], d);
    }
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
