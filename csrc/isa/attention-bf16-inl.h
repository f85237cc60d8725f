// bf16 elements of attention (two neighbours of the summed dimension in 32 bits) and the arithmetic
// on tiles. bf16 caches only.
#pragma once

#ifndef MOEJET_ISA_NS
#error "attention-bf16-inl.h belongs into a file of isa/"
#endif

#include "attention-inl.h"
#include "tiles512-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Rows a and b of n bf16 values to pairs (a[i], b[i]), 16 to a panel, panels `panel` elements
// apart. b null: zeros. Padded with zeros to a whole panel.
inline void interleave(const uint16_t* a, const uint16_t* b, int64_t n, int64_t panel,
                       uint32_t* dst) {
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = load512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t i = 0; i < n; i += 32, dst += 2 * panel) {
    const __mmask32 valid = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1;
    const __m512i va = _mm512_maskz_loadu_epi16(valid, a + i);
    const __m512i vb =
        b == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(valid, b + i);
    _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(va, low, vb));
    if (n - i > 16) _mm512_storeu_si512(dst + panel, _mm512_permutex2var_epi16(va, high, vb));
  }
}

// What the arithmetics on bf16 elements have in common. A derives from it.
template <class A, int kKeyBlockT, int kKeyStepT>
struct Bf16Elements {
  using Elem = uint32_t;
  using Scalar = uint16_t;
  static constexpr int kPair = 2, kKeyBlock = kKeyBlockT, kKeyStep = kKeyStepT;

  static Vec::V exp2(Vec::V x) { return Vec::exp2_fast(x); }
  static void copy(const void* src, DType, int64_t n, uint16_t* dst) {
    std::memcpy(dst, src, n * sizeof(uint16_t));
  }
  static void pack_queries(const float* staging, int64_t ld, int64_t elements, Elem* dst) {
    alignas(64) float columns[16 * kQueryPanel];
    for (int64_t e = 0; e < elements; e += 8) {
      Vec::transpose16(staging + 2 * e, ld, columns);
      for (int64_t i = 0; i < 8; ++i) {
        store_weights(dst + (e + i) * kQueryPanel, Vec::load(columns + 32 * i),
                      Vec::load(columns + 32 * i + 16));
      }
    }
  }
  static void store_weights(Elem* dst, Vec::V even, Vec::V odd) {
    _mm512_storeu_si512(dst, bf16_pairs(even, odd));
  }
  static void load_latent_values(const AttentionBatch& batch, const uint8_t* const* rows, int64_t,
                                 AttentionWorker* worker, Keys<A>* keys) {
    Elem* dst = static_cast<Elem*>(worker->values);
    interleave_rows([&](int t) { return reinterpret_cast<const uint16_t*>(rows[t]); }, keys->count,
                    batch.rank, dst);
    keys->values = dst;
    keys->value_step = value_step(batch.rank);
    keys->value_panel = value_panel();
  }
  static int64_t value_step(int64_t) { return kQueryPanel; }
  static int64_t value_panel() { return kKeyBlock / 2 * kQueryPanel; }
  static void pack_values(const void* src, int64_t stride, int count, int64_t cols, Elem* dst) {
    const uint16_t* rows = static_cast<const uint16_t*>(src);
    interleave_rows([&](int t) { return rows + t * stride; }, count, cols, dst);
  }
  // Column by column of cache lines: writing across panels, which lie a power of two apart, would
  // hit one set of the L1 cache all the time.
  template <class RowOf>
  static void interleave_rows(const RowOf& row_of, int count, int64_t cols, Elem* dst) {
    for (int64_t c = 0; c < cols; c += 32) {
      const int64_t n = smaller(32, cols - c);
      Elem* panel = dst + c / kQueryPanel * value_panel();
      int t = 0;
      for (; t + 2 <= count; t += 2, panel += kQueryPanel) {
        interleave(row_of(t) + c, row_of(t + 1) + c, n, value_panel(), panel);
      }
      if (t < count) {
        interleave(row_of(t) + c, nullptr, n, value_panel(), panel);
        t += 2;
        panel += kQueryPanel;
      }
      for (; t < round_up(count, kKeyStep); t += 2, panel += kQueryPanel) {
        std::memset(panel, 0, kQueryPanel * sizeof(Elem));
        if (n > kQueryPanel) std::memset(panel + value_panel(), 0, kQueryPanel * sizeof(Elem));
      }
    }
  }
};

// Scores with 16 keys as the rows of an A tile, the cache being the tile's memory; mix with query
// rows as the rows, for which the weights of a panel are transposed.
template <class Tiles>
struct TileDot : Bf16Elements<TileDot<Tiles>, kMaxKeyBlock, 32> {
  using Base = Bf16Elements<TileDot<Tiles>, kMaxKeyBlock, 32>;
  using typename Base::Elem;
  using Scope = Tiles;
  static constexpr int kDimStep = kTileK, kGroup = kTileRows;
  static constexpr int kTileElems = kTileRows * 16;  // 32-bit elements of a tile

