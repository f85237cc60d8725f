// The phases of an MoE layer as templates over a microkernel; see kernels.h for what each does.
//
// Vector microkernels are described in gemm-inl.h.
//
// A tile microkernel is a struct with
//   Tiles                      multiplies tiles in registers, real or emulated: bf16 (tiles-inl.h)
//                              or int8 (isa/int8-tiles512-inl.h)
//   kMinRows                   rows from which it is used
//   b_tiles(...)               weights as bf16 B tiles; int8 arithmetic: int8_blocks(...)
// or NoTiles.
#pragma once

#ifndef MOEJET_ISA_NS
#error "moe-inl.h belongs into a file of isa/"
#endif

#include "gemm-inl.h"
#include "gguf-pack-inl.h"
#include "lanes-inl.h"
#include "pack-inl.h"
#include "tiles-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

struct NoTiles {
  static constexpr int kMinRows = 0;
};

template <class Mk, class TileMk>
void prepare(const MoeBatch& batch, int64_t t, WorkerScratch* scratch) {
  const int64_t k_padded = batch.gate_up.k_padded;
  const Activations& acts = batch.x_acts;
  float* row = takes_fp32(Mk::kFormat) && batch.any_vector ? acts.f32 + t * acts.ld : scratch->row;
  const uint8_t* x = static_cast<const uint8_t*>(batch.x);
  load_row(x + t * batch.x_stride * dtype_bytes(batch.x_dtype), batch.x_dtype, batch.hidden_size,
           k_padded, row);
  if constexpr (!takes_fp32(Mk::kFormat)) {
    if (batch.any_vector) {
      quantize_row(row, k_padded, acts, t);
    }
  }
  if constexpr (TileMk::kMinRows > 0) {
    const int32_t begin = batch.token_begin[t], end = batch.token_begin[t + 1];
    TileMk::Tiles::store_row(row, k_padded, batch.x_tiles, end - begin,
                             [&](int64_t i) { return batch.token_tiles[begin + i]; });
  }
}

// h of one row and unit from its two pairs' [gate 16 | up 16]; padded channels are zero.
inline void unit_outputs(const float* first, const float* second, int64_t valid, float* h) {
  store(h, silu_mul(load<F>(first), load<F>(first + kLanes)));
  store(h + kLanes, silu_mul(load<F>(second), load<F>(second + kLanes)));
  for (int64_t i = valid; i < kUnitCols; ++i) h[i] = 0.f;
}

// Calls body(units in this step, their first, pairs) for [unit_begin, unit_end) of a slot.
template <class Body>
inline void for_unit_runs(const MoeBatch& batch, int slot, int64_t unit_begin, int64_t unit_end,
                          const Body& body) {
  constexpr int64_t kUnits = kPairBlock / 2;
  for (int64_t unit = unit_begin; unit < unit_end; unit += kUnits) {
    const int count = static_cast<int>(smaller(kUnits, unit_end - unit));
    const PairRun pairs = {batch.slot_weights[slot] + 2 * unit * batch.gate_up.pair_bytes,
                           2 * count, &batch.gate_up};
    body(unit, count, pairs);
  }
}

template <class TileMk>
void gate_up_tiles(const MoeBatch& batch, int slot, int64_t unit_begin, int64_t unit_end,
                   WorkerScratch* scratch) {
  typename TileMk::Tiles tiles;
  const int64_t rows = batch.slot_begin[slot + 1] - batch.slot_begin[slot];
  const int64_t first = batch.slot_tile[slot], h_padded = batch.down.k_padded;
  alignas(64) float h[kUnitCols];
  for_unit_runs(
      batch, slot, unit_begin, unit_end, [&](int64_t unit, int count, const PairRun& pairs) {
        for (int64_t row = 0; row < rows; row += kRowBlock) {
          const int m = static_cast<int>(smaller(kRowBlock, rows - row));
          tiles.template gemm<TileMk>(pairs, batch.x_tiles, first + row, m, scratch->results,
                                      scratch->unpacked);
          for (int u = 0; u < count; ++u) {
            const float* gate_up = scratch->results + 2 * u * result_stride(m);
            for (int i = 0; i < m; ++i, gate_up += kPairCols) {
              unit_outputs(gate_up, gate_up + result_stride(m),
                           batch.intermediate_size - (unit + u) * kUnitCols, h);
              uint16_t* dst = tile_row(batch.h_tiles.bf16, h_padded, first + row + i, unit + u);
              store_bf16(load<F>(h), dst);
              store_bf16(load<F>(h + kLanes), dst + kLanes);
            }
          }
        }
      });
  // The down projection reads whole blocks of k: clear what no unit writes.
  const int64_t num_units = batch.gate_up.num_pairs / 2;
  for (int64_t row = 0; unit_end == num_units && row < rows; ++row) {
    for (int64_t kt = num_units; kt < h_padded / kTileK; ++kt) {
      std::memset(tile_row(batch.h_tiles.bf16, h_padded, first + row, kt), 0, 2 * kTileK);
    }
  }
}

