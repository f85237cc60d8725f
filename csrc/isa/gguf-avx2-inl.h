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

// Codes of eight rows of a chunk: half 0 or 1 of its panel.
template <Format kFormat>
struct GgufCodes {
  const uint8_t* block;
  int chunk, half;

  // Prefetches a line that the first half of the panel reads.
  [[gnu::always_inline]] __m256i line(int at, bool prefetching) const {
    if (half == 0 && prefetching) prefetch(block + at);
    return load256(block + at + 32 * half);
  }

  // Inputs 4 v .. 4 v + 3 of both groups; of q8_0 signed.
  [[gnu::always_inline]] void get(int v, __m256i* low, __m256i* high) const {
    const int at = gguf_codes_at(kFormat, chunk, v);
    const __m256i w = line(at, true);
    if constexpr (kFormat == Format::kQ8_0) {
      *low = w;
      *high = line(at + 64, true);
      return;
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    *low = _mm256_and_si256(w, nibble);
    *high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
    if constexpr (kFormat == Format::kQ5K || kFormat == Format::kQ6K) {
      constexpr bool kQ6 = kFormat == Format::kQ6K;
      const bool first = kQ6 ? chunk % 2 == 0 : chunk == 0;
      // The bits of the first group lie lowest then, those of the second next or two fields higher.
      const __m256i plane = _mm256_srl_epi16(line(gguf_plane_at(kFormat, chunk, v), first),
                                             _mm_cvtsi32_si128(kQ6 ? chunk % 2 * 2 : 2 * chunk));
      const __m256i bits = _mm256_set1_epi8(kQ6 ? 0x30 : 0x10);
      const __m256i second = kQ6 ? plane : _mm256_slli_epi16(plane, 3);
      *low = _mm256_or_si256(*low, _mm256_and_si256(_mm256_slli_epi16(plane, 4), bits));
      *high = _mm256_or_si256(*high, _mm256_and_si256(second, bits));
    }
  }
};

// Adds the products of vectors [begin, end) of a chunk whose groups begin at inputs k and k +
// 32 gguf_group_step.
template <Format kFormat, int MR>
[[gnu::always_inline]] inline void gguf_products(const GgufCodes<kFormat>& codes, int begin,
                                                 int end, const RowRefs& rows, int64_t k,
                                                 __m256i (*dot)[2]) {
  constexpr int kNarrow = gguf_narrow_vectors(kFormat);
  for (int v0 = begin; v0 < end; v0 += kNarrow) {
    __m256i narrow[MR][2];
    for (int m = 0; m < MR; ++m) narrow[m][0] = narrow[m][1] = _mm256_setzero_si256();
    for (int v = v0; v < v0 + kNarrow; ++v) {
      __m256i w[2];
      codes.get(v, &w[0], &w[1]);
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
template <Format kFormat>
inline __m256 gguf_halves(const uint8_t* block, int i, int half) {
  return _mm256_cvtph_ps(_mm_load_si128(
      reinterpret_cast<const __m128i*>(block + gguf_halves_at(kFormat) + 32 * i + 16 * half)));
}

// body(panel block, its number of inputs before, where its results go, half) for all blocks of a
// pair.
template <Format kFormat, class Body>
inline void for_half_blocks(const uint8_t* pair, int64_t num_blocks, float* out, const Body& body) {
  constexpr BlockShape kBlock = block_shape(kFormat);
  for (int64_t b = 0; b < 2 * num_blocks; ++b, pair += kBlock.bytes) {
    for (int half = 0; half < 2; ++half) {
      reload_activations();
      body(pair, b / 2 * kBlock.k, out + b % 2 * kPanelRows + 8 * half, half);
    }
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

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    for (int m = 0; m < MR; ++m) std::memset(out + m * kPairCols, 0, kPairCols * sizeof(float));
    for_half_blocks<kF>(
        pair, num_blocks, out, [&](const uint8_t* block, int64_t k, float* to, int half) {
          __m256i dot[MR][2];
          for (int m = 0; m < MR; ++m) {
            for (int side = 0; side < 2; ++side) {
              dot[m][side] =
                  _mm256_set1_epi32(kF == Format::kQ4_0 ? rows.offset[m][k / 32 + side] : 0);
            }
          }
          gguf_products<kF, MR>({block, 0, half}, 0, 8, rows, k, dot);
          if (half == 0) prefetch(block + gguf_halves_at(kF));
          for (int side = 0; side < 2; ++side) {
            const __m256 scale = gguf_halves<kF>(block, side, half);
            for (int m = 0; m < MR; ++m) {
              const __m256 x_scale = _mm256_set1_ps(rows.scale[m][k / 32 + side]);
              gguf_add(to + m * kPairCols, _mm256_cvtepi32_ps(dot[m][side]),
                       _mm256_mul_ps(scale, x_scale));
            }
          }
        });
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

// sc and m of q4_k and q5_k, four groups in a lane: of groups 0..3 and 4..7.
template <Format kF>
struct GgufScaleMins {
  explicit GgufScaleMins(const GgufCodes<kF>& codes) {
    const __m256i six = _mm256_set1_epi8(0x3f), four = _mm256_set1_epi8(0x0f);
    const __m256i top = _mm256_set1_epi8(0x30);
    const __m256i s = codes.line(kGgufScalesAt, true), m = codes.line(kGgufScalesAt + 64, true);
    const __m256i both = codes.line(kGgufScalesAt + 128, true);
    const auto upper = [&](__m256i low_bits, __m256i high_bits) {
      return _mm256_or_si256(_mm256_and_si256(low_bits, four),
                             _mm256_and_si256(_mm256_srli_epi16(high_bits, 2), top));
    };
    scale[0] = _mm256_and_si256(s, six);
    min[0] = _mm256_and_si256(m, six);
    scale[1] = upper(both, s);
    min[1] = upper(_mm256_srli_epi16(both, 4), m);
  }
  __m256i scale[2], min[2];
};

// q4_k and q5_k.
template <Format kF>
struct GgufMins {
  static constexpr Format kFormat = kF;
  static constexpr int kMr = kF == Format::kQ4K ? 4 : 3;
  static constexpr int kManyRows = 0;

  // scales, mins: bytes 0 and 1 belong to the chunk's groups.
  template <int MR>
  static void add_chunk(const GgufCodes<kF>& codes, __m256i scales, __m256i mins,
                        const RowRefs& rows, int64_t k, __m256 (*sum)[2]) {
    __m256i dot[MR][2];
    for (int m = 0; m < MR; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
    gguf_products<kF, MR>(codes, 0, 8, rows, k, dot);
    for (int side = 0; side < 2; ++side) {
      const __m256 scale = gguf_byte(scales, side), min = gguf_byte(mins, side);
      for (int m = 0; m < MR; ++m) {
        const __m256 products = _mm256_cvtepi32_ps(dot[m][side]);
        const __m256 offset = _mm256_cvtepi32_ps(_mm256_set1_epi32(rows.offset[m][k / 32 + side]));
        const __m256 x_scale = _mm256_set1_ps(rows.scale[m][k / 32 + side]);
        sum[m][0] = _mm256_fmadd_ps(_mm256_mul_ps(products, scale), x_scale, sum[m][0]);
        sum[m][1] = _mm256_fmadd_ps(_mm256_mul_ps(offset, min), x_scale, sum[m][1]);
      }
    }
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    for (int m = 0; m < MR; ++m) std::memset(out + m * kPairCols, 0, kPairCols * sizeof(float));
    for_half_blocks<kF>(
        pair, num_blocks, out, [&](const uint8_t* block, int64_t k, float* to, int half) {
          if (half == 0) prefetch(block);
          const GgufScaleMins<kF> packed({block, 0, half});
          __m256 sum[MR][2];
          for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
          __m256i scales = packed.scale[0], mins = packed.min[0];
          for (int c = 0; c < 4; ++c) {
            add_chunk<MR>({block, c, half}, scales, mins, rows, k + 64 * c, sum);
            scales = c == 1 ? packed.scale[1] : _mm256_srli_epi32(scales, 16);
            mins = c == 1 ? packed.min[1] : _mm256_srli_epi32(mins, 16);
          }
          // offset is -8 times the sum of activations.
          const __m256 d = gguf_halves<kF>(block, 0, half);
          const __m256 dmin =
              _mm256_mul_ps(gguf_halves<kF>(block, 1, half), _mm256_set1_ps(0.125f));
          for (int m = 0; m < MR; ++m) {
            gguf_add(to + m * kPairCols, sum[m][0], d);
            gguf_add(to + m * kPairCols, sum[m][1], dmin);
          }
        });
  }
};

// q6_k.
struct GgufQ6 {
  static constexpr Format kFormat = Format::kQ6K;
  static constexpr int kMr = 3;
  static constexpr int kManyRows = 0;

  template <int MR>
  static void add_chunk(const GgufCodes<kFormat>& codes, const RowRefs& rows, int64_t k,
                        __m256* sum) {
    __m256 both[MR][2];
    for (int m = 0; m < MR; ++m) both[m][0] = both[m][1] = _mm256_setzero_ps();
    __m256i scales[2];
    for (int side = 0; side < 2; ++side) {
      const int at = kGgufScalesAt + 128 * (codes.chunk / 2) + 64 * side;
      scales[side] = _mm256_srl_epi32(codes.line(at, codes.chunk % 2 == 0),
                                      _mm_cvtsi32_si128(16 * (codes.chunk % 2)));
    }
    for (int part = 0; part < 2; ++part) {
      __m256i dot[MR][2];
      for (int m = 0; m < MR; ++m) {
        const int32_t* start = rows.half_offset[m] + k / 16 + part;
        dot[m][0] = _mm256_set1_epi32(start[0]);
        dot[m][1] = _mm256_set1_epi32(start[2 * gguf_group_step(kFormat)]);
      }
      gguf_products<kFormat, MR>(codes, 4 * part, 4 * part + 4, rows, k, dot);
      for (int side = 0; side < 2; ++side) {
        const __m256 scale = gguf_signed_byte(scales[side], part);
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
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    for (int m = 0; m < MR; ++m) std::memset(out + m * kPairCols, 0, kPairCols * sizeof(float));
    for_half_blocks<kFormat>(
        pair, num_blocks, out, [&](const uint8_t* block, int64_t k, float* to, int half) {
          if (half == 0) prefetch(block);
          __m256 sum[MR];
          for (int m = 0; m < MR; ++m) sum[m] = _mm256_setzero_ps();
          for (int c = 0; c < 4; ++c) {
            add_chunk<MR>({block, c, half}, rows, k + 32 * gguf_first_group(kFormat, c), sum);
          }
          const __m256 d = gguf_halves<kFormat>(block, 0, half);
          for (int m = 0; m < MR; ++m) gguf_add(to + m * kPairCols, sum[m], d);
        });
  }
};
