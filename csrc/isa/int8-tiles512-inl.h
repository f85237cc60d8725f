// int8 arithmetic on tiles for the integer formats, with AVX-512 around real and emulated tiles.
//
// Activations and weights have one scale per row and 128 inputs (kInt8Group). A group's products
// are exact int32 sums in tiles; then they are stored, multiplied by both scales and added to fp32
// results. Weights are the packed form of int8 (pack.h), whose panel block is two B tiles followed
// by 16 scales: int8 panels as they lie in memory, int4 ones requantised to it.
//
// Tile registers: 0..3 sums of a block of 2 x 2 tiles, 4 and 5 A (16 rows x 64 k), 6 and 7 B (64 k
// x 16 columns as 16 rows of four k).
//
// What to expect (estimated, not measured): for 32 rows, 32 columns and 128 inputs, 8 tile products
// take 128 cycles, half of what bf16 takes. Scaling the sums takes 64 times convert, multiply,
// multiply-add and store: 96 cycles of the two vector ports, and with the tiles' lines some 160 of
// the two load ports. It runs while the next products do, so load ports set the limit: 70 to 80 %
// of the int8 ceiling at best. Since every group's sums leave the tiles anyway, short chunks of k
// cost nothing, and B stays in L1.
#pragma once

#ifndef MOEJET_ISA_NS
#error "int8-tiles512-inl.h belongs into a file of isa/"
#endif

#include "avx512-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Rows from which an expert goes to int8 tiles. An estimate: in a prototype, this arithmetic took
// as long for 1 to 16 rows as the vector kernels for some 6.
constexpr int kMinTileRowsInt8 = 6;

constexpr int kInt8ChunkGroups = 4;  // unpacked at a time: 4 groups x 2 panels x 2 KB, half of L1
constexpr int kInt8BlockBytes = block_shape(Format::kInt8).bytes;
static_assert(block_shape(Format::kInt8).k == kInt8Group, "a packed int8 block is a group");

// Multiplies int8 tiles in Registers (AmxTiles, EmulatedTiles).
template <class Registers>
class Int8TileBlocks {
 public:
  static constexpr Arithmetic kArithmetic = Arithmetic::kInt8;
  static constexpr int min_rows(Format) { return kMinTileRowsInt8; }

  // x[0..k_padded), quantised, to rows row_of(0) .. row_of(count - 1).
  template <class RowOf>
  static void store_row(const float* x, int64_t k_padded, const TileActivations& acts,
                        int64_t count, const RowOf& row_of) {
    for (int64_t g = 0; count > 0 && g < ceil_div(k_padded, kInt8Group); ++g) {
      store_group(x + g * kInt8Group, k_padded, g, acts, count, row_of);
    }
  }

  // The 16 rows of one tile from bf16. Those that belong to no expert hold anything before and
  // afterwards.
  static void quantize_tile(const TileActivations& acts, int64_t k_padded, int64_t tile) {
    for (int64_t row = tile * kTileRows; row < (tile + 1) * kTileRows; ++row) {
      for (int64_t g = 0; g < ceil_div(k_padded, kInt8Group); ++g) {
        alignas(64) float x[kInt8Group];
        for (int64_t kt = 0; kt < 2 * group_tiles(k_padded, g); ++kt) {
          const uint16_t* src = tile_row(acts.bf16, k_padded, row, 4 * g + kt);
          moejet::MOEJET_ISA_NS::store(x + kt * kTileK, bf16_lanes(src));
          moejet::MOEJET_ISA_NS::store(x + kt * kTileK + kLanes, bf16_lanes(src + kLanes));
        }
        store_group(x, k_padded, g, acts, 1, [&](int64_t) { return row; });
      }
    }
  }

