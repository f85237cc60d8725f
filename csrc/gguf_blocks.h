// GGUF's quantised formats in panels: the bits of the file in another order, never quantised again.
// The formats are those of ggml (https://github.com/ggml-org/ggml), named as there.
//
// A weight is one of
//   q4_0, q8_0   d q                  d: fp16, one for 32 inputs (a group); q: u4 - 8, or int8
//   q4_k, q5_k   d sc q - dmin m      d, dmin: fp16, for 256 inputs; sc, m: u6, for a group;
//                                     q: u4 or u5
//   q6_k         d sc (q - 32)        d: fp16, for 256 inputs; sc: int8, for 16 inputs; q: u6
// d sc, dmin m, and their products with a code are exact in fp32.
//
// A panel block is a sequence of vectors of 64 B, in the order in which kernels read them. In most
// of them lane r (32 bits) is a word of row r's block of the file as it stands, because ggml's
// order within a block already suits 8-bit dot products: packing is a transposition.
//
//   first two rows of 16 fp16: d (q4_0, q8_0: of the block's first group) and dmin (of the second
//   group; q6_k: unused). In q4_0 and q8_0 they come last, as in int4_g32.
//   q4_k, q5_k: 3 vectors, the 12 bytes of sc and m; q6_k: 4 vectors, the 16 bytes of sc
//   codes, by chunks
//
// A chunk is two groups of 32 inputs with 8 vectors that hold the codes of both. Byte 4 r + j of
// vector v belongs to row r and the inputs 4 v + j of both groups:
//   q4_0, q4_k, q5_k   groups 2 c, 2 c + 1 of chunk c: low nibble, high nibble
//   q6_k               groups g = 4 (c / 2) + c % 2 and g + 2, the same
//   q8_0               a vector for each: group 0 in vector 2 v, group 1 in vector 2 v + 1
// The bits above the nibble lie in planes, vectors that follow the first code vectors they belong
// to:
//   q5_k, 8 planes: bit g of the byte in plane v is that of group g; chunk 0 is interleaved with
//         them (plane 0, codes 0, plane 1, codes 1, ...)
//   q6_k, 8 planes for 128 inputs: bits 2 i and 2 i + 1 of the byte in plane v are those of the
//   i-th
//         of these four groups; the even chunks are interleaved with them (codes 0, plane 0, ...)
// In q4_0 the file pairs inputs i and 16 + i in a byte; packing brings them into the order of q4_k.
#pragma once

#include <cstdint>
#include <cstring>

#include "pack.h"