  // c, a 2 x 2 block of tiles, = sum over k of A tiles a0, a1 and B tiles b0, b1. A tile rows are
  // lda bytes apart; one k step further, tiles lie a_step and kTileElems elements on. Without a1 or
  // b1, its part of c is left alone.
  static void block(Tiles& tiles, const Elem* a0, const Elem* a1, int64_t lda0, int64_t lda1,
                    int64_t a_step, const Elem* b0, const Elem* b1, int64_t count, float* c,
                    int64_t ldc) {
    tiles.template zero<0>();
    tiles.template zero<1>();
    tiles.template zero<2>();
    tiles.template zero<3>();
    for (int64_t k = 0; k < count; ++k) {
      tiles.template load<4>(a0 + k * a_step, lda0);
      tiles.template load<6>(b0 + k * kTileElems, 64);
      tiles.template dot_bf16<0, 4, 6>();
      if (b1 != nullptr) {
        tiles.template load<7>(b1 + k * kTileElems, 64);
        tiles.template dot_bf16<1, 4, 7>();
      }
      if (a1 != nullptr) {
        tiles.template load<5>(a1 + k * a_step, lda1);
        tiles.template dot_bf16<2, 5, 6>();
        if (b1 != nullptr) tiles.template dot_bf16<3, 5, 7>();
      }
    }
    const int64_t bytes = ldc * static_cast<int64_t>(sizeof(float));
    tiles.template store<0>(c, bytes);
    if (b1 != nullptr) tiles.template store<1>(c + 16, bytes);
    if (a1 != nullptr) {
      tiles.template store<2>(c + 16 * ldc, bytes);
      if (b1 != nullptr) tiles.template store<3>(c + 16 * ldc + 16, bytes);
    }
  }

  static void scores(Tiles& tiles, const Keys<TileDot>& keys, const Elem* queries, int64_t elements,
                     int panels, AttentionWorker* worker) {
    const auto stride = [&](int t) {
      return reinterpret_cast<const uint8_t*>(keys.rows[t + 1]) -
             reinterpret_cast<const uint8_t*>(keys.rows[t]);
    };
    const int64_t panel = elements * kQueryPanel;
    for (int t = 0; t < keys.count; t += 2 * kTileRows) {
      const bool two = t + kTileRows < keys.count;
      const int second = two ? t + kTileRows : t;
      for (int p = 0; p < panels; p += 2) {
        const Elem* b = queries + p * panel;
        block(tiles, keys.rows[t], two ? keys.rows[second] : nullptr, stride(t), stride(second), 16,
              b, p + 1 < panels ? b + panel : nullptr, elements / 16,
              worker->scores + t * kQueryBlock + p * kQueryPanel, kQueryBlock);
      }
    }
  }

  // Weights [key pair][row] to A tiles [panel][32 keys][row][key pair], behind the former.
  static Elem* weight_tiles(Elem* weights) { return weights + kMaxKeyBlock / 2 * kQueryBlock; }
  static void finish_weights(Elem* weights, int panels, int count) {
    Elem* tile = weight_tiles(weights);
    for (int p = 0; p < panels; ++p) {
      for (int t = 0; t < count; t += kTileK, tile += kTileElems) {
        Vec::transpose16(
            reinterpret_cast<const float*>(weights + t / 2 * kQueryBlock + p * kQueryPanel),
            kQueryBlock, reinterpret_cast<float*>(tile));
      }
    }
  }

  static void mix(Tiles& tiles, const Keys<TileDot>& keys, const float* decay, const Sums& sums,
                  AttentionWorker* worker) {
    const Elem* weights = weight_tiles(static_cast<Elem*>(worker->weights));
    const int64_t k_tiles = (keys.count + kTileK - 1) / kTileK;
    constexpr int kLd = 2 * kQueryPanel;
    for (int64_t column = 0; column < sums.cols; column += 2 * kQueryPanel) {
      const Elem* b = keys.values + column / kQueryPanel * keys.value_panel;
      const bool two_columns = column + kQueryPanel < sums.cols;
      for (int row = 0; row < sums.rows; row += 2 * kTileRows) {
        const Elem* a = weights + row / kTileRows * k_tiles * kTileElems;
        const bool two_rows = row + kTileRows < sums.rows;
        block(tiles, a, two_rows ? a + k_tiles * kTileElems : nullptr, 64, 64, kTileElems, b,
              two_columns ? b + keys.value_panel : nullptr, k_tiles, worker->product, kLd);
        const int rows = sums.rows - row < 2 * kTileRows ? sums.rows - row : 2 * kTileRows;
        add_product(worker->product, decay + row, rows, sums, row, column);
      }
    }
  }

  static void add_product(const float* product, const float* decay, int rows, const Sums& sums,
                          int row, int64_t column) {
    for (int i = 0; i < rows; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int64_t left = sums.cols - column - half * kQueryPanel;
        if (left <= 0) continue;
        float* p = sums.data + (row + i) * sums.stride + column + half * kQueryPanel;
        Vec::V v = Vec::load(product + (2 * i + half) * kQueryPanel);
        if (!sums.first) v = Vec::fma(load_part(p, left), Vec::broadcast(decay[i]), v);
        store_part(p, v, left);
      }
    }
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
