// Unpacking of GGUF's formats to bf16 B tiles with AVX-512, for real and emulated tiles. The value
// is code * scale - min, exact in fp32 up to the last rounding, then rounded to bf16.
#pragma once

#ifndef MOEJET_ISA_NS
#error "gguf-tiles512-inl.h belongs into a file of isa/"
#endif

#include "gguf-avx512-inl.h"
#include "tiles512-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

template <Format kF, class TilesT>
struct GgufTiles {
  using Tiles = TilesT;
  static constexpr Format kFormat = kF;
  static constexpr int kMinRows = Tiles::min_rows(kFormat);

  struct Affine {
    __m512 scale, min;
    __m512 operator()(__m512i codes, int byte) const {
      return _mm512_fmsub_ps(gguf_byte(codes, byte), scale, min);
    }
  };

  // One vector of codes to two rows of a B tile.
  static void unpack(__m512i codes, const Affine& value, uint16_t* out) {
    _mm512_store_si512(out, bf16_pairs(value(codes, 0), value(codes, 1)));
    _mm512_store_si512(out + 32, bf16_pairs(value(codes, 2), value(codes, 3)));
  }

  // Of half `half` of group g of a block. packed: of q4_k and q5_k.
  static Affine affine(const uint8_t* block, const GgufScaleMins* packed, int g, int half) {
    if constexpr (kF == Format::kQ4_0 || kF == Format::kQ8_0) {
      const __m512 d = gguf_halves<kF>(block, g);
      return {d, _mm512_mul_ps(d, _mm512_set1_ps(kF == Format::kQ4_0 ? 8.f : 128.f))};
    } else if constexpr (kF == Format::kQ6K) {
      const __m512i quads = load512(block + kGgufScalesAt + 64 * (g / 2));
      const __m512 scale =
          _mm512_mul_ps(gguf_halves<kF>(block, 0), gguf_signed_byte(quads, 2 * (g % 2) + half));
      return {scale, _mm512_mul_ps(scale, _mm512_set1_ps(32.f))};
    } else {
      return {_mm512_mul_ps(gguf_halves<kF>(block, 0), packed->scale(g)),
              _mm512_mul_ps(gguf_halves<kF>(block, 1), packed->min(g))};
    }
  }

  // Chunks from kChunk on; the tile of group g of a panel block begins 2 g tiles after `out`.
  template <int kChunk>
  static void unpack_chunks(const uint8_t* block, const GgufScaleMins* packed, uint16_t* out) {
    // Codes that come multiplied have a smaller scale.
    constexpr float kHighFactor = 1.f / (1 << gguf_high_shift(kF));
    constexpr int kFirst = gguf_first_group(kF, kChunk);
    constexpr int kSecond = kFirst + gguf_group_step(kF);
    for (int half = 0; half < 2; ++half) {
      const Affine first = affine(block, packed, kFirst, half);
      Affine second = affine(block, packed, kSecond, half);
      second.scale = _mm512_mul_ps(second.scale, _mm512_set1_ps(kHighFactor));
      for (int v = 4 * half; v < 4 * half + 4; ++v) {
        __m512i low, high;
        gguf_codes<kF, kChunk>(block, v, &low, &high);
        unpack(low, first, out + 2 * kFirst * kTileWords + 64 * v);
        unpack(high, second, out + 2 * kSecond * kTileWords + 64 * v);
      }
    }
    if constexpr (kChunk + 1 < gguf_chunks(kF)) unpack_chunks<kChunk + 1>(block, packed, out);
  }

  // B tiles of num_blocks blocks of both panels: [k tile][panel][16][32].
  static const uint16_t* b_tiles(const uint8_t* pair, int64_t num_blocks, uint16_t* unpacked) {
    constexpr BlockShape kBlock = block_shape(kF);
    uint16_t* out = unpacked;
    for (int64_t b = 0; b < num_blocks; ++b, out += 2 * (kBlock.k / kTileK) * kTileWords) {
      for (int panel = 0; panel < 2; ++panel, pair += kBlock.bytes) {
        prefetch(pair + gguf_halves_at(kF));
        if constexpr (gguf_has_mins(kF)) {
          const GgufScaleMins packed(pair);
          unpack_chunks<0>(pair, &packed, out + panel * kTileWords);
        } else {
          unpack_chunks<0>(pair, nullptr, out + panel * kTileWords);
        }
      }
    }
    return unpacked;
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
