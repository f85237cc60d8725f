// The packed layout of expert weights: one copy for decode and prefill, for every instruction set.
//
// A weight matrix W [rows, k] (y = W x) is cut into panels of 16 output rows, because 16 fp32 sums
// fill one 64-byte register and 16 columns fill one AMX tile. Along k a panel is cut into blocks:
//
//   format    block      bytes of one panel block
//   int4_g32   64 k   576: 8 vectors of 64 B, then 16 x (scale of k 0..31, scale of k 32..63), bf16
//   int8      128 k  2112: 32 vectors of 64 B, then 16 fp32 scales (one per row)
//   bf16       32 k  1024: 16 vectors of 64 B
//
//   int8, vector v, byte 4 r + j:       row r, input 4 v + j, two's complement, -127..127
//   int4_g32, vector v, byte 4 r + j:   low nibble: row r, input 4 v + j;
//                                       high nibble: row r, input 32 + 4 v + j;  w = (u4 - 8) scale
//   bf16, vector v, 16-bit word 2 r + j: row r, input 2 v + j
//
// Four inputs of one row in a 32-bit lane is what the 8-bit dot product instructions take, two bf16
// inputs what an AMX B tile takes: a bf16 panel block is a B tile as it stands. In int4 a mask
// gives the low nibbles (first scale group) and the complementary mask the high ones (second group,
// times 16), without shuffles. Scales lie inline, so that a panel is one sequential stream.
//
// Panels come in pairs that are interleaved block by block:
//
//   pair:  [panel 0, block 0] [panel 1, block 0] [panel 0, block 1] [panel 1, block 1] ...
//
// Pair p of the gate and up projections holds rows 16 p .. 16 p + 15 of both (panel 0 = gate,
// panel 1 = up), so that a kernel has g and u of the same 16 intermediate channels when it reaches
// the end of k and can apply silu(g) u at once. Pair p of the down projection holds rows
// 32 p .. 32 p + 31. A kernel always streams one pair: one run of memory, two panels in flight,
// and the two B columns of a 2x2 tile block.
//
// Rows are padded to whole units of 32, k to whole blocks. Kernels never let padding reach a
// result: activations are zero in padded k, and results of padded rows are dropped. One expert:
// gate-up pairs, then down pairs; it starts on a 4096-byte boundary.
#pragma once

#include <cstdint>

namespace moejet {

enum class Format { kInt4G32 = 0, kInt8, kBf16 };
constexpr int kNumFormats = 3;

constexpr int kPanelRows = 16;
constexpr int kPairCols = 2 * kPanelRows;  // outputs of one pair
constexpr int kUnitCols = 32;  // intermediate channels handled together: one scale group
constexpr int kActGroup = 32;  // inputs that share an activation scale

struct BlockShape {
  int k;      // inputs in one block
  int bytes;  // of one panel's block
};

static constexpr BlockShape block_shape(Format format) {
  return format == Format::kInt4G32 ? BlockShape{64, 576}
         : format == Format::kInt8  ? BlockShape{128, 2112}
                                    : BlockShape{32, 1024};
}

static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Sizes of one projection pair stream (gate-up, or down).
struct PairGeometry {
  int64_t k;           // inputs, unpadded
  int64_t k_padded;    // whole blocks
  int64_t num_blocks;  // per panel
  int64_t num_pairs;
  int64_t pair_bytes;
};

// num_pairs pairs over k inputs.
static constexpr PairGeometry pair_geometry(Format format, int64_t k, int64_t num_pairs) {
  const BlockShape block = block_shape(format);
  const int64_t num_blocks = (k + block.k - 1) / block.k;
  return {k, num_blocks * block.k, num_blocks, num_pairs, 2 * num_blocks * block.bytes};
}

}  // namespace moejet
