// THE table of kernels. Everything above it (moe.cpp, expert_weights.cpp, bindings.cpp) is compiled
// for the baseline processor and reaches instruction-set-specific code only through it; no std::
// type crosses it. Each file in isa/ defines one table.
#pragma once

#include <cstdint>

#include "attention_kernels.h"
#include "isa.h"
#include "ops.h"
#include "pack.h"

namespace moejet {

// Weights only: kFp8 is e4m3, kInt4 two 4-bit codes in a byte, the first in the low half, kGguf the
// bytes of a GGUF file.
enum class DType { kF32 = 0, kBf16, kF16, kFp8, kInt4, kGguf };
// Of one element, or of the two that share a byte.
static constexpr int dtype_bytes(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBf16 || dtype == DType::kF16 ? 2 : 1;
}

// What tile kernels multiply the integer formats in; the vector kernels take int8 activations for
// them in either case.
enum class Arithmetic { kBf16 = 0, kInt8 };

// Rows of one expert and pairs of panels that are computed at a time: how often one unpacking of
// weights and one read of activations is used, and the size of the worker's buffers.
constexpr int kRowBlock = 256;
constexpr int kPairBlock = 8;
// Inputs unpacked at a time for tiles: 32 rows x 2048 x 2 bytes = 128 KB, a part of L2.
constexpr int kTileChunkK = 2048;
constexpr int kUnpackedBytes = 2 * kPairCols * kTileChunkK;
constexpr int kTileRows = 16;
constexpr int kTileK = 32;      // bf16 inputs of one tile
constexpr int kInt8TileK = 64;  // int8 inputs of one tile
// In int8 arithmetic on tiles: inputs that share a scale, of an activation row and of a weight row.
constexpr int kInt8Group = 128;

// Activations as the vector kernels read them, one row per token or per (token, expert) pair.
// Integer formats: q, scale and both offsets. The others: f32.
struct Activations {
  int8_t* q;             // [rows, ld], -127..127
  float* scale;          // [rows, ld_groups], one per 32 inputs
  int32_t* offset;       // [rows, ld_groups], -8 * sum of the group's q: the int4 zero point
  int32_t* half_offset;  // [rows, 2 ld_groups], -32 * sum of each half's q: the q6_k zero point
  float* f32;            // [rows, ld]
  int64_t ld;            // padded k
  int64_t ld_groups;
};

// Activations as the tile kernels read them. The rows of an expert or matrix begin at a multiple of
// 16.
struct TileActivations {
  uint16_t* bf16;  // A tiles [rows / 16][k_padded / 32][16][32]
  // int8 arithmetic:
  int8_t* q;     // A tiles [rows / 16][k_padded / 64][16][64], -127..127
  float* scale;  // [rows / 16][ceil(k_padded / 128)][16], one per 128 inputs of a row
};

// One call on a chunk of tokens. R routed rows = (token, expert) pairs, sorted by expert; a slot is
// an expert with at least one row. All memory belongs to the caller.
struct MoeBatch {
  Format format, down_format;  // of gate and up, of down
  int64_t num_tokens, hidden_size, intermediate_size;
  PairGeometry gate_up, down;

  const void* x;  // [num_tokens, hidden_size], rows x_stride elements apart
  DType x_dtype;
  int64_t x_stride;
  void* out;  // [num_tokens, hidden_size], rows out_stride elements apart
  DType out_dtype;
  int64_t out_stride;

  int num_slots;
  const uint8_t* const* slot_weights;  // [num_slots], the expert's gate-up pairs
  int64_t down_offset;                 // bytes from there to its down pairs
  const int32_t* slot_begin;           // [num_slots + 1], first row
  const int32_t* slot_tile;    // [num_slots], first row in x_tiles and h_tiles; -1: vector kernel
  const int32_t* row_token;    // [R]
  const float* row_weight;     // [R]
  const int32_t* token_begin;  // [num_tokens + 1], first entry in token_tiles
  const int32_t* token_tiles;  // rows of x_tiles that hold the token
  bool any_vector;             // some slot uses the vector kernel

  Activations x_acts;  // by token
  Activations h_acts;  // by row
  TileActivations x_tiles;
  TileActivations h_tiles;  // int8 arithmetic: bf16 from gate_up to quantize_h, int8 from there
};

// One call on a chunk of tokens of G matrices of one shape, each with inputs of its own or all with
// the same. Row g * num_tokens + t of acts is token t's input of matrix g; in a_tiles each matrix
// begins at a multiple of 16 rows. Shared inputs exist once, as matrix 0's.
struct LinearBatch {
  Format format;
  int64_t num_tokens, num_matrices, rows, cols;  // a matrix is [rows, cols]
  PairGeometry geometry;
  const uint8_t* weights;
  int64_t matrix_bytes;

  const void* x;  // [num_tokens, G, cols]
  DType x_dtype;
  int64_t x_stride, x_matrix_stride;  // elements between tokens, between matrices (0: shared)
  void* out;                          // [num_tokens, G, rows]
  DType out_dtype;
  int64_t out_stride, out_matrix_stride;