template <class TileMk>
void quantize_h(const MoeBatch& batch, int64_t tile) {
  TileMk::Tiles::quantize_tile(batch.h_tiles, batch.down.k_padded, tile);
}

// Row r of h, padded channels beyond the last unit.
template <class Mk>
inline void clear_padding(const MoeBatch& batch, int64_t r) {
  const Activations& h = batch.h_acts;
  const int64_t written = batch.gate_up.num_pairs / 2 * kUnitCols;
  if constexpr (takes_fp32(Mk::kFormat)) {
    std::memset(h.f32 + r * h.ld + written, 0, (h.ld - written) * sizeof(float));
  } else {
    std::memset(h.q + r * h.ld + written, 0, h.ld - written);
    for (int64_t g = written / kActGroup; g < h.ld_groups; ++g) {
      h.scale[r * h.ld_groups + g] = 0.f;
      h.offset[r * h.ld_groups + g] = 0;
    }
    std::memset(h.half_offset + 2 * (r * h.ld_groups + written / kActGroup), 0,
                2 * (h.ld_groups - written / kActGroup) * sizeof(int32_t));
  }
}

template <class Mk, class TileMk>
void gate_up(const MoeBatch& batch, int slot, int64_t unit_begin, int64_t unit_end,
             WorkerScratch* scratch) {
  if constexpr (TileMk::kMinRows > 0) {
    if (batch.slot_tile[slot] >= 0) {
      return gate_up_tiles<TileMk>(batch, slot, unit_begin, unit_end, scratch);
    }
  }
  const int64_t begin = batch.slot_begin[slot], end = batch.slot_begin[slot + 1];
  const Activations& acts = batch.h_acts;
  alignas(64) float h[kUnitCols];
  for_unit_runs(
      batch, slot, unit_begin, unit_end, [&](int64_t unit, int count, const PairRun& pairs) {
        for (int64_t row = begin; row < end; row += kRowBlock) {
          const int m = static_cast<int>(smaller(kRowBlock, end - row));
          vector_gemm<Mk>(pairs, {&batch.x_acts, batch.row_token + row, 0}, m, scratch->results,
                          scratch->unpacked);
          for (int u = 0; u < count; ++u) {
            const float* gate_up = scratch->results + 2 * u * result_stride(m);
            for (int i = 0; i < m; ++i, gate_up += kPairCols) {
              const int64_t r = row + i, k = (unit + u) * kUnitCols;
              unit_outputs(gate_up, gate_up + result_stride(m), batch.intermediate_size - k, h);
              if constexpr (takes_fp32(Mk::kFormat)) {
                std::memcpy(acts.f32 + r * acts.ld + k, h, sizeof(h));
              } else {
                const int64_t group = r * acts.ld_groups + unit + u;
                quantize_group(h, acts.q + r * acts.ld + k, acts.scale + group, acts.offset + group,
                               acts.half_offset + 2 * group);
              }
            }
          }
        }
      });
  // The down projection reads whole blocks of k: clear what no unit writes.
  if (unit_end == batch.gate_up.num_pairs / 2) {
    for (int64_t r = begin; r < end; ++r) clear_padding<Mk>(batch, r);
  }
}

