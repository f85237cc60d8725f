// The packed layout of expert weights: one copy for decode and prefill, for every instruction set.
//
// A weight matrix W [rows, k] (y = W x) is cut into panels of 16 output rows, because 16 fp32 sums
// fill one 64-byte register and 16 columns fill one AMX tile. Along k a panel is cut into blocks:
//
//   format    block      bytes of one panel block
//   int4_g32   64 k   576: 8 vectors of 64 B, then 16 x (scale of k 0..31, scale of k 32..63), bf16
//   int8      128 k  2112: 32 vectors of 64 B, then 16 fp32 scales (one per row)
//   bf16       32 k  1024: 16 vectors of 64 B
//   fp8       128 k  2080: 32 vectors of 64 B, and 32 B of block data (Fp8BlockData)
//   fp32       32 k  2048: 32 vectors of 64 B
//   q4_0       64 k   576: 8 vectors of 64 B, then fp16 scales as int4_g32's, but 16 of k 0..31 and
//                          after them 16 of k 32..63
//   q8_0       64 k  1088: 16 vectors of 64 B, then scales as q4_0's
//   q4_k      256 k  2304: scales (256 B), then 32 vectors of 64 B
//   q5_k      256 k  2816: scales (256 B), then 40 vectors of 64 B
//   q6_k      256 k  3392: scales (320 B), then 48 vectors of 64 B
//
// The last five are GGUF's formats, whose bits are kept; gguf_blocks.h explains them.
//
//   int8, vector v, byte 4 r + j:       row r, input 4 v + j, two's complement, -127..127
//   int4_g32, vector v, byte 4 r + j:   low nibble: row r, input 4 v + j;
//                                       high nibble: row r, input 32 + 4 v + j;  w = (u4 - 8) scale
//   bf16, vector v, 16-bit word 2 r + j: row r, input 2 v + j
//   fp8, vector v, 16-bit word 2 r + j: low byte: row r, input 4 v + j; high byte: row r, input
//                                       4 v + 2 + j; OCP e4m3 codes (no infinities), never NaN
//   fp32, vector v, lane r:             row r, input v
//
// Four inputs of one row in a 32-bit lane is what the 8-bit dot product instructions take, two bf16
// inputs what an AMX B tile takes: a bf16 panel block is a B tile as it stands. In int4 a mask
// gives the low nibbles (first scale group) and the complementary mask the high ones (second group,
// times 16), without shuffles. The low bytes of an fp8 vector are one row of an AMX B tile, the
// high bytes the next. Scales lie inline, so that a panel is one sequential stream.
//
// fp8 has one fp32 scale per 128 x 128 block of the matrix, and a panel block lies in one of those.
//
// Panels come in pairs that are interleaved block by block:
//
//   pair:  [panel 0, block 0] [panel 1, block 0] [panel 0, block 1] [panel 1, block 1] ...
//   fp8:   [data 0, data 1: 64 B] [codes 0: 2048 B] [codes 1: 2048 B] and so on, which keeps
//          vectors aligned; a pointer to a panel block says at 2080 panel + 4160 block which one
//          is meant (fp8_block)
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

// Counts up with every change of what packed bytes mean: cached ones of another version are stale.
constexpr int kPackLayoutVersion = 1;

enum class Format {
  kInt4G32 = 0,
  kInt8,
  kBf16,
  kFp8,
  kFp32,
  kQ4_0,
  kQ8_0,
  kQ4K,
  kQ5K,
  kQ6K,
};
constexpr int kNumFormats = 10;

// Weights that multiply fp32 activations on vectors; the others take activations in int8.
static constexpr bool takes_fp32(Format format) {
  return format == Format::kBf16 || format == Format::kFp8 || format == Format::kFp32;
}

// Weights that come from GGUF files and are never quantised here.
static constexpr bool is_gguf(Format format) { return format >= Format::kQ4_0; }

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
         : format == Format::kBf16  ? BlockShape{32, 1024}
         : format == Format::kFp8   ? BlockShape{128, 2080}
         : format == Format::kFp32  ? BlockShape{32, 2048}
         : format == Format::kQ4_0  ? BlockShape{64, 576}
         : format == Format::kQ8_0  ? BlockShape{64, 1088}
         : format == Format::kQ4K   ? BlockShape{256, 2304}
         : format == Format::kQ5K   ? BlockShape{256, 2816}
                                    : BlockShape{256, 3392};
}

constexpr int kFp8ScaleBlock = 128;  // rows and inputs that share a scale

// Of one fp8 panel block.
struct Fp8BlockData {
  float scale;  // finite, not negative
  // Bit v: vector v holds a code without exponent bits, which is a zero or a subnormal number.
  // Kernels decode the other vectors in fewer instructions.
  uint32_t small;
  uint8_t unused[24];
};
static_assert(sizeof(Fp8BlockData) == 32, "two fit into one vector");

// The parts of the fp8 panel block at p, for p as PanelLayout gives it (pairs begin at multiples of
// 64 bytes).
template <class Byte>
struct Fp8Block {
  Byte* data;   // Fp8BlockData
  Byte* codes;  // 32 vectors
};
template <class Byte>
static inline Fp8Block<Byte> fp8_block(Byte* p) {
  const int panel = static_cast<int>(reinterpret_cast<uintptr_t>(p) / 32 % 2);
  Byte* pair = p - panel * 2080;
  return {pair + panel * 32, pair + 64 + panel * 2048};
}

// Byte of input k within its row's four bytes.
static constexpr int fp8_byte(int64_t k) { return static_cast<int>(2 * (k % 2) + k / 2 % 2); }

// The value of an e4m3 code; 0x7f and 0xff are NaN.
static constexpr float fp8_value(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7f) == 0x7f) return __builtin_nanf("");
  float value = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) / 1024.f;
  for (int i = 0; i < (exponent == 0 ? 1 : exponent); ++i) value *= 2.f;
  return code & 0x80 ? -value : value;
}

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
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
