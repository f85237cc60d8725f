// The phases of an MoE layer as templates over a microkernel; see kernels.h for what each does.
//
// A vector microkernel is a struct with
//   kFormat, kMr               weight format, rows at most in one call
//   tile<MR>(pair, num_blocks, rows, out, ld)    out[m][0..31] = pair's 32 rows times activation
//   row m
// It reads int8 activations (integer formats) or fp32 (the others). The order of floating-point
// operations for one row does not depend on MR, so a token's result does not depend on its batch.
//
// A tile microkernel is a struct with
//   Tiles                      tile registers, real or emulated (tiles-inl.h)
//   kMinRows                   rows from which it is used
//   b_tiles(...)               weights as bf16 B tiles
// or NoTiles.
#pragma once

#ifndef MOEJET_ISA_NS
#error "moe-inl.h belongs into a file of isa/"
#endif

#include "lanes-inl.h"
#include "pack-inl.h"
#include "tiles-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

struct NoTiles {
  static constexpr int kMinRows = 0;
};

constexpr int kMaxMr = 8;
struct RowRefs {
  const int8_t* q[kMaxMr];
  const float* scale[kMaxMr];
  const int32_t* offset[kMaxMr];
  const float* f32[kMaxMr];
};

template <class Mk, int MR>
inline void tile_of(int mr, const uint8_t* pair, int64_t num_blocks, const RowRefs& rows,
                    float* out, int ld) {
  if constexpr (MR > 1) {
    if (mr < MR) return tile_of<Mk, MR - 1>(mr, pair, num_blocks, rows, out, ld);
  }
  Mk::template tile<MR>(pair, num_blocks, rows, out, ld);
}

// out[m][0..31] for m rows: acts rows index[0..m), or first .. first + m if index is null.
template <class Mk>
inline void vector_gemm(const uint8_t* pair, int64_t num_blocks, const Activations& acts,
                        const int32_t* index, int64_t first, int m, float* out, int ld) {
  int groups = (m + Mk::kMr - 1) / Mk::kMr;
  for (int done = 0; done < m; --groups) {
    const int mr = (m - done + groups - 1) / groups;  // even shares: 7 rows as 4 + 3, not 6 + 1
    RowRefs refs;
    for (int i = 0; i < mr; ++i) {
      const int64_t row = index != nullptr ? index[done + i] : first + done + i;
      if constexpr (takes_fp32(Mk::kFormat)) {
        refs.f32[i] = acts.f32 + row * acts.ld;
      } else {
        refs.q[i] = acts.q + row * acts.ld;
        refs.scale[i] = acts.scale + row * acts.ld_groups;
        refs.offset[i] = acts.offset + row * acts.ld_groups;
      }
    }
    tile_of<Mk, Mk::kMr>(mr, pair, num_blocks, refs, out + done * ld, ld);
    done += mr;
  }
}

inline uint16_t* tile_row(uint16_t* tiles, int64_t k_padded, int64_t row, int64_t k_tile) {
  const int64_t tile = row / kTileRows * (k_padded / kTileK) + k_tile;
  return tiles + (tile * kTileRows + row % kTileRows) * kTileK;
}

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
      quantize_row(row, k_padded, acts.q + t * acts.ld, acts.scale + t * acts.ld_groups,
                   acts.offset + t * acts.ld_groups);
    }
  }
  if constexpr (TileMk::kMinRows > 0) {
    const int32_t begin = batch.token_begin[t], end = batch.token_begin[t + 1];
    for (int64_t kt = 0; begin < end && kt < k_padded / kTileK; ++kt) {
      uint16_t rounded[kTileK];
      store_bf16(load<F>(row + kt * kTileK), rounded);
      store_bf16(load<F>(row + kt * kTileK + kLanes), rounded + kLanes);
      for (int32_t i = begin; i < end; ++i) {
        std::memcpy(tile_row(batch.x_tiles, k_padded, batch.token_tiles[i], kt), rounded,
                    sizeof(rounded));
      }
    }
  }
}

// h of one row and unit from [gate 16 | up 16 | gate 16 | up 16]; padded channels are zero.
inline void unit_outputs(const float* gate_up, int64_t valid, float* h) {
  store(h, silu_mul(load<F>(gate_up), load<F>(gate_up + 16)));
  store(h + kLanes, silu_mul(load<F>(gate_up + 32), load<F>(gate_up + 48)));
  for (int64_t i = valid; i < kUnitCols; ++i) h[i] = 0.f;
}

constexpr int kGateUpLd = 2 * kPairCols;  // a unit's two pairs side by side

inline const uint8_t* gate_up_pair(const MoeBatch& batch, int slot, int64_t unit, int half) {
  return batch.slot_weights[slot] + (2 * unit + half) * batch.gate_up.pair_bytes;
}