  bool tiles;  // the tile kernel computes this call
  Activations acts;
  TileActivations a_tiles;
};

// Memory of one worker; sizes in moe.cpp.
struct WorkerScratch {
  float* row;          // [max k_padded], one activation row
  float* results;      // [kPairBlock][kRowBlock][32]
  float* accumulator;  // [num_tokens, 32 * pairs of a down task]
  uint8_t* unpacked;   // kUnpackedBytes of weights
};

// Rows of a matrix that is being packed.
struct PanelSource {
  const void* data;
  DType dtype;
  int64_t row_stride;  // elements; bytes of int4 and GGUF sources
  int rows;
  int64_t k;  // weights of a row
  // One per 128 inputs: what the codes of an fp8 source are multiplied by. In the fp8 format they
  // are kept, and for other sources are the scales to use. Else null.
  const float* scales;
  // int4 sources: weight = (code - 8) * scale, bf16 scales [rows, k / 32], rows group_stride apart.
  const uint16_t* group_scales;
  int64_t group_stride;
};

struct FormatKernels {
  // GGUF formats: repacks a panel of a GGUF source, whose k is whole blocks of the file. Others:
  // quantises and packs one panel of up to 16 rows. Missing rows and padded k become weights that
  // are finite. Blocks go to dst, block_stride bytes apart. Returns false if a value cannot be
  // represented: NaN or infinity in the integer formats and fp8, or in the scales of GGUF formats.
  bool (*pack_panel)(const PanelSource& source, uint8_t* dst, int64_t block_stride);
  // For formats with scales over more than a panel, else null: the scale for each 128 inputs of up
  // to 128 rows. Returns false if a value is NaN or infinite.
  bool (*block_scales)(const PanelSource& source, float* scales);
  // Brings token t into the forms that its experts' kernels read.
  void (*prepare)(const MoeBatch& batch, int64_t t, WorkerScratch* scratch);
  // h = silu(gate x) * (up x) for units of 32 channels [unit_begin, unit_end) of one slot.
  void (*gate_up)(const MoeBatch& batch, int slot, int64_t unit_begin, int64_t unit_end,
                  WorkerScratch* scratch);
  // Output columns [32 pair_begin, 32 pair_end) of all tokens: weighted sum over all slots.
  void (*down)(const MoeBatch& batch, int64_t pair_begin, int64_t pair_end, WorkerScratch* scratch);
  // Brings input `row` (matrix * num_tokens + token) into the form that linear reads.
  void (*linear_prepare)(const LinearBatch& batch, int64_t row, WorkerScratch* scratch);
  // Outputs [32 pair_begin, 32 pair_end) of one matrix for all tokens.
  void (*linear)(const LinearBatch& batch, int64_t matrix, int64_t pair_begin, int64_t pair_end,
                 WorkerScratch* scratch);
  // Tile kernels with int8 arithmetic, else null: brings rows [16 tile, 16 tile + 16) of h_tiles
  // from bf16 to int8, between gate_up and down. A scale takes 128 channels, so more than one
  // gate-up task may have written them.
  void (*quantize_h)(const MoeBatch& batch, int64_t tile);
  // Rows from which an expert goes to the tile kernel; 0: no tile kernel.
  int min_tile_rows;
  Arithmetic tile_arithmetic;
};

struct KernelTable {
  Isa isa;
  FormatKernels formats[kNumFormats];
  OpKernels ops;
  AttentionKernels attention[2];  // by element type of the latent cache: fp32; bf16 and fp8
  // int4_g32 and int8 in int8 arithmetic on tiles; empty without tiles.
  FormatKernels int8_tiles[2] = {};
};

// The table's kernels for a format. Without tiles, the arithmetic changes nothing.
const FormatKernels& kernels_of(const KernelTable& table, Format format, Arithmetic arithmetic);

// Null if this build has no kernels for it.
const KernelTable* kernel_table(Isa isa);

// One way to keep the multipliers busy with operands in registers (or, where named so, in L1).
struct ArithmeticLoop {
  const char* name;    // null: no such variant
  int64_t operations;  // per step; a multiply-add counts as two
  // operands: kCeilingOperandBytes of random fp32, bf16 or int8 values, 64-byte aligned. Returns
  // something that depends on every result.
  uint64_t (*run)(int64_t steps, const uint8_t* operands);
};
constexpr int kCeilingOperandBytes = 32768;

// The loops of ceilings.cpp; what an instruction set does not have is null.
struct CeilingKernels {
  // Reads num_streams (1, 2, 4 or 8) equal parts of data side by side, prefetching prefetch_bytes
  // ahead (0: not at all). bytes is a multiple of 256 * num_streams, data 64-byte aligned.
  uint64_t (*read)(const uint8_t* data, int64_t bytes, int num_streams, int64_t prefetch_bytes);
  ArithmeticLoop f32[2], int8[2], bf16[2];
};

// The loops of the widest vectors that the instruction set has; null if not part of this build.
const CeilingKernels* ceiling_kernels(Isa isa);

namespace scalar {
extern const KernelTable table;
extern const CeilingKernels ceilings;
}  // namespace scalar
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
extern const CeilingKernels ceilings;
}  // namespace avx2
namespace avx512 {
extern const KernelTable table;
extern const CeilingKernels ceilings;
}  // namespace avx512
namespace avx512_bf16 {
extern const KernelTable table;
extern const CeilingKernels ceilings;
}  // namespace avx512_bf16
namespace amx {
extern const KernelTable table;
extern const CeilingKernels ceilings;
}  // namespace amx
namespace amx_emulated {
extern const KernelTable table;
}
#endif

}  // namespace moejet