  // results[pair][m][0..31] = A B for rows [first, first + m) of A, first a multiple of 16. Writes
  // whole tiles.
  template <class TileMk>
  void gemm(const PairRun& pairs, const TileActivations& acts, int64_t first, int m, float* results,
            uint8_t* unpacked) {
    constexpr BlockShape kBlock = block_shape(TileMk::kFormat);
    const int64_t k_padded = pairs.geometry->k_padded;
    const int64_t num_groups = ceil_div(k_padded, kInt8Group);
    const int row_tiles = (m + kTileRows - 1) / kTileRows;
    const Chunks chunks = {pairs, kInt8ChunkGroups * kInt8Group / kBlock.k, 2 * kBlock.bytes};
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const uint8_t* b = TileMk::int8_blocks(chunks.data(i), chunks.num_blocks(i), unpacked);
      const int64_t g0 = chunks.first_block(i) * kBlock.k / kInt8Group;
      const int64_t g_end = smaller(g0 + kInt8ChunkGroups, num_groups);
      float* c = results + chunks.pair(i) * result_stride(m);
      Sums pending = {};
      for (int mt = 0; mt < row_tiles; mt += 2) {
        const bool two = mt + 1 < row_tiles;
        const int64_t tile = first / kTileRows + mt;
        for (int64_t g = g0; g < g_end; ++g) {
          const uint8_t* block = b + (g - g0) * 2 * kInt8BlockBytes;
          const int8_t* a = a_tile(acts, k_padded, tile, g);
          multiply(a, two ? a + k_padded / kInt8TileK * kTileBytes : nullptr, block,
                   group_tiles(k_padded, g));
          // The tiles are busy for a while now: meanwhile, the sums before these.
          add_scaled(pending);
          store_sums(two);
          const float* scale = acts.scale + (tile * num_groups + g) * kTileRows;
          pending = {c + mt * kTileRows * kPairCols,
                     {scale, two ? scale + num_groups * kTileRows : nullptr},
                     block,
                     g == 0};
        }
      }
      add_scaled(pending);
    }
  }

 private:
  // Sums of one group in sums_, to be added to results.
  struct Sums {
    float* results;         // [16 or 32][32], null: none
    const float* scale[2];  // [16] of each row tile, null: no second one
    const uint8_t* block;   // of both panels
    bool first;             // results hold nothing yet
  };

  // Tiles of k in group g: the last one may have a single tile.
  static int64_t group_tiles(int64_t k_padded, int64_t g) {
    return smaller(2, k_padded / kInt8TileK - 2 * g);
  }

  static int8_t* a_tile(const TileActivations& acts, int64_t k_padded, int64_t tile, int64_t g) {
    return acts.q + (tile * (k_padded / kInt8TileK) + 2 * g) * kTileBytes;
  }

  // Group g, x[0..127] (x[0..63] if it has a single tile), quantised, to rows row_of(0) ..
  // row_of(count - 1).
  template <class RowOf>
  static void store_group(const float* x, int64_t k_padded, int64_t g, const TileActivations& acts,
                          int64_t count, const RowOf& row_of) {
    const int64_t num_tiles = group_tiles(k_padded, g);
    alignas(64) int8_t q[kInt8Group];
    const float scale = quantize(x, static_cast<int>(num_tiles * 4), q);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = row_of(i), tile = row / kTileRows, r = row % kTileRows;
      int8_t* dst = a_tile(acts, k_padded, tile, g) + r * kInt8TileK;
      for (int64_t kt = 0; kt < num_tiles; ++kt) {
        std::memcpy(dst + kt * kTileBytes, q + kt * kInt8TileK, kInt8TileK);
      }
      acts.scale[(tile * ceil_div(k_padded, kInt8Group) + g) * kTileRows + r] = scale;
    }
  }

  // 16 num values to codes -127..127, by the rules of quantize_group: NaN or infinity makes the
  // scale NaN, magnitudes below 1e-30 count as zero. Returns the scale.
  static float quantize(const float* x, int num, int8_t* q) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < num; ++i) {
      const __m512i bits = _mm512_loadu_si512(x + 16 * i);
      largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const int32_t max_bits = _mm512_reduce_max_epi32(largest);
    float amax;
    std::memcpy(&amax, &max_bits, sizeof(amax));
    if (max_bits >= 0x7f800000 || amax < 1e-30f) {
      std::memset(q, 0, 16 * num);
      return max_bits >= 0x7f800000 ? __builtin_nanf("") : 0.f;
    }
    const __m512 inverse = _mm512_set1_ps(127.f / amax);
    for (int i = 0; i < num; ++i) {
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), inverse));
      _mm_store_si128(reinterpret_cast<__m128i*>(q + 16 * i), _mm512_cvtepi32_epi8(code));
    }
    return amax / 127.f;
  }

  // One group of both panels and one row tile, or two if a1 is not null, into tiles 0..3.
  void multiply(const int8_t* a0, const int8_t* a1, const uint8_t* block, int64_t k_tiles) {
    tiles_.template zero<0>();
    tiles_.template zero<1>();
    tiles_.template zero<2>();
    tiles_.template zero<3>();
    for (int64_t k = 0; k < k_tiles; ++k) {
      tiles_.template load<4>(a0 + k * kTileBytes, 64);
      tiles_.template load<6>(block + k * kTileBytes, 64);
      tiles_.template load<7>(block + kInt8BlockBytes + k * kTileBytes, 64);
      tiles_.template dot_int8<0, 4, 6>();
      tiles_.template dot_int8<1, 4, 7>();
      if (a1 != nullptr) {
        tiles_.template load<5>(a1 + k * kTileBytes, 64);
        tiles_.template dot_int8<2, 5, 6>();
        tiles_.template dot_int8<3, 5, 7>();
      }
    }
  }

  void store_sums(bool two) {
    constexpr int64_t kRowBytes = kPairCols * sizeof(int32_t);
    tiles_.template store<0>(sums_, kRowBytes);
    tiles_.template store<1>(sums_ + kPanelRows, kRowBytes);
    if (two) {
      tiles_.template store<2>(sums_ + kTileRows * kPairCols, kRowBytes);
      tiles_.template store<3>(sums_ + kTileRows * kPairCols + kPanelRows, kRowBytes);
    }
  }

  void add_scaled(const Sums& sums) const {
    for (int t = 0; t < 2 && sums.results != nullptr && sums.scale[t] != nullptr; ++t) {
      if (sums.first) {
        add_tile<true>(sums, t);
      } else {
        add_tile<false>(sums, t);
      }
    }
  }
  template <bool kFirst>
  void add_tile(const Sums& sums, int t) const {
    const float* weight_scale = reinterpret_cast<const float*>(sums.block + 2 * kTileBytes);
    const __m512 scale0 = _mm512_load_ps(weight_scale);
    const __m512 scale1 = _mm512_load_ps(weight_scale + kInt8BlockBytes / sizeof(float));
    const auto add = [](const int32_t* sum, __m512 weight, float scale, float* out) {
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(load512(sum)), weight);
      const __m512 before = kFirst ? _mm512_setzero_ps() : _mm512_loadu_ps(out);
      _mm512_storeu_ps(out, _mm512_fmadd_ps(scaled, _mm512_set1_ps(scale), before));
    };
    const int32_t* sum = sums_ + t * kTileRows * kPairCols;
    float* out = sums.results + t * kTileRows * kPairCols;
    for (int r = 0; r < kTileRows; ++r, sum += kPairCols, out += kPairCols) {
      add(sum, scale0, sums.scale[t][r], out);
      add(sum + kPanelRows, scale1, sums.scale[t][r], out + kPanelRows);
    }
  }

  Registers tiles_;
  // One group's sums. Read by add_scaled before store_sums writes the next ones, in program order.
  alignas(64) int32_t sums_[2 * kTileRows * kPairCols];
};

