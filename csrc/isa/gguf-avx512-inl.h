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

// Codes of the second group come multiplied by 1 << gguf_high_shift: high nibbles as they stand.
static constexpr int gguf_high_shift(Format format) {
  return format == Format::kQ4_0 || format == Format::kQ4K ? 4 : 0;
}

// The bits of a plane above the nibbles `codes`: kShift to the left of where they lie.
template <int kShift, int kBits>
inline __m512i gguf_join(__m512i plane, __m512i codes) {
  constexpr int kAndThenOr = 0xea;  // of _mm512_ternarylogic: (a & b) | c
  // What a rotation moves across bytes is masked.
  const __m512i moved = kShift == 0 ? plane : _mm512_rol_epi32(plane, kShift & 31);
  return _mm512_ternarylogic_epi32(moved, _mm512_set1_epi8(kBits), codes, kAndThenOr);
}

// Inputs 4 v .. 4 v + 3 of both groups of a chunk, as unsigned bytes. Memory is read in order.
template <Format kFormat, int kChunk>
[[gnu::always_inline]] inline void gguf_codes(const uint8_t* block, int v, __m512i* low,
                                              __m512i* high) {
  const uint8_t* line = block + gguf_codes_at(kFormat, kChunk, v);
  prefetch(line);
  const __m512i w = load512(line);
  if constexpr (kFormat == Format::kQ8_0) {
    const __m512i sign_bit = _mm512_set1_epi8(static_cast<char>(0x80));
    prefetch(line + 64);
    *low = _mm512_xor_si512(w, sign_bit);
    *high = _mm512_xor_si512(load512(line + 64), sign_bit);
    return;
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  *low = _mm512_and_si512(w, nibble);
  *high = gguf_high_shift(kFormat) == 4 ? _mm512_andnot_si512(nibble, w)
                                        : _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
  if constexpr (kFormat == Format::kQ5K) {
    const uint8_t* plane_line = block + gguf_plane_at(kFormat, kChunk, v);
    if (kChunk == 0) prefetch(plane_line);
    const __m512i plane = load512(plane_line);
    *low = gguf_join<4 - 2 * kChunk, 0x10>(plane, *low);
    *high = gguf_join<3 - 2 * kChunk, 0x10>(plane, *high);
  } else if constexpr (kFormat == Format::kQ6K) {
    const uint8_t* plane_line = block + gguf_plane_at(kFormat, kChunk, v);
    if (kChunk % 2 == 0) prefetch(plane_line);
    const __m512i plane = load512(plane_line);
    *low = gguf_join<4 - 2 * (kChunk % 2), 0x30>(plane, *low);
    *high = gguf_join<-2 * (kChunk % 2), 0x30>(plane, *high);
  }
}

// Adds the products of vectors [kBegin, kEnd) of a chunk whose groups begin at inputs k and k +
// 32 gguf_group_step.
template <Format kFormat, int kChunk, int MR, int kBegin, int kEnd>
[[gnu::always_inline]] inline void gguf_products(const uint8_t* block, const RowRefs& rows,
                                                 int64_t k, __m512i (*dot)[2]) {
#pragma GCC unroll 8
  for (int v = kBegin; v < kEnd; ++v) {
    __m512i low, high;
    gguf_codes<kFormat, kChunk>(block, v, &low, &high);
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
    constexpr int kHighShift = gguf_high_shift(kF);
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
        gguf_products<kF, 0, MR, 0, 8>(block, rows, 64 * b, dot);
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
class GgufScaleMins {
 public:
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
    scales_[0] = _mm512_and_si512(s, six);
    mins_[0] = _mm512_and_si512(m, six);
    scales_[1] = upper(both, s);
    mins_[1] = upper(_mm512_srli_epi16(both, 4), m);
  }
  // Of group g of each row.
  __m512 scale(int g) const { return gguf_byte(scales_[g / 4], g % 4); }
  __m512 min(int g) const { return gguf_byte(mins_[g / 4], g % 4); }

 private:
  __m512i scales_[2], mins_[2];
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

  // Adds chunks kChunk to 3 of a block that begins at input k.
  template <int MR, int kChunk>
  [[gnu::always_inline]] static void add_chunks(const uint8_t* block, const GgufScaleMins& packed,
                                                const RowRefs& rows, int64_t k, __m512 (*sum)[2]) {
    reload_activations();
    __m512i dot[MR][2];
    for (int m = 0; m < MR; ++m) dot[m][0] = dot[m][1] = _mm512_setzero_si512();
    gguf_products<kF, kChunk, MR, 0, 8>(block, rows, k + 64 * kChunk, dot);
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      const __m512 scale = packed.scale(2 * kChunk + side), min = packed.min(2 * kChunk + side);
      const int64_t group = k / 32 + 2 * kChunk + side;
      for (int m = 0; m < MR; ++m) {
        const __m512i products =
            side == 0 ? dot[m][0] : _mm512_srai_epi32(dot[m][1], gguf_high_shift(kF));
        const __m512i offset = _mm512_set1_epi32(rows.offset[m][group]);
        const __m512 x_scale = _mm512_set1_ps(rows.scale[m][group]);
        sum[m][0] =
            _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(products), scale), x_scale, sum[m][0]);
        sum[m][1] =
            _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(offset), min), x_scale, sum[m][1]);
      }
    }
    if constexpr (kChunk < 3) add_chunks<MR, kChunk + 1>(block, packed, rows, k, sum);
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    for (int m = 0; m < MR; ++m) std::memset(out + m * kPairCols, 0, kPairCols * sizeof(float));
    const uint8_t* block = pair;
    for (int64_t b = 0; b < 2 * num_blocks; ++b, block += block_shape(kF).bytes) {
      prefetch(block);
      const GgufScaleMins packed(block);
      __m512 sum[MR][2];
      for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
      add_chunks<MR, 0>(block, packed, rows, b / 2 * 256, sum);
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

  // Adds half kHalf of each of a chunk's groups, the first of which begins at input k. first,
  // second: the bytes 2 (kChunk % 2) and the next are the scales of the groups' halves.
  template <int MR, int kChunk, int kHalf>
  [[gnu::always_inline]] static void add_half(const uint8_t* block, __m512i first, __m512i second,
                                              const RowRefs& rows, int64_t k, __m512 (*both)[2]) {
    reload_activations();
    __m512i dot[MR][2];
    for (int m = 0; m < MR; ++m) {
      const int32_t* start = rows.half_offset[m] + k / 16 + kHalf;
      dot[m][0] = _mm512_set1_epi32(start[0]);
      dot[m][1] = _mm512_set1_epi32(start[2 * gguf_group_step(kFormat)]);
    }
    gguf_products<kFormat, kChunk, MR, 4 * kHalf, 4 * kHalf + 4>(block, rows, k, dot);
    constexpr int kByte = 2 * (kChunk % 2) + kHalf;
    const __m512 scale0 = gguf_signed_byte(first, kByte), scale1 = gguf_signed_byte(second, kByte);
    for (int m = 0; m < MR; ++m) {
      const __m512 sum0 = _mm512_cvtepi32_ps(dot[m][0]), sum1 = _mm512_cvtepi32_ps(dot[m][1]);
      if constexpr (kHalf == 0) {
        both[m][0] = _mm512_mul_ps(sum0, scale0);
        both[m][1] = _mm512_mul_ps(sum1, scale1);
      } else {
        both[m][0] = _mm512_fmadd_ps(sum0, scale0, both[m][0]);
        both[m][1] = _mm512_fmadd_ps(sum1, scale1, both[m][1]);
      }
    }
  }

  // Adds chunks kChunk to 3 of a block that begins at input k0.
  template <int MR, int kChunk>
  [[gnu::always_inline]] static void add_chunks(const uint8_t* block, const RowRefs& rows,
                                                int64_t k0, __m512* sum) {
    const uint8_t* scales = block + kGgufScalesAt + 128 * (kChunk / 2);
    const __m512i first = load512(scales), second = load512(scales + 64);
    const int64_t k = k0 + 32 * gguf_first_group(kFormat, kChunk);
    __m512 both[MR][2];
    add_half<MR, kChunk, 0>(block, first, second, rows, k, both);
    add_half<MR, kChunk, 1>(block, first, second, rows, k, both);
    for (int m = 0; m < MR; ++m) {
      const float* x_scale = rows.scale[m] + k / 32;
      sum[m] = _mm512_fmadd_ps(both[m][0], _mm512_set1_ps(x_scale[0]), sum[m]);
      sum[m] =
          _mm512_fmadd_ps(both[m][1], _mm512_set1_ps(x_scale[gguf_group_step(kFormat)]), sum[m]);
    }
    if constexpr (kChunk < 3) add_chunks<MR, kChunk + 1>(block, rows, k0, sum);
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
      add_chunks<MR, 0>(block, rows, b / 2 * 256, sum);
      const __m512 d = gguf_halves<kFormat>(block, 0);
      for (int m = 0; m < MR; ++m) gguf_add(out + m * kPairCols + b % 2 * kPanelRows, sum[m], d);
    }
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
