// Packing of GGUF's formats (gguf_blocks.h): a transposition of 16 rows' blocks into vectors.
#pragma once

#ifndef MOEJET_ISA_NS
#error "gguf-pack-inl.h belongs into a file of isa/"
#endif

#include "gguf_blocks.h"
#include "pack-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// The words of one row's part of a panel block, apart from d and dmin, as they are staged.
static constexpr int gguf_words(Format format) {
  return format == Format::kQ4_0   ? 8
         : format == Format::kQ8_0 ? 16
         : format == Format::kQ4K  ? 35
         : format == Format::kQ5K  ? 43
                                   : 52;
}

// The vector of a panel block that staged word w goes to.
static constexpr int gguf_vector_of(Format format, int w) {
  if (format == Format::kQ4_0) return w;
  if (format == Format::kQ8_0) return 2 * (w % 8) + w / 8;
  if (format == Format::kQ6K) {  // low nibbles, planes, scales
    if (w >= 48) return kGgufScalesAt / 64 + w - 48;
    if (w >= 32) return gguf_plane_at(format, (w - 32) / 8 * 2, w % 8) / 64;
    return gguf_codes_at(format, w / 8, w % 8) / 64;
  }
  if (w < 3) return kGgufScalesAt / 64 + w;
  if (format == Format::kQ5K && w < 11) return gguf_plane_at(format, 0, w - 3) / 64;
  const int code = w - (format == Format::kQ5K ? 11 : 3);
  return gguf_codes_at(format, code / 8, code % 8) / 64;
}

template <Format kFormat>
struct GgufVectorOf {
  constexpr GgufVectorOf() {
    for (int w = 0; w < gguf_words(kFormat); ++w) {
      vector[w] = static_cast<uint8_t>(gguf_vector_of(kFormat, w));
    }
  }
  uint8_t vector[gguf_words(kFormat)] = {};
};

// One row's part of a panel block from `from` on: its words to `words`, its fp16 values to halves.
// `groups`: how many groups of 32 the row still has.
template <Format kFormat>
inline void gguf_stage(const uint8_t* from, int64_t groups, uint8_t* words, uint16_t* halves) {
  constexpr int kBytes = gguf_file_block(kFormat).bytes;
  if constexpr (kFormat == Format::kQ4_0) {
    // Of each group 16 bytes: inputs i (low) and 16 + i (high nibble).
    uint64_t group[2][2] = {};
    for (int g = 0; g < 2 && g < groups; ++g, from += kBytes) {
      std::memcpy(halves + g, from, 2);
      std::memcpy(group[g], from + 2, 16);
    }
    constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0fu;
    for (int i = 0; i < 2; ++i) {
      const uint64_t a = group[0][i], b = group[1][i];
      const uint64_t low = (a & kLow) | (b & kLow) << 4, high = (a >> 4 & kLow) | (b & ~kLow);
      std::memcpy(words + 8 * i, &low, sizeof(low));
      std::memcpy(words + 16 + 8 * i, &high, sizeof(high));
    }
  } else if constexpr (kFormat == Format::kQ8_0) {
    std::memset(words + 32, 0, 32);
    for (int g = 0; g < 2 && g < groups; ++g, from += kBytes) {
      std::memcpy(halves + g, from, 2);
      std::memcpy(words + 32 * g, from + 2, 32);
    }
  } else if constexpr (kFormat == Format::kQ6K) {
    std::memcpy(words, from, 208);
    std::memcpy(halves, from + 208, 2);
  } else {
    std::memcpy(halves, from, 4);
    std::memcpy(words, from + 4, kBytes - 4);
  }
}

// FormatKernels::pack_panel.
template <Format kFormat>
bool pack_gguf(const PanelSource& source, uint8_t* dst, int64_t block_stride) {
  constexpr BlockShape kBlock = block_shape(kFormat), kFile = gguf_file_block(kFormat);
  constexpr int kWords = gguf_words(kFormat);
  constexpr int kStagedBytes = 4 * ((kWords + kWide - 1) / kWide * kWide);
  constexpr GgufVectorOf<kFormat> kVectorOf;
  alignas(64) uint8_t staged[kPanelRows * kStagedBytes] = {};
  bool finite = true;
  for (int64_t k0 = 0; k0 < source.k; k0 += kBlock.k, dst += block_stride) {
    uint16_t halves[2][kPanelRows] = {};
    for (int r = 0; r < source.rows; ++r) {
      uint16_t of_row[2] = {};
      const uint8_t* from = static_cast<const uint8_t*>(source.data) + r * source.row_stride +
                            k0 / kFile.k * kFile.bytes;
      gguf_stage<kFormat>(from, (source.k - k0) / kActGroup, staged + r * kStagedBytes, of_row);
      for (int i = 0; i < 2; ++i) {
        halves[i][r] = of_row[i];
        finite &= (of_row[i] & 0x7c00) != 0x7c00;
      }
    }
    for (int w = 0; w < kWords; w += kWide) {
      for (int row = 0; row < kPanelRows; row += kWide) {
        WU square[kWide];
        for (int i = 0; i < kWide; ++i) {
          square[i] = load<WU>(staged + (row + i) * kStagedBytes + 4 * w);
        }
        exchange_blocks<1>(square);
        for (int i = 0; i < kWide && w + i < kWords; ++i) {
          store(dst + 64 * kVectorOf.vector[w + i] + 4 * row, square[i]);
        }
      }
    }
    std::memcpy(dst + gguf_halves_at(kFormat), halves, sizeof(halves));
  }
  return finite;
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