template <class TilesT>
struct Int8AsPacked {
  using Tiles = TilesT;
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kMinRows = Tiles::min_rows(kFormat);

  // Panel blocks of both panels in the packed form of int8, block by block.
  static const uint8_t* int8_blocks(const uint8_t* pair, int64_t, uint8_t*) { return pair; }
};

template <class TilesT>
struct Int4AsInt8 {
  using Tiles = TilesT;
  static constexpr Format kFormat = Format::kInt4G32;
  static constexpr int kMinRows = Tiles::min_rows(kFormat);
  static constexpr int kBlockBytes = block_shape(kFormat).bytes;

  static const uint8_t* int8_blocks(const uint8_t* pair, int64_t num_blocks, uint8_t* unpacked) {
    uint8_t* out = unpacked;
    for (int64_t b = 0; b < num_blocks; b += 2) {
      for (int panel = 0; panel < 2; ++panel, out += kInt8BlockBytes) {
        const uint8_t* first = pair + (2 * b + panel) * kBlockBytes;
        requantize(first, b + 1 < num_blocks ? first + 2 * kBlockBytes : nullptr, out);
      }
    }
    return unpacked;
  }

 private:
  // One panel's two blocks (second may be null) to 128 inputs with a common scale. A group's codes,
  // times 16, are multiplied by (its scale / the common one) times 2048 and 2^-15, rounded. The
  // common scale is 8 / 127 of the largest, so that code -8 becomes -127 and a factor is 32512 at
  // most.
  static void requantize(const uint8_t* first, const uint8_t* second, uint8_t* out) {
    prefetch(first + 512);
    const __m512i a = load512(first + 512);
    __m512i b = _mm512_setzero_si512();
    if (second != nullptr) {
      prefetch(second + 512);
      b = load512(second + 512);
    }
    const __m512 scales[4] = {low_halves(a), high_halves(a), low_halves(b), high_halves(b)};
    __m512 largest = _mm512_abs_ps(scales[0]);
    for (int g = 1; g < 4; ++g) largest = _mm512_max_ps(largest, _mm512_abs_ps(scales[g]));
    // As everywhere, what is below 1e-30 counts as zero: the quotient must not overflow.
    const __mmask16 used = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(1e-30f), _CMP_GE_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(used, _mm512_set1_ps(32512.f), largest);
    _mm512_store_ps(out + 2 * kTileBytes,
                    _mm512_maskz_mul_ps(used, largest, _mm512_set1_ps(8.f / 127.f)));
    __m512i factors[4];
    for (int g = 0; g < 4; ++g) {
      const __m512i factor = _mm512_cvtps_epi32(_mm512_mul_ps(scales[g], inverse));
      factors[g] = _mm512_mask_blend_epi16(0xaaaaaaaau, factor, _mm512_slli_epi32(factor, 16));
    }
    scale_codes(first, factors[0], factors[1], out);
    if (second != nullptr) scale_codes(second, factors[2], factors[3], out + kTileBytes);
  }

