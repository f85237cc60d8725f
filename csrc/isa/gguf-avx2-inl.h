// Vector microkernels for AVX2 of GGUF's formats (gguf_blocks.h), as those for AVX-512. Products of
// unsigned codes are summed in 16 bits as long as they fit, then widened:
//   q4_0, q4_k: 8 vectors   15 * 127 * 2 * 8 < 2^15
//   q5_k:       4           31 * 127 * 2 * 4 < 2^15
//   q6_k:       2           63 * 127 * 2 * 2 < 2^15
//   q8_0:       1           |w| <= 128 times x with w's sign: 128 * 127 * 2 < 2^15
// Included by avx2.cpp.
#pragma once

#ifndef MOEJET_ISA_NS
#error "gguf-avx2-inl.h belongs into a file of isa/"
#endif

static constexpr int gguf_narrow_vectors(Format format) {
  return format == Format::kQ8_0 ? 1 : format == Format::kQ6K ? 2 : format == Format::kQ5K ? 4 : 8;
}

// Eight rows of a line: half 0 or 1 of the panel. The first half prefetches.
template <int kHalf>
[[gnu::always_inline]] inline __m256i gguf_line(const uint8_t* line, bool prefetching = true) {
  if (kHalf == 0 && prefetching) prefetch(line);
  return load256(line + 32 * kHalf);
}

// Inputs 4 v .. 4 v + 3 of both groups of a chunk, of eight rows; of q8_0 signed.
template <Format kFormat, int kChunk, int kHalf>
[[gnu::always_inline]] inline void gguf_codes(const uint8_t* block, int v, __m256i* low,
                                              __m256i* high) {
  const uint8_t* codes = block + gguf_codes_at(kFormat, kChunk, v);
  const __m256i w = gguf_line<kHalf>(codes);
  if constexpr (kFormat == Format::kQ8_0) {
    *low = w;
    *high = gguf_line<kHalf>(codes + 64);
    return;
  }
  const __m256i nibble = _mm256_set1_epi8(15);
  *low = _mm256_and_si256(w, nibble);
  *high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
  if constexpr (kFormat == Format::kQ5K || kFormat == Format::kQ6K) {
    constexpr bool kQ6 = kFormat == Format::kQ6K;
    constexpr int kPart = kQ6 ? kChunk % 2 : kChunk;  // that the plane's bits are for
    const __m256i plane = gguf_line<kHalf>(block + gguf_plane_at(kFormat, kChunk, v), kPart == 0);
    const __m256i bits = _mm256_set1_epi8(kQ6 ? 0x30 : 0x10);
    // How far to the left the bits of both groups go; what moves across bytes is masked.
    constexpr int kLeft = 4 - 2 * kPart, kSecondLeft = kLeft - (kQ6 ? 4 : 1);
    const auto moved = [&](int left) {
      const __m256i words =
          left >= 0 ? _mm256_slli_epi16(plane, left) : _mm256_srli_epi16(plane, -left);
      return _mm256_and_si256(words, bits);
    };
    *low = _mm256_or_si256(*low, moved(kLeft));
    *high = _mm256_or_si256(*high, moved(kSecondLeft));
  }
}