template <class TileMk>
void gate_up_tiles(const MoeBatch& batch, int slot, int64_t unit_begin, int64_t unit_end,
                   WorkerScratch* scratch) {
  typename TileMk::Tiles tiles;
  const int64_t rows = batch.slot_begin[slot + 1] - batch.slot_begin[slot];
  const int64_t first = batch.slot_tile[slot], h_padded = batch.down.k_padded;
  alignas(64) float h[kUnitCols];
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    for (int64_t row = 0; row < rows; row += kTileRowBlock) {
      const int m = static_cast<int>(smaller(kTileRowBlock, rows - row));
      const uint16_t* a = tile_row(batch.x_tiles, batch.gate_up.k_padded, first + row, 0);
      for (int half = 0; half < 2; ++half) {
        tile_gemm<TileMk>(tiles, gate_up_pair(batch, slot, unit, half), batch.gate_up, a, m,
                          scratch->gate_up + half * kPairCols, kGateUpLd, scratch->unpacked);
      }
      for (int i = 0; i < m; ++i) {
        unit_outputs(scratch->gate_up + i * kGateUpLd, batch.intermediate_size - unit * kUnitCols,
                     h);
        uint16_t* dst = tile_row(batch.h_tiles, h_padded, first + row + i, unit);
        store_bf16(load<F>(h), dst);
        store_bf16(load<F>(h + kLanes), dst + kLanes);
      }
    }
  }
  // The down projection reads whole blocks of k: clear what no unit writes.
  const int64_t num_units = batch.gate_up.num_pairs / 2;
  for (int64_t row = 0; unit_end == num_units && row < rows; ++row) {
    for (int64_t kt = num_units; kt < h_padded / kTileK; ++kt) {
      std::memset(tile_row(batch.h_tiles, h_padded, first + row, kt), 0, 2 * kTileK);
    }
  }
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
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    for (int64_t row = begin; row < end; row += kVectorRowBlock) {
      const int m = static_cast<int>(smaller(kVectorRowBlock, end - row));
      for (int half = 0; half < 2; ++half) {
        vector_gemm<Mk>(gate_up_pair(batch, slot, unit, half), batch.gate_up.num_blocks,
                        batch.x_acts, batch.row_token + row, 0, m,
                        scratch->gate_up + half * kPairCols, kGateUpLd);
      }
      for (int i = 0; i < m; ++i) {
        unit_outputs(scratch->gate_up + i * kGateUpLd, batch.intermediate_size - unit * kUnitCols,
                     h);
        const int64_t r = row + i;
        if constexpr (takes_fp32(Mk::kFormat)) {
          std::memcpy(acts.f32 + r * acts.ld + unit * kUnitCols, h, sizeof(h));
        } else {
          const int64_t group = r * acts.ld_groups + unit;
          quantize_group(h, acts.q + r * acts.ld + unit * kUnitCols, acts.scale + group,
                         acts.offset + group);
        }
      }
    }
  }
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

template <class TileMk>
void down_slot_tiles(const MoeBatch& batch, int slot, int64_t pair_begin, int64_t pair_end,
                     WorkerScratch* scratch) {
  typename TileMk::Tiles tiles;
  const int64_t begin = batch.slot_begin[slot], rows = batch.slot_begin[slot + 1] - begin;
  const int64_t width = (pair_end - pair_begin) * kPairCols;
  const uint8_t* weights = batch.slot_weights[slot] + batch.down_offset;
  float* results = scratch->gate_up;
  for (int64_t p = pair_begin; p < pair_end; ++p) {
    float* accumulator = scratch->accumulator + (p - pair_begin) * kPairCols;
    for (int64_t row = 0; row < rows; row += kTileRowBlock) {
      const int m = static_cast<int>(smaller(kTileRowBlock, rows - row));
      const uint16_t* a =
          tile_row(batch.h_tiles, batch.down.k_padded, batch.slot_tile[slot] + row, 0);
      tile_gemm<TileMk>(tiles, weights + p * batch.down.pair_bytes, batch.down, a, m, results,
                        kPairCols, scratch->unpacked);
      accumulate(batch, begin + row, m, results, accumulator, width);
    }
  }
}

template <class Mk>
void down_slot(const MoeBatch& batch, int slot, int64_t pair_begin, int64_t pair_end,
               WorkerScratch* scratch) {
  const int64_t begin = batch.slot_begin[slot], end = batch.slot_begin[slot + 1];
  const int64_t width = (pair_end - pair_begin) * kPairCols;
  const uint8_t* weights = batch.slot_weights[slot] + batch.down_offset;
  float* results = scratch->gate_up;
  for (int64_t p = pair_begin; p < pair_end; ++p) {
    float* accumulator = scratch->accumulator + (p - pair_begin) * kPairCols;
    for (int64_t row = begin; row < end; row += kVectorRowBlock) {
      const int m = static_cast<int>(smaller(kVectorRowBlock, end - row));
      vector_gemm<Mk>(weights + p * batch.down.pair_bytes, batch.down.num_blocks, batch.h_acts,
                      nullptr, row, m, results, kPairCols);
      accumulate(batch, row, m, results, accumulator, width);
    }
  }
}