  // One panel block to one B tile: 17 operations for 128 codes, 9 of them bound to port 0 on Intel.
  static void scale_codes(const uint8_t* block, __m512i low_factor, __m512i high_factor,
                          uint8_t* tile) {
    for (int v = 0; v < 8; ++v) {
      prefetch(block + 64 * v);
      const __m512i w = load512(block + 64 * v);
      _mm512_store_si512(tile + 64 * v, scale_high_nibbles(_mm512_slli_epi16(w, 4), low_factor));
      _mm512_store_si512(tile + 64 * (8 + v), scale_high_nibbles(w, high_factor));
    }
  }

  // 64 codes 0..15 in the high nibbles to round((code - 8) * factor / 2048).
  static __m512i scale_high_nibbles(__m512i w, __m512i factor) {
    // 16 (code - 8) in 16 bits, of the bytes with even and with odd numbers.
    const __m512i even =
        _mm512_sub_epi16(_mm512_and_si512(w, _mm512_set1_epi16(0x00f0)), _mm512_set1_epi16(0x0080));
    constexpr int kAndXor = 0x6a;  // (a & b) ^ c
    const __m512i odd = _mm512_srai_epi16(
        _mm512_ternarylogic_epi32(w, _mm512_set1_epi16(static_cast<int16_t>(0xf000)),
                                  _mm512_set1_epi16(static_cast<int16_t>(0x8000)), kAndXor),
        8);
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, _mm512_mulhrs_epi16(even, factor),
                                  _mm512_slli_epi16(_mm512_mulhrs_epi16(odd, factor), 8));
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