namespace moejet {

// A block as it lies in the file.
static constexpr BlockShape gguf_file_block(Format format) {
  return format == Format::kQ4_0   ? BlockShape{32, 18}
         : format == Format::kQ8_0 ? BlockShape{32, 34}
         : format == Format::kQ4K  ? BlockShape{256, 144}
         : format == Format::kQ5K  ? BlockShape{256, 176}
                                   : BlockShape{256, 210};
}

// Formats with d and dmin.
static constexpr bool gguf_has_mins(Format format) {
  return format == Format::kQ4K || format == Format::kQ5K;
}
static constexpr bool gguf_has_nibbles(Format format) { return format != Format::kQ8_0; }
static constexpr int gguf_chunks(Format format) { return block_shape(format).k / 64; }

// Bytes from a panel block's beginning to its fp16 rows, and to its other scales.
static constexpr int gguf_halves_at(Format format) {
  return format == Format::kQ4_0 ? 512 : format == Format::kQ8_0 ? 1024 : 0;
}
constexpr int kGgufScalesAt = 64;

// To vector v of chunk c, in q8_0 that of the first group.
static constexpr int gguf_codes_at(Format format, int c, int v) {
  return format == Format::kQ4_0   ? 64 * v
         : format == Format::kQ8_0 ? 128 * v
         : format == Format::kQ4K  ? 256 + 512 * c + 64 * v
         : format == Format::kQ5K  ? (c == 0 ? 320 + 128 * v : 768 + 512 * c + 64 * v)
                                   : 320 + 1536 * (c / 2) + (c % 2 == 0 ? 128 * v : 1024 + 64 * v);
}
// To plane v of chunk c.
static constexpr int gguf_plane_at(Format format, int c, int v) {
  return format == Format::kQ5K ? 256 + 128 * v : 384 + 1536 * (c / 2) + 128 * v;
}

// The groups of chunk c; the second is gguf_group_step further.
static constexpr int gguf_first_group(Format format, int c) {
  return format == Format::kQ6K ? 4 * (c / 2) + c % 2 : 2 * c;
}
static constexpr int gguf_group_step(Format format) { return format == Format::kQ6K ? 2 : 1; }

static inline float half_value(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  float value;
  if (magnitude < 0x400u) {
    value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t rebias = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;  // infinity, NaN stay
  const uint32_t wide = sign | ((magnitude << 13) + rebias);
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// ---- One weight of a panel block, for code that need not be fast ----

// d (i = 0) or dmin (i = 1) of row r, in q4_0 and q8_0 d of group i.
template <Format kFormat>
static inline float gguf_half(const uint8_t* block, int i, int r) {
  uint16_t bits;
  std::memcpy(&bits, block + gguf_halves_at(kFormat) + 32 * i + 2 * r, sizeof(bits));
  return half_value(bits);
}

// Byte i of the other scales of row r.
static inline int gguf_scale_byte(const uint8_t* block, int i, int r) {
  return block[kGgufScalesAt + 64 * (i / 4) + 4 * r + i % 4];
}

struct GgufScaleMin {
  int scale, min;
};
// sc and m of group g of row r, as ggml packs them: the first four groups in the low six bits of
// four bytes each, the rest in what is left.
static inline GgufScaleMin gguf_scale_min(const uint8_t* block, int g, int r) {
  const int i = g % 4;
  const int s = gguf_scale_byte(block, i, r), m = gguf_scale_byte(block, 4 + i, r);
  if (g < 4) return {s & 63, m & 63};
  const int both = gguf_scale_byte(block, 8 + i, r);
  return {(both & 15) | (s >> 6 << 4), both >> 4 | (m >> 6 << 4)};
}

// The code of input i of group g of row r: unsigned, in q8_0 signed.
template <Format kFormat>
static inline int gguf_code(const uint8_t* block, int g, int i, int r) {
  const int lane = 4 * r + i % 4, v = i / 4;
  if constexpr (kFormat == Format::kQ8_0) {
    return static_cast<int8_t>(block[gguf_codes_at(kFormat, 0, v) + 64 * g + lane]);
  }
  constexpr bool kQ6 = kFormat == Format::kQ6K;
  const int c = kQ6 ? 2 * (g / 4) + g % 2 : g / 2, side = kQ6 ? g % 4 / 2 : g % 2;
  const int nibble = block[gguf_codes_at(kFormat, c, v) + lane] >> (4 * side) & 15;
  if constexpr (kFormat == Format::kQ5K) {
    return nibble | (block[gguf_plane_at(kFormat, c, v) + lane] >> g & 1) << 4;
  }
  if constexpr (kQ6) {
    return nibble | (block[gguf_plane_at(kFormat, c, v) + lane] >> (2 * (g % 4)) & 3) << 4;
  }
  return nibble;
}

// The weight of input k of row r.
template <Format kFormat>
static inline float gguf_value(const uint8_t* block, int k, int r) {
  const int g = k / 32;
  const int code = gguf_code<kFormat>(block, g, k % 32, r);
  if constexpr (kFormat == Format::kQ4_0 || kFormat == Format::kQ8_0) {
    const float d = gguf_half<kFormat>(block, g, r);
    return d * static_cast<float>(kFormat == Format::kQ4_0 ? code - 8 : code);
  } else {
    const float d = gguf_half<kFormat>(block, 0, r);
    if constexpr (kFormat == Format::kQ6K) {
      const int8_t scale = static_cast<int8_t>(gguf_scale_byte(block, k / 16, r));
      return d * static_cast<float>(scale) * static_cast<float>(code - 32);
    } else {
      const GgufScaleMin packed = gguf_scale_min(block, g, r);
      const float min = gguf_half<kFormat>(block, 1, r) * static_cast<float>(packed.min);
      return d * static_cast<float>(packed.scale) * static_cast<float>(code) - min;
    }
  }
}

}  // namespace moejet
