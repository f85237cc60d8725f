// Matrix products of vector microkernels: few rows straight from the packed weights, many rows from
// blocks that are unpacked once for all of them.
//
// A vector microkernel is a struct with
//   kFormat, kMr               weight format, rows at most in one call
//   tile<MR>(pair, num_blocks, rows, out)      out[m][0..31] = pair's 32 rows times activation row
//   m kManyRows                  rows from which the following are used; 0: never kManyMr,
//   kChunkBlocks      rows at most in one call, blocks of k unpacked together kUnpackedBytes of one
//   block of a pair unpack(pair, num_blocks, unpacked) many<MR>(unpacked, num_blocks, rows, first,
//   out)    as tile; adds to out unless first
// It reads int8 activations (integer formats) or fp32 (the others). The order of floating-point
// operations for one row is the same in both, for every MR and number of blocks, so a token's
// result does not depend on its batch.
#pragma once

#ifndef MOEJET_ISA_NS
#error "gemm-inl.h belongs into a file of isa/"
#endif

#include "lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

constexpr int kMaxMr = 8;
struct RowRefs {
  const int8_t* q[kMaxMr];
  const float* scale[kMaxMr];
  const int32_t* offset[kMaxMr];
  const int32_t* half_offset[kMaxMr];
  const float* f32[kMaxMr];
};

// Rows of activations: index[0], index[1], ... or first, first + 1, ... if index is null.
struct RowSet {
  const Activations* acts;
  const int32_t* index;
  int64_t first;

  // Rows begin .. begin + mr from input k on.
  template <Format kFormat>
  RowRefs refs(int begin, int mr, int64_t k) const {
    RowRefs refs;
    for (int i = 0; i < mr; ++i) {
      const int64_t row = index != nullptr ? index[begin + i] : first + begin + i;
      if constexpr (takes_fp32(kFormat)) {
        refs.f32[i] = acts->f32 + row * acts->ld + k;
      } else {
        const int64_t group = row * acts->ld_groups + k / kActGroup;
        refs.q[i] = acts->q + row * acts->ld + k;
        refs.scale[i] = acts->scale + group;
        refs.offset[i] = acts->offset + group;
        refs.half_offset[i] = acts->half_offset + 2 * group;
      }
    }
    return refs;
  }
};

template <class Mk, int MR>
inline void tile_of(int mr, const uint8_t* pair, int64_t num_blocks, const RowRefs& rows,
                    float* out) {
  if constexpr (MR > 1) {
    if (mr < MR) return tile_of<Mk, MR - 1>(mr, pair, num_blocks, rows, out);
  }
  Mk::template tile<MR>(pair, num_blocks, rows, out);
}

template <class Mk, int MR>
inline void many_of(int mr, const uint8_t* unpacked, int64_t num_blocks, const RowRefs& rows,
                    bool first, float* out) {
  if constexpr (MR > 1) {
    if (mr < MR) return many_of<Mk, MR - 1>(mr, unpacked, num_blocks, rows, first, out);
  }
  Mk::template many<MR>(unpacked, num_blocks, rows, first, out);
}

// body(begin, count) for m rows in groups of at most limit: even shares, 7 rows as 4 + 3, not 6
// + 1.
template <class Body>
inline void for_row_groups(int m, int limit, const Body& body) {
  int groups = (m + limit - 1) / limit;
  for (int done = 0; done < m; --groups) {
    const int count = (m - done + groups - 1) / groups;
    body(done, count);
    done += count;
  }
}

// Consecutive pairs of one matrix, at most kPairBlock, whose results are computed together:
// results[pair][m][0..31], the pairs result_stride(m) floats apart.
struct PairRun {
  const uint8_t* data;
  int num;
  const PairGeometry* geometry;
  const uint8_t* pair(int p) const { return data + p * geometry->pair_bytes; }
};
inline int64_t result_stride(int m) { return round_up(m, kTileRows) * kPairCols; }

// The parts of a run of pairs that are multiplied one after another: `blocks` blocks of k of one
// pair, inputs in the outer loop, so that the rows' part of these inputs stays in the cache.
struct Chunks {
  PairRun pairs;
  int64_t blocks, block_bytes;  // of a pair

  int64_t count() const { return (pairs.geometry->num_blocks + blocks - 1) / blocks * pairs.num; }
  int pair(int64_t i) const { return static_cast<int>(i % pairs.num); }
  int64_t first_block(int64_t i) const { return i / pairs.num * blocks; }
  int64_t num_blocks(int64_t i) const {
    return smaller(blocks, pairs.geometry->num_blocks - first_block(i));
  }
  const uint8_t* data(int64_t i) const {
    return pairs.pair(pair(i)) + first_block(i) * block_bytes;
  }
};

template <class Mk>
void gemm_many_rows(const PairRun& pairs, const RowSet& rows, int m, float* results,
                    uint8_t* unpacked) {
  constexpr BlockShape kBlock = block_shape(Mk::kFormat);
  const Chunks chunks = {pairs, Mk::kChunkBlocks, 2 * kBlock.bytes};
  for (int64_t i = 0; i < chunks.count(); ++i) {
    Mk::unpack(chunks.data(i), chunks.num_blocks(i), unpacked);
    float* out = results + chunks.pair(i) * result_stride(m);
    const int64_t block = chunks.first_block(i);
    for_row_groups(m, Mk::kManyMr, [&](int begin, int mr) {
      many_of<Mk, Mk::kManyMr>(mr, unpacked, chunks.num_blocks(i),
                               rows.refs<Mk::kFormat>(begin, mr, block * kBlock.k), block == 0,
                               out + begin * kPairCols);
    });
  }
}

template <class Mk>
void vector_gemm(const PairRun& pairs, const RowSet& rows, int m, float* results,
                 uint8_t* unpacked) {
  if constexpr (Mk::kManyRows > 0) {
    if (m >= Mk::kManyRows) return gemm_many_rows<Mk>(pairs, rows, m, results, unpacked);
  }
  for (int p = 0; p < pairs.num; ++p) {
    float* out = results + p * result_stride(m);
    for_row_groups(m, Mk::kMr, [&](int begin, int mr) {
      tile_of<Mk, Mk::kMr>(mr, pairs.pair(p), pairs.geometry->num_blocks,
                           rows.refs<Mk::kFormat>(begin, mr, 0), out + begin * kPairCols);
    });
  }
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
