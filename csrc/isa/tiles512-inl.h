// Tile microkernels: unpacking of integer weights to bf16 B tiles with AVX-512, for real and
// emulated tiles. The dequantised weight (u4 - 8) scale has up to 12 significant bits and is
// rounded to bf16.
#pragma once

#ifndef MOEJET_ISA_NS
#error "tiles512-inl.h belongs into a file of isa/"
#endif

#include "avx512-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Two fp32 vectors to one vector of bf16 pairs: a in the low halves, b in the high ones. Rounds to
// nearest, ties away from zero.
inline __m512i bf16_pairs(__m512 a, __m512 b) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i ai = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a), half), 16);
  const __m512i bi = _mm512_add_epi32(_mm512_castps_si512(b), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, ai, bi);
}

template <class TilesT>
struct Int4Tiles {
  using Tiles = TilesT;
  static constexpr Format kFormat = Format::kInt4G32;
  static constexpr int kMinRows = Tiles::min_rows(kFormat);

  // One panel block (64 k): B tile of k 0..31 to low, of k 32..63 to high. Lane r of a vector holds
  // eight codes of row r, so its scale is one lane of the scale vector and nothing is shuffled.
  static void unpack(const uint8_t* block, uint16_t* low, uint16_t* high) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    prefetch(block + 512);
    const __m512i scales = load512(block + 512);
    const __m512 scale_low = low_halves(scales), scale_high = high_halves(scales);
    for (int v = 0; v < 8; ++v) {
      prefetch(block + 64 * v);
      const __m512i w = load512(block + 64 * v);
      // vpermps looks at the low four bits of each lane only.
      const auto code = [&](int shift, __m512 scale) {
        return _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, shift), values), scale);
      };
      _mm512_store_si512(low + 64 * v, bf16_pairs(code(0, scale_low), code(8, scale_low)));
      _mm512_store_si512(low + 64 * v + 32, bf16_pairs(code(16, scale_low), code(24, scale_low)));
      _mm512_store_si512(high + 64 * v, bf16_pairs(code(4, scale_high), code(12, scale_high)));
      _mm512_store_si512(high + 64 * v + 32,
                         bf16_pairs(code(20, scale_high), code(28, scale_high)));
    }
  }

  // B tiles of num_blocks blocks of both panels: [k tile][panel][16][32].
  static const uint16_t* b_tiles(const uint8_t* pair, int64_t num_blocks, uint16_t* unpacked) {
    uint16_t* out = unpacked;
    for (int64_t b = 0; b < num_blocks; ++b, out += 4 * kTileWords) {
      for (int panel = 0; panel < 2; ++panel, pair += 576) {
        unpack(pair, out + panel * kTileWords, out + (2 + panel) * kTileWords);
      }
    }
    return unpacked;
  }
};

template <class TilesT>
struct Int8Tiles {
  using Tiles = TilesT;
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kMinRows = Tiles::min_rows(kFormat);

  static const uint16_t* b_tiles(const uint8_t* pair, int64_t num_blocks, uint16_t* unpacked) {
    uint16_t* out = unpacked;
    for (int64_t b = 0; b < num_blocks; ++b, out += 8 * kTileWords) {
      for (int panel = 0; panel < 2; ++panel, pair += 2112) {
        prefetch(pair + 2048);
        const __m512 scale = _mm512_load_ps(pair + 2048);
        for (int v = 0; v < 32; ++v) {
          prefetch(pair + 64 * v);
          const __m512i w = load512(pair + 64 * v);
          const auto code = [&](int shift) {
            const __m512i sign_extended = _mm512_srai_epi32(_mm512_slli_epi32(w, 24 - shift), 24);
            return _mm512_mul_ps(_mm512_cvtepi32_ps(sign_extended), scale);
          };
          uint16_t* dst = out + (2 * (v / 8) + panel) * kTileWords + v % 8 * 64;
          _mm512_store_si512(dst, bf16_pairs(code(0), code(8)));
          _mm512_store_si512(dst + 32, bf16_pairs(code(16), code(24)));
        }
      }
    }
    return unpacked;
  }
};

template <class TilesT>
struct Bf16Tiles {
  using Tiles = TilesT;
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kMinRows = Tiles::min_rows(kFormat);
  // The packed layout is B tiles already.
  static const uint16_t* b_tiles(const uint8_t* pair, int64_t, uint16_t*) {
    return reinterpret_cast<const uint16_t*>(pair);
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