// accumulator[token][0..31] += weight * results[row][0..31], rows in order.
inline void accumulate(const MoeBatch& batch, int64_t first_row, int m, const float* results,
                       float* accumulator, int64_t ld) {
  for (int i = 0; i < m; ++i) {
    float* acc = accumulator + batch.row_token[first_row + i] * ld;
    const float weight = batch.row_weight[first_row + i];
    for (int c = 0; c < kPairCols; c += kLanes) {
      store(acc + c, load<F>(acc + c) + load<F>(results + i * kPairCols + c) * weight);
    }
  }
}

// Adds one slot's results for pairs [pair_begin, pair_end) to the tokens' sums.
template <class Mk, class TileMk>
void down_slot(const MoeBatch& batch, int slot, int64_t pair_begin, int64_t pair_end,
               WorkerScratch* scratch) {
  const int64_t begin = batch.slot_begin[slot], rows = batch.slot_begin[slot + 1] - begin;
  const int64_t width = (pair_end - pair_begin) * kPairCols;
  const uint8_t* weights = batch.slot_weights[slot] + batch.down_offset;
  const auto for_blocks = [&](const auto& gemm) {
    for (int64_t p = pair_begin; p < pair_end; p += kPairBlock) {
      const PairRun pairs = {weights + p * batch.down.pair_bytes,
                             static_cast<int>(smaller(kPairBlock, pair_end - p)), &batch.down};
      for (int64_t row = 0; row < rows; row += kRowBlock) {
        const int m = static_cast<int>(smaller(kRowBlock, rows - row));
        gemm(pairs, row, m);
        for (int i = 0; i < pairs.num; ++i) {
          accumulate(batch, begin + row, m, scratch->results + i * result_stride(m),
                     scratch->accumulator + (p + i - pair_begin) * kPairCols, width);
        }
      }
    }
  };
  if constexpr (TileMk::kMinRows > 0) {
    if (batch.slot_tile[slot] >= 0) {
      typename TileMk::Tiles tiles;
      return for_blocks([&](const PairRun& pairs, int64_t row, int m) {
        tiles.template gemm<TileMk>(pairs, batch.h_tiles, batch.slot_tile[slot] + row, m,
                                    scratch->results, scratch->unpacked);
      });
    }
  }
  for_blocks([&](const PairRun& pairs, int64_t row, int m) {
    vector_gemm<Mk>(pairs, {&batch.h_acts, nullptr, begin + row}, m, scratch->results,
                    scratch->unpacked);
  });
}

template <class Mk, class TileMk>
void down(const MoeBatch& batch, int64_t pair_begin, int64_t pair_end, WorkerScratch* scratch) {
  const int64_t width = (pair_end - pair_begin) * kPairCols;
  std::memset(scratch->accumulator, 0, batch.num_tokens * width * sizeof(float));
  for (int slot = 0; slot < batch.num_slots; ++slot) {
    down_slot<Mk, TileMk>(batch, slot, pair_begin, pair_end, scratch);
  }
  uint8_t* out = static_cast<uint8_t*>(batch.out);
  for (int64_t t = 0; t < batch.num_tokens; ++t) {
    for (int64_t p = pair_begin; p < pair_end; ++p) {
      const int64_t column = p * kPairCols;
      const int n = static_cast<int>(smaller(kPairCols, batch.hidden_size - column));
      store_outputs(scratch->accumulator + t * width + (column - pair_begin * kPairCols), n,
                    batch.out_dtype,
                    out + (t * batch.out_stride + column) * dtype_bytes(batch.out_dtype));
    }
  }
}

template <class Mk, class TileMk>
void linear_prepare(const LinearBatch& batch, int64_t row, WorkerScratch* scratch) {
  const int64_t matrix = row / batch.num_tokens, token = row % batch.num_tokens;
  const int64_t k_padded = batch.geometry.k_padded;
  const Activations& acts = batch.acts;
  float* wide = takes_fp32(Mk::kFormat) && !batch.tiles ? acts.f32 + row * acts.ld : scratch->row;
  const int64_t offset = token * batch.x_stride + matrix * batch.x_matrix_stride;
  load_row(static_cast<const uint8_t*>(batch.x) + offset * dtype_bytes(batch.x_dtype),
           batch.x_dtype, batch.cols, k_padded, wide);
  if constexpr (TileMk::kMinRows > 0) {
    if (batch.tiles) {
      const int64_t first = matrix * round_up(batch.num_tokens, kTileRows);
      TileMk::Tiles::store_row(wide, k_padded, batch.a_tiles, 1,
                               [&](int64_t) { return first + token; });
      return;
    }
  }
  if constexpr (!takes_fp32(Mk::kFormat)) {
    quantize_row(wide, k_padded, acts, row);
  }
}

