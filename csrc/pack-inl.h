// Packing of weights into panels (pack.h), in plain C++ with vectors of native width. Lane r is a
// row of the panel; functions on W see kWide of its rows, and all results are per row, so that
// every instruction set packs the same bytes.
#pragma once

#ifndef MOEJET_ISA_NS
#error "pack-inl.h belongs into a file of isa/"
#endif

#include "lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

inline W wide_min(W a, W b) { return b < a ? b : a; }  // keeps a NaN in a
inline W wide_max(W a, W b) { return b > a ? b : a; }
inline WI wide_max(WI a, WI b) { return b > a ? b : a; }
// As bf16_round_bits.
inline WU wide_bf16(W v) {
  const WU bits = (WU)v;
  const WU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return wide_magnitude(v) > 0x7f800000 ? (bits >> 16) | 0x40u : rounded;
}
inline W wide_bf16_value(W v) { return (W)(wide_bf16(v) << 16); }

// ---- Transposition ----

// Exchanges the off-diagonal blocks of S x S words in a square of kWide rows.
template <int S>
inline void exchange_blocks(WU* rows) {
  if constexpr (S < kWide) {
    WU upper, lower;
    for (int i = 0; i < kWide; ++i) {
      upper[i] = i & S ? kWide + i - S : i;
      lower[i] = i & S ? kWide + i : i + S;
    }
    for (int i = 0; i < kWide; ++i) {
      if (i & S) continue;
      const WU a = rows[i], b = rows[i + S];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + S] = __builtin_shuffle(a, b, lower);
    }
    exchange_blocks<2 * S>(rows);
  }
}

// dst[w][row] = visit(src[row][w], first w) for 16 rows of kWords words; visit sees kWide words of
// one row.
template <int kWords, class Visit>
inline void transpose_words(const uint8_t* src, int64_t row_bytes, uint8_t* dst,
                            const Visit& visit) {
  for (int w = 0; w < kWords; w += kWide) {
    for (int row = 0; row < kPanelRows; row += kWide) {
      WU square[kWide];
      for (int i = 0; i < kWide; ++i) {
        square[i] = visit(load<WU>(src + (row + i) * row_bytes + 4 * w), w);
      }
      exchange_blocks<1>(square);
      for (int i = 0; i < kWide; ++i) store(dst + 64 * (w + i) + 4 * row, square[i]);
    }
  }
}

// ---- Reading the source ----

inline const uint8_t* source_at(const PanelSource& source, int row, int64_t k) {
  return static_cast<const uint8_t*>(source.data) +
         (row * source.row_stride + k) * dtype_bytes(source.dtype);
}

// 16 rows of kBytes bytes from input k0 on: the source itself, or a copy in `buffer` with `padding`
// outside the matrix. row_bytes: the distance of rows.
template <int kBytes>
inline const uint8_t* source_rows(const PanelSource& source, int64_t k0, uint8_t padding,
                                  uint8_t* buffer, int64_t* row_bytes) {
  const int64_t left = (source.k - k0) * dtype_bytes(source.dtype);
  if (left >= kBytes && source.rows == kPanelRows) {
    *row_bytes = source.row_stride * dtype_bytes(source.dtype);
    return source_at(source, 0, k0);
  }
  std::memset(buffer, padding, kPanelRows * kBytes);
  for (int r = 0; r < source.rows; ++r) {
    std::memcpy(buffer + r * kBytes, source_at(source, r, k0), smaller(left, kBytes));
  }
  *row_bytes = kBytes;
  return buffer;
}

// A 16-bit or 8-bit float as fp32: its magnitude, shifted so that exponent and mantissa lie where
// fp32 has them, is rescaled by the difference of the biases; infinity and NaN, from `special` on,
// would need a larger step.
inline W widen_float(WU magnitude, float rescale, int32_t special, WU sign) {
  const WU finite = (WU)((W)magnitude * rescale);
  const WU bits = (WI)magnitude < special ? finite : magnitude | 0x7f800000u;
  return (W)(bits | sign);
}

