// Attention's arithmetic on bf16 tiles (AMX), real or emulated.
#pragma once

#ifndef MOEJET_ISA_NS
#error "attention-tiles-inl.h belongs into a file of isa/"
#endif

#include "attention-bf16-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Scores with 16 keys as the rows of an A tile, the cache being the tile's memory; mix with query
// rows as the rows, for which the weights of a panel are transposed. B tiles are packed queries,
// and values interleaved by pairs of keys.
template <class Tiles>
struct TileDot : Bf16Elements {
  using Scope = Tiles;
  static constexpr int kDimStep = kTileK, kGroup = kTileRows, kKeyStep = kTileK;
  static constexpr int kKeyBlock = kMaxKeyBlock;  // long: tiles of sums are stored once per block
  static constexpr bool kValueRows = false;
  static constexpr int kTileElems = kTileBytes / 4;
  static constexpr int64_t kPanelStride = kKeyBlock / 2 * kQueryPanel;

  // Interleaves the values of all keys: [panel of 16 columns][key pair][16]. Column by column of
  // cache lines: writing across panels, which lie a power of two apart, would hit one set of the L1
  // cache all the time.
  static void set_values(const uint16_t* const* rows, int count, int64_t cols, Elem* dst,
                         Keys<TileDot>* keys) {
    keys->values = dst;
    keys->value_panel = kPanelStride;
    for (int64_t c = 0; c < cols; c += 32) {
      const int64_t n = cols - c;
      const __mmask32 valid = n >= 32 ? 0xffffffffu : (1u << n) - 1;
      Elem* panel = dst + c / kQueryPanel * kPanelStride;
      for (int t = 0; t < round_up(count, kKeyStep); t += 2, panel += kQueryPanel) {
        const auto load = [&](int key) {
          return key < count ? _mm512_maskz_loadu_epi16(valid, rows[key] + c)
                             : _mm512_setzero_si512();
        };
        const __m512i a = load(t), b = load(t + 1);
        _mm512_storeu_si512(panel, interleave_low(a, b));
        if (n > kQueryPanel) _mm512_storeu_si512(panel + kPanelStride, interleave_high(a, b));
      }
    }
  }

  // A 2 x 2 block of C tiles = sum over k of A tiles a0, a1 and B tiles b0, b1. Rows of A tiles are
  // lda bytes apart; one k step further, tiles lie a_step and kTileElems elements on. C tiles are
  // dense and lie `right` and `below` elements apart. Without a1 or b1, its C tiles are left alone.
  static void block(Tiles& tiles, Ahead* ahead, const Elem* a0, const Elem* a1, int64_t lda0,
                    int64_t lda1, int64_t a_step, const Elem* b0, const Elem* b1, int64_t count,
                    float* c, int64_t right, int64_t below) {
    tiles.template zero<0>();
    tiles.template zero<1>();
    tiles.template zero<2>();
    tiles.template zero<3>();
    for (int64_t k = 0; k < count; ++k) {
      ahead->step();
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
    tiles.template store<0>(c, 64);
    if (b1 != nullptr) tiles.template store<1>(c + right, 64);
    if (a1 != nullptr) {
      tiles.template store<2>(c + below, 64);
      if (b1 != nullptr) tiles.template store<3>(c + below + right, 64);
    }
  }

  static void scores(Tiles& tiles, const Keys<TileDot>& keys, const Elem* queries, int64_t elements,
                     int panels, AttentionWorker* worker) {
    const auto stride = [&](int t) {
      return reinterpret_cast<const uint8_t*>(keys.rows[t + 1]) -
             reinterpret_cast<const uint8_t*>(keys.rows[t]);
    };
    Ahead none = {};
    const int64_t panel = elements * kQueryPanel;
    for (int t = 0; t < keys.count; t += 2 * kTileRows) {
      const int second = t + kTileRows < keys.count ? t + kTileRows : t;
      for (int p = 0; p < panels; p += 2) {
        const Elem* b = queries + p * panel;
        block(tiles, &none, keys.rows[t], second > t ? keys.rows[second] : nullptr, stride(t),
              stride(second), 16, b, p + 1 < panels ? b + panel : nullptr, elements / 16,
              worker->scores + (p * kKeyBlock + t) * kQueryPanel, kKeyBlock * kQueryPanel,
              kTileElems);
      }
    }
  }

  // Weights [key pair][row] to A tiles [panel][32 keys][row][key pair], behind the former.
  static Elem* weight_tiles(Elem* weights) { return weights + kKeyBlock / 2 * kQueryBlock; }
  static void finish_weights(Elem* weights, int panels, int count) {
    Elem* tile = weight_tiles(weights);
    for (int p = 0; p < panels; ++p) {
      for (int t = 0; t < count; t += kTileK, tile += kTileElems) {
        Vec::transpose16(
            reinterpret_cast<const float*>(weights + (p * kKeyBlock + t) / 2 * kQueryPanel),
            kQueryPanel, reinterpret_cast<float*>(tile));
      }
    }
  }

  static void mix(Tiles& tiles, const float* decay, const Sums& sums, Keys<TileDot>* keys,
                  AttentionWorker* worker) {
    const Elem* weights = weight_tiles(static_cast<Elem*>(worker->weights));
    const int64_t k_tiles = (keys->count + kTileK - 1) / kTileK;
    for (int64_t column = 0; column < sums.cols; column += 2 * kQueryPanel) {
      const Elem* b = keys->values + column / kQueryPanel * keys->value_panel;
      const bool two_columns = column + kQueryPanel < sums.cols;
      for (int row = 0; row < sums.rows; row += 2 * kTileRows) {
        const Elem* a = weights + row / kTileRows * k_tiles * kTileElems;
        const bool two_rows = row + kTileRows < sums.rows;
        block(tiles, &keys->ahead, a, two_rows ? a + k_tiles * kTileElems : nullptr, 64, 64,
              kTileElems, b, two_columns ? b + keys->value_panel : nullptr, k_tiles,
              worker->product, kTileElems, 2 * kTileElems);
        const int rows = sums.rows - row < 2 * kTileRows ? sums.rows - row : 2 * kTileRows;
        add_product(worker->product, decay + row, rows, sums, row, column);
      }
    }
  }
  static int64_t mix_steps(int64_t rows, int64_t cols, int64_t keys) {
    return (cols + 31) / 32 * ((rows + 31) / 32) * ((keys + kTileK - 1) / kTileK);
  }

  static void add_product(const float* product, const float* decay, int rows, const Sums& sums,
                          int row, int64_t column) {
    for (int i = 0; i < rows; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int64_t left = sums.cols - column - half * kQueryPanel;
        if (left <= 0) continue;
        float* p = sums.data + (row + i) * sums.stride + column + half * kQueryPanel;
        const int tile = i / kTileRows * 2 + half;
        Vec::V v = Vec::load(product + tile * kTileElems + i % kTileRows * kQueryPanel);
        if (!sums.first) v = Vec::fma(load_part(p, left), Vec::broadcast(decay[i]), v);
        store_part(p, v, left);
      }
    }
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