// Rows [first, first + m) of results, 32 wide, to output columns from 32 pair on.
inline void store_linear(const LinearBatch& batch, int64_t matrix, int64_t first, int m,
                         int64_t pair, const float* results) {
  const int64_t column = pair * kPairCols;
  const int n = static_cast<int>(smaller(kPairCols, batch.rows - column));
  uint8_t* out = static_cast<uint8_t*>(batch.out);
  for (int i = 0; i < m; ++i) {
    const int64_t offset =
        (first + i) * batch.out_stride + matrix * batch.out_matrix_stride + column;
    store_outputs(results + i * kPairCols, n, batch.out_dtype,
                  out + offset * dtype_bytes(batch.out_dtype));
  }
}

template <class Mk, class TileMk>
void linear(const LinearBatch& batch, int64_t matrix, int64_t pair_begin, int64_t pair_end,
            WorkerScratch* scratch) {
  const int64_t input = batch.x_matrix_stride == 0 ? 0 : matrix;
  const auto for_blocks = [&](const auto& gemm) {
    for (int64_t p = pair_begin; p < pair_end; p += kPairBlock) {
      const PairRun pairs = {
          batch.weights + matrix * batch.matrix_bytes + p * batch.geometry.pair_bytes,
          static_cast<int>(smaller(kPairBlock, pair_end - p)), &batch.geometry};
      for (int64_t row = 0; row < batch.num_tokens; row += kRowBlock) {
        const int m = static_cast<int>(smaller(kRowBlock, batch.num_tokens - row));
        gemm(pairs, row, m);
        for (int i = 0; i < pairs.num; ++i) {
          store_linear(batch, matrix, row, m, p + i, scratch->results + i * result_stride(m));
        }
      }
    }
  };
  if constexpr (TileMk::kMinRows > 0) {
    if (batch.tiles) {
      typename TileMk::Tiles tiles;
      const int64_t first = input * round_up(batch.num_tokens, kTileRows);
      return for_blocks([&](const PairRun& pairs, int64_t row, int m) {
        tiles.template gemm<TileMk>(pairs, batch.a_tiles, first + row, m, scratch->results,
                                    scratch->unpacked);
      });
    }
  }
  for_blocks([&](const PairRun& pairs, int64_t row, int m) {
    vector_gemm<Mk>(pairs, {&batch.acts, nullptr, input * batch.num_tokens + row}, m,
                    scratch->results, scratch->unpacked);
  });
}

template <class TileMk>
constexpr Arithmetic tile_arithmetic() {
  if constexpr (TileMk::kMinRows > 0) {
    return TileMk::Tiles::kArithmetic;
  } else {
    return Arithmetic::kBf16;
  }
}

template <class TileMk>
constexpr auto quantize_h_or_null() -> void (*)(const MoeBatch&, int64_t) {
  if constexpr (tile_arithmetic<TileMk>() == Arithmetic::kInt8) {
    return quantize_h<TileMk>;
  } else {
    return nullptr;
  }
}

template <Format kFormat>
constexpr auto pack_function() {
  if constexpr (is_gguf(kFormat)) {
    return pack_gguf<kFormat>;
  } else {
    return kFormat == Format::kInt4G32 ? pack_int4
           : kFormat == Format::kInt8  ? pack_int8
           : kFormat == Format::kBf16  ? pack_bf16
           : kFormat == Format::kFp8   ? pack_fp8
                                       : pack_fp32;
  }
}

template <class Mk, class TileMk>
constexpr FormatKernels format_kernels() {
  return {pack_function<Mk::kFormat>(),
          Mk::kFormat == Format::kFp8 ? fp8_block_scales : nullptr,
          prepare<Mk, TileMk>,
          gate_up<Mk, TileMk>,
          down<Mk, TileMk>,
          linear_prepare<Mk, TileMk>,
          linear<Mk, TileMk>,
          quantize_h_or_null<TileMk>(),
          TileMk::kMinRows,
          tile_arithmetic<TileMk>()};
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