inline float group_scale(const PanelSource& source, int row, int64_t k) {
  const uint32_t bits =
      static_cast<uint32_t>(source.group_scales[row * source.group_stride + k / kActGroup]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Inputs k0 .. k0 + kWide - 1 of one row in fp32; zeros beyond the row.
inline W load_wide(const PanelSource& source, int row, int64_t k0) {
  const int64_t left = source.k - k0;
  if (left <= 0) return W{};
  if (source.dtype == DType::kInt4) {
    const uint8_t* codes =
        static_cast<const uint8_t*>(source.data) + row * source.row_stride + k0 / 2;
    WI values;
    for (int i = 0; i < kWide; ++i) values[i] = (codes[i / 2] >> (4 * (i % 2)) & 15) - 8;
    return __builtin_convertvector(values, W) * group_scale(source, row, k0);
  }
  const uint8_t* p = source_at(source, row, k0);
  uint8_t ragged[4 * kWide] = {};
  if (left < kWide) {
    std::memcpy(ragged, p, left * dtype_bytes(source.dtype));
    p = ragged;
  }
  if (source.dtype == DType::kF32) return load<W>(p);
  if (source.dtype == DType::kFp8) {
    const WU code = __builtin_convertvector(__builtin_convertvector(load<WideU8>(p), WideU16), WU);
    const W value = widen_float((code & 0x7fu) << 20, 0x1p120f, 0x7f << 20, (code & 0x80u) << 24);
    return value * source.scales[k0 / kFp8ScaleBlock];
  }
  const WU half = __builtin_convertvector(load<WideU16>(p), WU);
  if (source.dtype == DType::kBf16) return (W)(half << 16);
  return widen_float((half & 0x7fffu) << 13, 0x1p112f, 0x7c00 << 13, (half & 0x8000u) << 16);
}

inline bool all_finite(WI max_magnitude_bits) {
  bool finite = true;
  for (int i = 0; i < kWide; ++i) finite &= max_magnitude_bits[i] < 0x7f800000;
  return finite;
}

// t[k] holds input k0 + k of rows [first, first + kWide) for K inputs; zero outside the matrix.
// True if all are finite.
template <int K>
inline bool load_columns(const PanelSource& source, int64_t k0, int first, W (&t)[K]) {
  WI largest = {};
  for (int k = 0; k < K; k += kWide) {
    WU square[kWide];
    for (int i = 0; i < kWide; ++i) {
      const W v = first + i < source.rows ? load_wide(source, first + i, k0 + k) : W{};
      largest = wide_max(largest, wide_magnitude(v));
      square[i] = (WU)v;
    }
    exchange_blocks<1>(square);
    for (int i = 0; i < kWide; ++i) t[k + i] = (W)square[i];
  }
  return all_finite(largest);
}

// ---- Integer formats ----

// The value of largest magnitude in each lane, with its sign.
template <int K>
inline W extreme(const W* t) {
  W best = {}, magnitude = {};
  for (int i = 0; i < K; ++i) {
    const W a = (W)wide_magnitude(t[i]);
    best = a > magnitude ? t[i] : best;
    magnitude = wide_max(magnitude, a);
  }
  return best;
}

inline W reciprocal_or_zero(W scale) {
  return (W)wide_magnitude(scale) > 1e-37f ? 1.f / scale : W{};
}

inline WI int4_codes(W v, W inverse) {
  return wide_round(wide_min(wide_max(v * inverse, W{} - 8.f), W{} + 7.f));
}

// The int4 scale of a group: codes run from -8 to 7, so the sign of the scale is chosen such that
// the extreme value is negative in code units, and it may lie at -8 (all 16 levels), at -7
// (symmetric) or beyond (clipped). A few positions are tried; the best is refined once by least
// squares. Relative error on Gaussian weights: 8.1 %; absmax / 7 gives 9.7 %, extreme / -8
// gives 8.6 %.
inline W int4_scale(const W* t) {
  constexpr float kDivisors[] = {7.f, 7.5f, 8.f, 8.5f, 9.f};
  const W ext = extreme<32>(t);
  W best_scale = {}, best_error = W{} + __builtin_inff();
  const auto consider = [&](W scale) {
    const W inverse = reciprocal_or_zero(scale);
    W error = {}, dot = {}, norm = {};
    for (int i = 0; i < 32; ++i) {
      const W code = __builtin_convertvector(int4_codes(t[i], inverse), W);
      const W d = t[i] - code * scale;
      error = error + d * d;
      dot = dot + code * t[i];
      norm = norm + code * code;
    }
    best_scale = error < best_error ? scale : best_scale;
    best_error = error < best_error ? error : best_error;
    return norm > 0.f ? dot / norm : W{};
  };
  W refined = {};
  for (const float divisor : kDivisors) {
    const W before = best_error;
    const W fit = consider(wide_bf16_value(ext / -divisor));
    refined = best_error < before ? fit : refined;
  }
  consider(wide_bf16_value(refined));
  return best_scale;
}

// Four codes in the low 16 bits of each lane to the low halves of four bytes.
inline WU spread_codes(WU codes) {
  codes = (codes | (codes << 8)) & 0x00ff00ffu;
  return (codes | (codes << 4)) & 0x0f0f0f0fu;
}

// Codes and scales of an int4 source as they are.
inline void repack_int4(const PanelSource& source, uint8_t* dst, int64_t block_stride) {
  for (int64_t k0 = 0; k0 < source.k; k0 += 64, dst += block_stride) {
    // Missing rows and the second half of a ragged block: code 8, which is zero, and scale zero.
    uint32_t words[8][kPanelRows];
    uint32_t scales[kPanelRows] = {};
    for (auto& word : words) {
      for (uint32_t& codes : word) codes = 0x88888888u;
    }
    const int groups = source.k - k0 < 64 ? 1 : 2;
    for (int row = 0; row < source.rows; ++row) {
      const uint8_t* codes =
          static_cast<const uint8_t*>(source.data) + row * source.row_stride + k0 / 2;
      for (int w = 0; w < 4 * groups; ++w) std::memcpy(&words[w][row], codes + 4 * w, 4);
      const uint16_t* scale = source.group_scales + row * source.group_stride + k0 / kActGroup;
      scales[row] = scale[0] | (groups == 2 ? static_cast<uint32_t>(scale[1]) << 16 : 0u);
    }
    for (int row = 0; row < kPanelRows; row += kWide) {
      for (int v = 0; v < 8; ++v) {
        const WU low = (load<WU>(&words[v / 2][row]) >> (16 * (v % 2))) & 0xffffu;
        const WU high = (load<WU>(&words[4 + v / 2][row]) >> (16 * (v % 2))) & 0xffffu;
        store(dst + 64 * v + 4 * row, spread_codes(low) | (spread_codes(high) << 4));
      }
      store(dst + 512 + 4 * row, load<WU>(&scales[row]));
    }
  }
}

inline bool pack_int4(const PanelSource& source, uint8_t* dst, int64_t block_stride) {
  if (source.dtype == DType::kInt4) {
    repack_int4(source, dst, block_stride);
    return true;
  }
  bool finite = true;
  W t[64];
  for (int64_t k0 = 0; k0 < source.k; k0 += 64, dst += block_stride) {
    for (int row = 0; row < kPanelRows; row += kWide) {
      uint8_t* to = dst + 4 * row;
      finite &= load_columns<64>(source, k0, row, t);
      const W scale0 = int4_scale(t), scale1 = int4_scale(t + 32);
      const W inverse0 = reciprocal_or_zero(scale0), inverse1 = reciprocal_or_zero(scale1);
      for (int v = 0; v < 8; ++v) {
        WI word = {};
        for (int j = 0; j < 4; ++j) {
          const WI low = int4_codes(t[4 * v + j], inverse0) + 8;
          const WI high = int4_codes(t[32 + 4 * v + j], inverse1) + 8;
          word |= ((low & 15) | ((high & 15) << 4)) << (8 * j);
        }
        store(to + 64 * v, word);
      }
      store(to + 512, wide_bf16(scale0) | (wide_bf16(scale1) << 16));
    }
  }
  return finite;
}

inline bool pack_int8(const PanelSource& source, uint8_t* dst, int64_t block_stride) {
  bool finite = true;
  W t[128];
  for (int64_t k0 = 0; k0 < source.k; k0 += 128, dst += block_stride) {
    for (int row = 0; row < kPanelRows; row += kWide) {
      uint8_t* to = dst + 4 * row;
      finite &= load_columns<128>(source, k0, row, t);
      const W scale = (W)wide_magnitude(extreme<128>(t)) / 127.f;
      const W inverse = reciprocal_or_zero(scale);
      for (int v = 0; v < 32; ++v) {
        WI word = {};
        for (int j = 0; j < 4; ++j) {
          const W scaled = t[4 * v + j] * inverse;
          const WI code = wide_round(wide_min(wide_max(scaled, W{} - 127.f), W{} + 127.f));
          word |= (code & 255) << (8 * j);
        }
        store(to + 64 * v, word);
      }
      store(to + 2048, scale);
    }
  }
  return finite;
}

// ---- Float formats ----

inline bool pack_bf16(const PanelSource& source, uint8_t* dst, int64_t block_stride) {
  for (int64_t k0 = 0; k0 < source.k; k0 += 32, dst += block_stride) {
    if (source.dtype == DType::kBf16) {
      uint8_t buffer[kPanelRows * 64];
      int64_t row_bytes;
      const uint8_t* rows = source_rows<64>(source, k0, 0, buffer, &row_bytes);
      transpose_words<16>(rows, row_bytes, dst, [](WU pair, int) { return pair; });
      continue;
    }
    for (int row = 0; row < kPanelRows; row += kWide) {
      W t[32];
      load_columns<32>(source, k0, row, t);
      for (int v = 0; v < 16; ++v) {
        store(dst + 64 * v + 4 * row, wide_bf16(t[2 * v]) | (wide_bf16(t[2 * v + 1]) << 16));
      }
    }
  }
  return true;
}

inline bool pack_fp32(const PanelSource& source, uint8_t* dst, int64_t block_stride) {
  for (int64_t k0 = 0; k0 < source.k; k0 += 32, dst += block_stride) {
    for (int row = 0; row < kPanelRows; row += kWide) {
      W t[32];
      load_columns<32>(source, k0, row, t);
      for (int v = 0; v < 32; ++v) store(dst + 64 * v + 4 * row, t[v]);
    }
  }
  return true;
}

// ---- fp8 ----

// A code for padding: 1.0, because the kernels are slower where they meet zeros.
constexpr uint8_t kFp8Padding = 0x38;

inline bool fp8_block_scales(const PanelSource& source, float* scales) {
  bool finite = true;
  for (int64_t k0 = 0; k0 < source.k; k0 += kFp8ScaleBlock) {
    WI largest = {};
    for (int r = 0; r < source.rows; ++r) {
      for (int k = 0; k < kFp8ScaleBlock; k += kWide) {
        largest = wide_max(largest, wide_magnitude(load_wide(source, r, k0 + k)));
      }
    }
    finite &= all_finite(largest);
    float amax = 0.f;
    for (int i = 0; i < kWide; ++i) amax = ((W)largest)[i] > amax ? ((W)largest)[i] : amax;
    scales[k0 / kFp8ScaleBlock] = amax < kFp8MinAmax ? 0.f : amax / kFp8Max;
  }
  return finite;
}

// One panel block quantised, [16][128], padding included.
inline void fp8_quantize(const PanelSource& source, int64_t k0, float scale, uint8_t* codes) {
  std::memset(codes, kFp8Padding, kPanelRows * kFp8ScaleBlock);
  const int valid = static_cast<int>(smaller(kFp8ScaleBlock, source.k - k0));
  for (int r = 0; r < source.rows; ++r) {
    uint8_t* row = codes + r * kFp8ScaleBlock;
    for (int k = 0; k < valid; k += kWide) {
      const W v = load_wide(source, r, k0 + k);
      const WideU8 bytes = scale > 0.f ? fp8_codes(v / scale) : WideU8{};
      if (k + kWide <= valid) {
        store(row + k, bytes);
      } else {
        std::memcpy(row + k, &bytes, valid - k);
      }
    }
  }
}

inline bool pack_fp8(const PanelSource& source, uint8_t* dst, int64_t block_stride) {
  alignas(64) uint8_t buffer[kPanelRows * kFp8ScaleBlock];
  WU nan = {};
  for (int64_t k0 = 0; k0 < source.k; k0 += kFp8ScaleBlock, dst += block_stride) {
    const Fp8Block<uint8_t> block = fp8_block(dst);
    Fp8BlockData data = {};
    data.scale = source.rows > 0 ? source.scales[k0 / kFp8ScaleBlock] : 0.f;
    const uint8_t* rows = buffer;
    int64_t row_bytes = kFp8ScaleBlock;
    if (source.dtype == DType::kFp8) {
      rows = source_rows<kFp8ScaleBlock>(source, k0, kFp8Padding, buffer, &row_bytes);
    } else {
      fp8_quantize(source, k0, data.scale, buffer);
    }
    WU small[32 / kWide] = {};
    transpose_words<32>(rows, row_bytes, block.codes, [&](WU codes, int w) {
      // Sums within a byte: its top bit stays clear for codes without exponent bits, and is set for
      // NaN.
      small[w / kWide] |= ~((codes & 0x78787878u) + 0x7f7f7f7fu) & 0x80808080u;
      nan |= ((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
      // The second and third of four inputs change places.
      return (codes & 0xff0000ffu) | ((codes >> 8) & 0x0000ff00u) | ((codes << 8) & 0x00ff0000u);
    });
    for (int w = 0; w < 32; ++w) {
      data.small |= static_cast<uint32_t>(small[w / kWide][w % kWide] != 0) << w;
    }
    std::memcpy(block.data, &data, sizeof(data));
  }
  uint32_t any_nan = 0;
  for (int i = 0; i < kWide; ++i) any_nan |= nan[i];
  return any_nan == 0;
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