// Adds the products of vectors [begin, end) of a chunk whose groups begin at inputs k and k +
// 32 gguf_group_step.
template <Format kFormat, int kChunk, int kHalf, int MR>
[[gnu::always_inline]] inline void gguf_products(const uint8_t* block, int begin, int end,
                                                 const RowRefs& rows, int64_t k,
                                                 __m256i (*dot)[2]) {
  constexpr int kNarrow = gguf_narrow_vectors(kFormat);
  for (int v0 = begin; v0 < end; v0 += kNarrow) {
    __m256i narrow[MR][2];
    for (int m = 0; m < MR; ++m) narrow[m][0] = narrow[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int v = v0; v < v0 + kNarrow; ++v) {
      __m256i w[2];
      gguf_codes<kFormat, kChunk, kHalf>(block, v, &w[0], &w[1]);
      for (int m = 0; m < MR; ++m) {
        for (int side = 0; side < 2; ++side) {
          __m256i x = broadcast_quad(rows.q[m] + k + 32 * side * gguf_group_step(kFormat) + 4 * v);
          __m256i code = w[side];
          if constexpr (kFormat == Format::kQ8_0) {
            x = _mm256_sign_epi8(x, code);
            code = _mm256_abs_epi8(code);
          }
          narrow[m][side] = _mm256_add_epi16(narrow[m][side], _mm256_maddubs_epi16(code, x));
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      for (int side = 0; side < 2; ++side) {
        dot[m][side] = _mm256_add_epi32(dot[m][side],
                                        _mm256_madd_epi16(narrow[m][side], _mm256_set1_epi16(1)));
      }
    }
  }
}

// Eight fp16 values; i = 0, 1: the block's first or second.
template <Format kFormat, int kHalf>
inline __m256 gguf_halves(const uint8_t* block, int i) {
  return _mm256_cvtph_ps(_mm_load_si128(
      reinterpret_cast<const __m128i*>(block + gguf_halves_at(kFormat) + 32 * i + 16 * kHalf)));
}

// Mk::add_block<MR, kHalf>(panel block, rows, its first input, where its results go) for both
// halves of all blocks of a pair.
template <class Mk, int MR>
inline void gguf_tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
  constexpr BlockShape kBlock = block_shape(Mk::kFormat);
  for (int m = 0; m < MR; ++m) std::memset(out + m * kPairCols, 0, kPairCols * sizeof(float));
  for (int64_t b = 0; b < 2 * num_blocks; ++b, pair += kBlock.bytes) {
    float* to = out + b % 2 * kPanelRows;
    Mk::template add_block<MR, 0>(pair, rows, b / 2 * kBlock.k, to);
    Mk::template add_block<MR, 1>(pair, rows, b / 2 * kBlock.k, to + 8);
  }
}

inline void gguf_add(float* out, __m256 a, __m256 b) {
  _mm256_storeu_ps(out, _mm256_fmadd_ps(a, b, _mm256_loadu_ps(out)));
}

// q4_0 and q8_0.
template <Format kF>
struct GgufPlain {
  static constexpr Format kFormat = kF;
  static constexpr int kMr = kF == Format::kQ4_0 ? 4 : 3;
  static constexpr int kManyRows = 0;

  template <int MR, int kHalf>
  static void add_block(const uint8_t* block, const RowRefs& rows, int64_t k, float* out) {
    reload_activations();
    __m256i dot[MR][2];
    for (int m = 0; m < MR; ++m) {
      for (int side = 0; side < 2; ++side) {
        dot[m][side] = _mm256_set1_epi32(kF == Format::kQ4_0 ? rows.offset[m][k / 32 + side] : 0);
      }
    }
    gguf_products<kF, 0, kHalf, MR>(block, 0, 8, rows, k, dot);
    if (kHalf == 0) prefetch(block + gguf_halves_at(kF));
    const __m256 scales[2] = {gguf_halves<kF, kHalf>(block, 0), gguf_halves<kF, kHalf>(block, 1)};
    for (int m = 0; m < MR; ++m) {
      __m256 sum = _mm256_loadu_ps(out + m * kPairCols);
      for (int side = 0; side < 2; ++side) {
        const __m256 x_scale = _mm256_set1_ps(rows.scale[m][k / 32 + side]);
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m][side]),
                              _mm256_mul_ps(scales[side], x_scale), sum);
      }
      _mm256_storeu_ps(out + m * kPairCols, sum);
    }
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    gguf_tile<GgufPlain, MR>(pair, num_blocks, rows, out);
  }
};

// Byte i of each lane, as fp32.
inline __m256 gguf_byte(__m256i quads, int i) {
  return _mm256_cvtepi32_ps(
      _mm256_and_si256(_mm256_srli_epi32(quads, 8 * i), _mm256_set1_epi32(255)));
}
inline __m256 gguf_signed_byte(__m256i quads, int i) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 24 - 8 * i), 24));
}

// sc and m of eight rows of q4_k and q5_k.
template <int kHalf>
class GgufScaleMins {
 public:
  explicit GgufScaleMins(const uint8_t* block) {
    const __m256i six = _mm256_set1_epi8(0x3f), four = _mm256_set1_epi8(0x0f);
    const __m256i top = _mm256_set1_epi8(0x30);
    const __m256i s = gguf_line<kHalf>(block + kGgufScalesAt);
    const __m256i m = gguf_line<kHalf>(block + kGgufScalesAt + 64);
    const __m256i both = gguf_line<kHalf>(block + kGgufScalesAt + 128);
    const auto upper = [&](__m256i low_bits, __m256i high_bits) {
      return _mm256_or_si256(_mm256_and_si256(low_bits, four),
                             _mm256_and_si256(_mm256_srli_epi16(high_bits, 2), top));
    };
    scales_[0] = _mm256_and_si256(s, six);
    mins_[0] = _mm256_and_si256(m, six);
    scales_[1] = upper(both, s);
    mins_[1] = upper(_mm256_srli_epi16(both, 4), m);
  }
  // Of group g of each row.
  __m256 scale(int g) const { return gguf_byte(scales_[g / 4], g % 4); }
  __m256 min(int g) const { return gguf_byte(mins_[g / 4], g % 4); }

 private:
  __m256i scales_[2], mins_[2];
};

// q4_k and q5_k.
template <Format kF>
struct GgufMins {
  static constexpr Format kFormat = kF;
  static constexpr int kMr = kF == Format::kQ4K ? 4 : 3;
  static constexpr int kManyRows = 0;

