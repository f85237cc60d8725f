// What attention.cpp and the attention kernels of each instruction set (isa/attention-inl.h) share:
// block sizes, the description of work, and the functions of the kernel table.
//
// Query rows come in panels of 16, one vector or tile wide. A row is one (query token, head) pair:
//   absorbed   the rows of one request are all its queries times all heads, in that order (row =
//              query * heads + head), because all of them share the latent rows as keys and values
//   expanded   the rows of one head are the queries; keys and values are that head's own
// A task takes its rows through the keys in steps of key_block keys, with a running maximum, a
// running sum of weights and a running weighted sum of values per row (online softmax). Scores are
// in units of log2: the scale that enters the packed queries contains log2(e).
#pragma once

#include <cstdint>

#include "latent_layout.h"

namespace moejet {

enum class DType;

constexpr int kQueryPanel = 16;
constexpr int kQueryBlock = 64;         // rows whose scores exist at one time
constexpr int kAbsorbedRows = 128;      // rows of one absorbed task: they share packed values
constexpr int kMaxKeyBlock = 256;       // of any kernel
constexpr int64_t kContextBlock = 256;  // tokens whose keys and values are rebuilt at a time
// The score of what a query may not see, and the running maximum before the first key.
constexpr float kMaskedScore = -1e30f;

// One call. All memory belongs to the caller.
struct AttentionBatch {
  int64_t heads, nope, rope, rank, value;
  float scale;     // softmax scale times log2(e)
  const float* q;  // [T, heads, nope + rope], the rope part rotated
  int64_t q_stride, q_head_stride;
  float* out;  // [T, heads, value]
  int64_t out_stride, out_head_stride;
  const void* cache;  // [blocks, block_size] rows of latent_layout.h
  DType cache_dtype;  // fp32, bf16 or fp8
  LatentLayout latent;
  int64_t block_size;
};

// Queries of one request in absorbed form. Query i is token `token` + i of q, stands at position
// first_position + i of its request and sees the keys up to there.
struct AbsorbedPart {
  const int64_t* blocks;  // the request's row of the block tables
  int64_t token, num_queries, first_position;
  const float* q_latent;  // [num_queries, heads, rank]
  float* mixed;           // [num_queries, heads, rank], the result
  // Each split attends to a share of the context; merge combines them. split_keys: how many keys
  // each takes, the last one the rest; 0 for even shares.
  int64_t num_splits, split_keys;
  float* partial;    // [num_splits, rows, rank rounded up to 16]
  float *max, *sum;  // [num_splits, rows rounded up to 16]
};

// One block of context tokens [key_begin, key_begin + num_keys) of one request in expanded form.
struct ExpandedBlock {
  const int64_t* blocks;
  int64_t token, num_queries, first_position;
  int64_t key_begin, num_keys;
  // Rebuilt by W_UK and W_UV: [num_keys, heads, nope] and [num_keys, heads, value]; bf16 if the
  // kernels' pair is 2, else fp32.
  const void *keys, *values;
  // The same as the kernels read them: [heads, sub-blocks of key_block keys], each of
  // packed_key_elements(nope + rope) and packed_value_elements(value) 4-byte elements.
  void *packed_keys, *packed_values;
  float *max, *sum;  // [heads, num_queries rounded up to 64], from block to block
};

// Memory of one worker; sizes in attention.cpp.
struct AttentionWorker {
  void* queries;   // [kAbsorbedRows / 16][row elements][16]
  float* staging;  // [16][rank + rope or nope + rope, rounded up to 32]
  void* keys;      // [key_block][row elements]
  void* values;    // packed_value_elements(rank)
  float* scores;   // [kQueryBlock / 16][key_block][16]
  void* weights;   // [kQueryBlock / 16][key_block / pair][16], and once more for tiles
  float* product;  // [32][32]
  // The rows that `queries` holds: consecutive tasks often share them. Null: none.
  const AbsorbedPart* packed_part;
  int64_t packed_group;
  // The worker's next task, whose keys it fetches while it computes; null: none.
  const AbsorbedPart* next_part;
  int64_t next_split;
};

// Kernels for one element type of the cache; fp8 rows are decoded to what those of bf16 compute in.
struct AttentionKernels {
  int pair;       // values in one 4-byte element: 1 (fp32) or 2 (bf16)
  int dim_step;   // key rows are padded to this many values
  int key_block;  // keys of one step

  // Rows [kAbsorbedRows * group, ...) of the part over the keys of one split.
  void (*absorbed)(const AttentionBatch& batch, const AbsorbedPart& part, int64_t group,
                   int64_t split, AttentionWorker* worker);
  // Combines the splits of rows [row_begin, row_end), in their order.
  void (*merge)(const AttentionBatch& batch, const AbsorbedPart& part, int64_t row_begin,
                int64_t row_end);
  // Brings one sub-block of one head into the form that expanded reads.
  void (*pack)(const AttentionBatch& batch, const ExpandedBlock& block, int64_t head,
               int64_t sub_block);
  // Queries [kQueryBlock * query_block, ...) of one head over the block's keys.
  void (*expanded)(const AttentionBatch& batch, const ExpandedBlock& block, int64_t head,
                   int64_t query_block, AttentionWorker* worker);
  // Of an fp8 row: c_kv, as bf16 if pair is 2, else as fp32.
  void (*decode)(const AttentionBatch& batch, const uint8_t* row, void* c_kv);

  int64_t row_elements(int64_t dims) const {
    return (dims + dim_step - 1) / dim_step * dim_step / pair;
  }
  int64_t packed_key_elements(int64_t dims) const { return key_block * row_elements(dims); }
  int64_t packed_value_elements(int64_t dims) const {
    return key_block / pair * ((dims + kQueryPanel - 1) / kQueryPanel * kQueryPanel);
  }
};

}  // namespace moejet
