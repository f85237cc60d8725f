// Matrix multiplication on bf16 tiles (AMX), and an emulation of the tile registers. For int8 tiles
// see isa/int8-tiles512-inl.h.
//
// Tile registers: 0..3 accumulate C (2 x 2 tiles of 16 x 16 fp32), 4 and 5 hold A (16 rows x 32 k),
// 6 and 7 hold B (32 k x 16 columns as 16 rows of k-pairs: one packed bf16 panel block).
#pragma once

#ifndef MOEJET_ISA_NS
#error "tiles-inl.h belongs into a file of isa/"
#endif

#include "gemm-inl.h"
#include "lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Rows from which an expert goes to tiles. A tile multiply costs the same for 1 to 16 rows and the
// unpacking comes on top; the vector kernels' time grows with the rows and meets it near 6 to 8
// rows in int4 and int8. Floating-point weights need little unpacking or none, and their vector
// kernels have fewer products in an instruction.
constexpr int kMinTileRowsInt = 8;
constexpr int kMinTileRowsFloat = 4;

constexpr int kTileBytes = 1024;
constexpr int kTileWords = kTileBytes / 2;

// The architecture's 64-byte tile configuration: palette 1, eight tiles of 16 rows x 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the processor reads exactly 64 bytes");

// Tile registers in memory, with the semantics of the instructions except for denormals and the
// rounding of intermediate sums. An instance stands for one configured thread.
class EmulatedTiles {
 public:
  template <int T>
  void zero() {
    std::memset(tile_[T], 0, kTileBytes);
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r) {
      std::memcpy(tile_[T] + 64 * r, static_cast<const uint8_t*>(p) + r * stride, 64);
    }
  }
  template <int T>
  void store(void* p, int64_t stride) const {
    for (int r = 0; r < 16; ++r) {
      std::memcpy(static_cast<uint8_t*>(p) + r * stride, tile_[T] + 64 * r, 64);
    }
  }
  // C[m][n] += sum over k-pairs of A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1]
  template <int C, int A, int B>
  void dot_bf16() {
    for (int m = 0; m < 16; ++m) {
      F sum = moejet::MOEJET_ISA_NS::load<F>(tile_[C] + 64 * m);
      for (int k = 0; k < 16; ++k) {
        uint32_t a;
        std::memcpy(&a, tile_[A] + 64 * m + 4 * k, sizeof(a));
        const U b = moejet::MOEJET_ISA_NS::load<U>(tile_[B] + 64 * k);
        const U even = (U{} + (a << 16)), odd = (U{} + (a & 0xffff0000u));
        sum = sum + (F)even * (F)(b << 16);
        sum = sum + (F)odd * (F)(b & 0xffff0000u);
      }
      moejet::MOEJET_ISA_NS::store(tile_[C] + 64 * m, sum);
    }
  }
  // C[m][n] += sum over j < 4, k of A[m][4k + j] B[k][4n + j], int8 to int32
  template <int C, int A, int B>
  void dot_int8() {
    for (int k = 0; k < 16; ++k) {
      const I b = moejet::MOEJET_ISA_NS::load<I>(tile_[B] + 64 * k);
      const I parts[4] = {(b << 24) >> 24, (b << 16) >> 24, (b << 8) >> 24, b >> 24};
      for (int m = 0; m < 16; ++m) {
        I sum = moejet::MOEJET_ISA_NS::load<I>(tile_[C] + 64 * m);
        for (int j = 0; j < 4; ++j) {
          sum = sum + parts[j] * static_cast<int8_t>(tile_[A][64 * m + 4 * k + j]);
        }
        moejet::MOEJET_ISA_NS::store(tile_[C] + 64 * m, sum);
      }
    }
  }

 private:
  alignas(64) uint8_t tile_[8][kTileBytes];
};

inline uint16_t* tile_row(uint16_t* tiles, int64_t k_padded, int64_t row, int64_t k_tile) {
  const int64_t tile = row / kTileRows * (k_padded / kTileK) + k_tile;
  return tiles + (tile * kTileRows + row % kTileRows) * kTileK;
}