  // Adds chunks kChunk to 3 of a block that begins at input k.
  template <int MR, int kHalf, int kChunk>
  [[gnu::always_inline]] static void add_chunks(const uint8_t* block,
                                                const GgufScaleMins<kHalf>& packed,
                                                const RowRefs& rows, int64_t k, __m256 (*sum)[2]) {
    reload_activations();
    __m256i dot[MR][2];
    for (int m = 0; m < MR; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
    gguf_products<kF, kChunk, kHalf, MR>(block, 0, 8, rows, k + 64 * kChunk, dot);
    for (int side = 0; side < 2; ++side) {
      const __m256 scale = packed.scale(2 * kChunk + side), min = packed.min(2 * kChunk + side);
      const int64_t group = k / 32 + 2 * kChunk + side;
      for (int m = 0; m < MR; ++m) {
        const __m256 products = _mm256_cvtepi32_ps(dot[m][side]);
        const __m256 offset = _mm256_cvtepi32_ps(_mm256_set1_epi32(rows.offset[m][group]));
        const __m256 x_scale = _mm256_set1_ps(rows.scale[m][group]);
        sum[m][0] = _mm256_fmadd_ps(_mm256_mul_ps(products, scale), x_scale, sum[m][0]);
        sum[m][1] = _mm256_fmadd_ps(_mm256_mul_ps(offset, min), x_scale, sum[m][1]);
      }
    }
    if constexpr (kChunk < 3) add_chunks<MR, kHalf, kChunk + 1>(block, packed, rows, k, sum);
  }

  template <int MR, int kHalf>
  static void add_block(const uint8_t* block, const RowRefs& rows, int64_t k, float* out) {
    if (kHalf == 0) prefetch(block);
    const GgufScaleMins<kHalf> packed(block);
    __m256 sum[MR][2];
    for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
    add_chunks<MR, kHalf, 0>(block, packed, rows, k, sum);
    // offset is -8 times the sum of activations.
    const __m256 d = gguf_halves<kF, kHalf>(block, 0);
    const __m256 dmin = _mm256_mul_ps(gguf_halves<kF, kHalf>(block, 1), _mm256_set1_ps(0.125f));
    for (int m = 0; m < MR; ++m) {
      gguf_add(out + m * kPairCols, sum[m][0], d);
      gguf_add(out + m * kPairCols, sum[m][1], dmin);
    }
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    gguf_tile<GgufMins, MR>(pair, num_blocks, rows, out);
  }
};

// q6_k.
struct GgufQ6 {
  static constexpr Format kFormat = Format::kQ6K;
  static constexpr int kMr = 3;
  static constexpr int kManyRows = 0;

  // Adds chunks kChunk to 3 of a block that begins at input k0.
  template <int MR, int kHalf, int kChunk>
  [[gnu::always_inline]] static void add_chunks(const uint8_t* block, const RowRefs& rows,
                                                int64_t k0, __m256* sum) {
    const uint8_t* scales = block + kGgufScalesAt + 128 * (kChunk / 2);
    const __m256i quads[2] = {gguf_line<kHalf>(scales, kChunk % 2 == 0),
                              gguf_line<kHalf>(scales + 64, kChunk % 2 == 0)};
    const int64_t k = k0 + 32 * gguf_first_group(kFormat, kChunk);
    __m256 both[MR][2];
    for (int m = 0; m < MR; ++m) both[m][0] = both[m][1] = _mm256_setzero_ps();
    for (int part = 0; part < 2; ++part) {  // 16 inputs of each group
      reload_activations();
      __m256i dot[MR][2];
      for (int m = 0; m < MR; ++m) {
        const int32_t* start = rows.half_offset[m] + k / 16 + part;
        dot[m][0] = _mm256_set1_epi32(start[0]);
        dot[m][1] = _mm256_set1_epi32(start[2 * gguf_group_step(kFormat)]);
      }
      gguf_products<kFormat, kChunk, kHalf, MR>(block, 4 * part, 4 * part + 4, rows, k, dot);
      for (int side = 0; side < 2; ++side) {
        const __m256 scale = gguf_signed_byte(quads[side], 2 * (kChunk % 2) + part);
        for (int m = 0; m < MR; ++m) {
          both[m][side] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m][side]), scale, both[m][side]);
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      const float* x_scale = rows.scale[m] + k / 32;
      sum[m] = _mm256_fmadd_ps(both[m][0], _mm256_set1_ps(x_scale[0]), sum[m]);
      sum[m] =
          _mm256_fmadd_ps(both[m][1], _mm256_set1_ps(x_scale[gguf_group_step(kFormat)]), sum[m]);
    }
    if constexpr (kChunk < 3) add_chunks<MR, kHalf, kChunk + 1>(block, rows, k0, sum);
  }

  template <int MR, int kHalf>
  static void add_block(const uint8_t* block, const RowRefs& rows, int64_t k, float* out) {
    if (kHalf == 0) prefetch(block);
    __m256 sum[MR];
    for (int m = 0; m < MR; ++m) sum[m] = _mm256_setzero_ps();
    add_chunks<MR, kHalf, 0>(block, rows, k, sum);
    const __m256 d = gguf_halves<kFormat, kHalf>(block, 0);
    for (int m = 0; m < MR; ++m) gguf_add(out + m * kPairCols, sum[m], d);
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    gguf_tile<GgufQ6, MR>(pair, num_blocks, rows, out);
  }
};
