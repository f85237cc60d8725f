// Unpacking of fp8 weights to bf16 B tiles with AVX-512, for real and emulated tiles.
//
// Tiles hold value * scale, rounded to bf16. Codes alone would be exact in bf16, but tiles sum over
// all of k while the scale changes every 128 inputs: taking the sums out of the tiles and adding
// them up in fp32 every four tiles costs half as much as the multiplications. The rounding adds
// 0.1 % to the error that the rounding of activations makes anyway.
//
// All codes of a block share one scale, so bf16(value * scale) is looked up: the last two exponent
// bits and the mantissa select one of 32 words, the sign and the first two exponent bits are
// added.
#pragma once

#ifndef MOEJET_ISA_NS
#error "fp8-tiles512-inl.h belongs into a file of isa/"
#endif

#include "fp-avx512-inl.h"
#include "tiles512-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

template <class TilesT>
struct Fp8Tiles {
  using Tiles = TilesT;
  static constexpr Format kFormat = Format::kFp8;
  static constexpr int kMinRows = Tiles::min_rows(kFormat);

  struct Lookup {
    __m512i normal;  // words by code % 32, for codes 0..31 as if their exponent were not zero
    __m512i small;   // words by code % 8, for zero and subnormal codes
  };

  static Lookup make_lookup(float scale) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 eighth = _mm512_set1_ps(0.125f);
    const __m512 m =
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_and_epi32(lane, _mm512_set1_epi32(7))), eighth);
    // Lanes 0..7 have exponent 0 (2^-7), lanes 8..15 exponent 1; two more are four times as much.
    const __m512 power =
        _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(1.f / 128.f), _mm512_set1_ps(1.f / 64.f));
    const __m512 scales = _mm512_set1_ps(scale);
    const auto words = [](__m512 a, __m512 b) {
      // Rounded to nearest, ties away from zero; a to words 0..15, b to words 16..31.
      const auto round = [](__m512 v) {
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(
            _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000)), 16));
      };
      return _mm512_inserti64x4(_mm512_castsi256_si512(round(a)), round(b), 1);
    };
    const __m512 normal =
        _mm512_mul_ps(_mm512_mul_ps(_mm512_add_ps(m, _mm512_set1_ps(1.f)), power), scales);
    const __m512 small = _mm512_mul_ps(_mm512_mul_ps(m, _mm512_set1_ps(1.f / 64.f)), scales);
    return {words(normal, _mm512_mul_ps(normal, _mm512_set1_ps(4.f))), words(small, small)};
  }

  // index: words with a code in the low byte (the rest is ignored); words: fp8_low_words or
  // fp8_high_words of the same codes.
  template <bool kSmall>
  static __m512i look_up(const Lookup& lookup, __m512i index, __m512i words) {
    __m512i word = _mm512_permutexvar_epi16(index, lookup.normal);
    if (kSmall) {
      const __mmask32 small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x0780));
      word = _mm512_mask_permutexvar_epi16(word, small, index, lookup.small);
    }
    const __m512i rest = _mm512_and_si512(words, _mm512_set1_epi16(static_cast<int16_t>(0x8600)));
    return _mm512_add_epi16(word, rest);
  }

  // Eight vectors (32 inputs): one B tile.
  template <bool kSmall>
  static void unpack(const uint8_t* codes, const Lookup& lookup, uint16_t* out) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      prefetch(codes + 64 * v);
      const __m512i w = load512(codes + 64 * v);
      _mm512_store_si512(out + 64 * v, look_up<kSmall>(lookup, w, fp8_low_words(w)));
      _mm512_store_si512(out + 64 * v + 32,
                         look_up<kSmall>(lookup, _mm512_srli_epi16(w, 8), fp8_high_words(w)));
    }
  }

  // The same for scales whose products may leave the range of normal numbers, where exponents
  // cannot be added. Also for zero, the scale of weights that were never set.
  static void unpack_any_scale(const uint8_t* codes, float scale, uint16_t* out) {
    const __m512 factor = _mm512_set1_ps(kFp8Factor), scales = _mm512_set1_ps(scale);
    for (int v = 0; v < 8; ++v) {
      const Fp8Vectors<true> w(load512(codes + 64 * v));
      const auto scaled = [&](__m512 value) {
        return _mm512_mul_ps(_mm512_mul_ps(value, factor), scales);
      };
      _mm512_store_si512(out + 64 * v,
                         bf16_pairs(scaled(w.template get<0>()), scaled(w.template get<1>())));
      _mm512_store_si512(out + 64 * v + 32,
                         bf16_pairs(scaled(w.template get<2>()), scaled(w.template get<3>())));
    }
  }

  // B tiles of num_blocks blocks of both panels: [k tile][panel][16][32].
  static const uint16_t* b_tiles(const uint8_t* pair, int64_t num_blocks, uint16_t* unpacked) {
    uint16_t* out = unpacked;
    for (int64_t b = 0; b < num_blocks; ++b, out += 8 * kTileWords) {
      for (int panel = 0; panel < 2; ++panel) {
        const Fp8Block<const uint8_t> block = fp8_block(pair + (2 * b + panel) * 2080);
        if (panel == 0) prefetch(block.data);
        Fp8BlockData data;
        std::memcpy(&data, block.data, sizeof(data));
        const bool any_scale = !(data.scale > 1e-30f && data.scale < 1e30f);
        const Lookup lookup = make_lookup(data.scale);
        for (int group = 0; group < 4; ++group, data.small >>= 8) {
          const uint8_t* codes = block.codes + 512 * group;
          uint16_t* tile = out + (2 * group + panel) * kTileWords;
          if (any_scale) {
            unpack_any_scale(codes, data.scale, tile);
          } else if ((data.small & 255) == 0) {
            unpack<false>(codes, lookup, tile);
          } else {
            unpack<true>(codes, lookup, tile);
          }
        }
      }
    }
    return unpacked;
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