// What the classes that multiply bf16 tiles share: the form of activations.
struct Bf16TileRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kBf16;

  // x[0..k_padded) to rows row_of(0) .. row_of(count - 1).
  template <class RowOf>
  static void store_row(const float* x, int64_t k_padded, const TileActivations& acts,
                        int64_t count, const RowOf& row_of) {
    for (int64_t kt = 0; count > 0 && kt < k_padded / kTileK; ++kt) {
      uint16_t rounded[kTileK];
      store_bf16(load<F>(x + kt * kTileK), rounded);
      store_bf16(load<F>(x + kt * kTileK + kLanes), rounded + kLanes);
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(tile_row(acts.bf16, k_padded, row_of(i), kt), rounded, sizeof(rounded));
      }
    }
  }
};

// Matrix multiplication on tile registers, real (AmxTiles) or emulated.
template <class Registers>
class TileBlocks : public Bf16TileRows {
 public:
  static constexpr int min_rows(Format format) {
    return takes_fp32(format) ? kMinTileRowsFloat : kMinTileRowsInt;
  }

  // results[pair][m][0..31] = A B for rows [first, first + m) of A, first a multiple of 16. Writes
  // whole tiles.
  template <class TileMk>
  void gemm(const PairRun& pairs, const TileActivations& acts, int64_t first, int m, float* results,
            uint8_t* unpacked) {
    const uint16_t* a = tile_row(acts.bf16, pairs.geometry->k_padded, first, 0);
    for (int p = 0; p < pairs.num; ++p) {
      pair_gemm<TileMk>(pairs.pair(p), *pairs.geometry, a, m, results + p * result_stride(m),
                        reinterpret_cast<uint16_t*>(unpacked));
    }
  }

 private:
  template <class TileMk>
  void pair_gemm(const uint8_t* pair, const PairGeometry& geometry, const uint16_t* a, int m,
                 float* c, uint16_t* unpacked) {
    constexpr int ld = kPairCols;
    constexpr BlockShape kBlock = block_shape(TileMk::kFormat);
    constexpr int64_t kChunkBlocks = kTileChunkK / kBlock.k;
    const int64_t k_tiles = geometry.k_padded / kTileK;
    const int64_t num_chunks = (geometry.num_blocks + kChunkBlocks - 1) / kChunkBlocks;
    const int row_tiles = (m + kTileRows - 1) / kTileRows;
    const int64_t ld_bytes = ld * static_cast<int64_t>(sizeof(float));
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int64_t block = geometry.num_blocks * chunk / num_chunks;
      const int64_t block_end = geometry.num_blocks * (chunk + 1) / num_chunks;
      const uint16_t* b =
          TileMk::b_tiles(pair + block * 2 * kBlock.bytes, block_end - block, unpacked);
      const int64_t kt_begin = block * kBlock.k / kTileK;
      const int64_t count = (block_end - block) * kBlock.k / kTileK;
      for (int mt = 0; mt < row_tiles; mt += 2) {
        const bool two = mt + 1 < row_tiles;
        const uint16_t* a0 = a + (mt * k_tiles + kt_begin) * kTileWords;
        const uint16_t* a1 = a0 + k_tiles * kTileWords;
        float* c0 = c + mt * kTileRows * ld;
        float* c1 = c0 + kTileRows * ld;
        if (chunk == 0) {
          tiles_.template zero<0>();
          tiles_.template zero<1>();
          tiles_.template zero<2>();
          tiles_.template zero<3>();
        } else {
          tiles_.template load<0>(c0, ld_bytes);
          tiles_.template load<1>(c0 + kPanelRows, ld_bytes);
          if (two) {
            tiles_.template load<2>(c1, ld_bytes);
            tiles_.template load<3>(c1 + kPanelRows, ld_bytes);
          }
        }
        for (int64_t k = 0; k < count; ++k) {
          tiles_.template load<4>(a0 + k * kTileWords, 64);
          tiles_.template load<6>(b + 2 * k * kTileWords, 64);
          tiles_.template load<7>(b + (2 * k + 1) * kTileWords, 64);
          tiles_.template dot_bf16<0, 4, 6>();
          tiles_.template dot_bf16<1, 4, 7>();
          if (two) {
            tiles_.template load<5>(a1 + k * kTileWords, 64);
            tiles_.template dot_bf16<2, 5, 6>();
            tiles_.template dot_bf16<3, 5, 7>();
          }
        }
        tiles_.template store<0>(c0, ld_bytes);
        tiles_.template store<1>(c0 + kPanelRows, ld_bytes);
        if (two) {
          tiles_.template store<2>(c1, ld_bytes);
          tiles_.template store<3>(c1 + kPanelRows, ld_bytes);
        }
      }
    }
  }

  Registers tiles_;
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