template <class Mk, class TileMk>
void down(const MoeBatch& batch, int64_t pair_begin, int64_t pair_end, WorkerScratch* scratch) {
  const int64_t width = (pair_end - pair_begin) * kPairCols;
  std::memset(scratch->accumulator, 0, batch.num_tokens * width * sizeof(float));
  for (int slot = 0; slot < batch.num_slots; ++slot) {
    if constexpr (TileMk::kMinRows > 0) {
      if (batch.slot_tile[slot] >= 0) {
        down_slot_tiles<TileMk>(batch, slot, pair_begin, pair_end, scratch);
        continue;
      }
    }
    down_slot<Mk>(batch, slot, pair_begin, pair_end, scratch);
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
      for (int64_t kt = 0; kt < k_padded / kTileK; ++kt) {
        uint16_t* dst = tile_row(batch.a_tiles, k_padded, first + token, kt);
        store_bf16(load<F>(wide + kt * kTileK), dst);
        store_bf16(load<F>(wide + kt * kTileK + kLanes), dst + kLanes);
      }
      return;
    }
  }
  if constexpr (!takes_fp32(Mk::kFormat)) {
    quantize_row(wide, k_padded, acts.q + row * acts.ld, acts.scale + row * acts.ld_groups,
                 acts.offset + row * acts.ld_groups);
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

template <class TileMk>
void linear_tiles(const LinearBatch& batch, int64_t matrix, int64_t pair_begin, int64_t pair_end,
                  WorkerScratch* scratch) {
  typename TileMk::Tiles tiles;
  const uint8_t* weights = batch.weights + matrix * batch.matrix_bytes;
  const int64_t input = batch.x_matrix_stride == 0 ? 0 : matrix;
  const int64_t first = input * round_up(batch.num_tokens, kTileRows);
  for (int64_t p = pair_begin; p < pair_end; ++p) {
    for (int64_t row = 0; row < batch.num_tokens; row += kTileRowBlock) {
      const int m = static_cast<int>(smaller(kTileRowBlock, batch.num_tokens - row));
      tile_gemm<TileMk>(tiles, weights + p * batch.geometry.pair_bytes, batch.geometry,
                        tile_row(batch.a_tiles, batch.geometry.k_padded, first + row, 0), m,
                        scratch->gate_up, kPairCols, scratch->unpacked);
      store_linear(batch, matrix, row, m, p, scratch->gate_up);
    }
  }
}

template <class Mk, class TileMk>
void linear(const LinearBatch& batch, int64_t matrix, int64_t pair_begin, int64_t pair_end,
            WorkerScratch* scratch) {
  if constexpr (TileMk::kMinRows > 0) {
    if (batch.tiles) return linear_tiles<TileMk>(batch, matrix, pair_begin, pair_end, scratch);
  }
  const uint8_t* weights = batch.weights + matrix * batch.matrix_bytes;
  const int64_t first = batch.x_matrix_stride == 0 ? 0 : matrix * batch.num_tokens;
  for (int64_t p = pair_begin; p < pair_end; ++p) {
    for (int64_t row = 0; row < batch.num_tokens; row += kVectorRowBlock) {
      const int m = static_cast<int>(smaller(kVectorRowBlock, batch.num_tokens - row));
      vector_gemm<Mk>(weights + p * batch.geometry.pair_bytes, batch.geometry.num_blocks,
                      batch.acts, nullptr, first + row, m, scratch->gate_up, kPairCols);
      store_linear(batch, matrix, row, m, p, scratch->gate_up);
    }
  }
}

template <class Mk, class TileMk>
constexpr FormatKernels format_kernels() {
  constexpr auto pack = Mk::kFormat == Format::kInt4G32 ? pack_int4
                        : Mk::kFormat == Format::kInt8  ? pack_int8
                        : Mk::kFormat == Format::kBf16  ? pack_bf16
                        : Mk::kFormat == Format::kFp8   ? pack_fp8
                                                        : pack_fp32;
  return {pack,
          Mk::kFormat == Format::kFp8 ? fp8_block_scales : nullptr,
          prepare<Mk, TileMk>,
          gate_up<Mk, TileMk>,
          down<Mk, TileMk>,
          linear_prepare<Mk, TileMk>,
          linear<Mk, TileMk>,
          TileMk::kMinRows};
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
