// Kernels for any processor: the definition of what the others compute, one row at a time.
#define MOEJET_ISA_NS scalar
#define MOEJET_VEC_BITS 128
#include <math.h>

#include "../moe-inl.h"
#include "attention-vectors-inl.h"
#include "gguf-scalar-inl.h"
#include "ops-inl.h"

namespace moejet {
namespace scalar {
namespace {

inline float bf16_value(uint32_t bits_in_high_half) {
  float value;
  std::memcpy(&value, &bits_in_high_half, sizeof(value));
  return value;
}
inline uint32_t word(const uint8_t* p, int lane) {
  uint32_t w;
  std::memcpy(&w, p + 4 * lane, sizeof(w));
  return w;
}

struct Int4 {
  static constexpr Format kFormat = Format::kInt4G32;
  static constexpr int kMr = 1;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    float sum[kPairCols] = {};
    const uint8_t* block = pair;
    for (int64_t b = 0; b < 2 * num_blocks; ++b, block += 576) {
      float* s = sum + b % 2 * kPanelRows;
      for (int group = 0; group < 2; ++group) {
        const int64_t g = 2 * (b / 2) + group;
        const int8_t* x = rows.q[0] + 32 * g;
        for (int r = 0; r < kPanelRows; ++r) {
          int32_t dot = rows.offset[0][g];
          for (int k = 0; k < 32; ++k) {
            const int byte = block[k / 4 * 64 + 4 * r + k % 4];
            dot += (group == 0 ? byte & 15 : byte >> 4) * x[k];
          }
          const uint32_t scales = word(block + 512, r);
          const float scale = bf16_value(group == 0 ? scales << 16 : scales & 0xffff0000u);
          s[r] = fmaf(static_cast<float>(dot), scale * rows.scale[0][g], s[r]);
        }
      }
    }
    std::memcpy(out, sum, sizeof(sum));
  }
};

struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kMr = 1;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    float sum[kPairCols] = {};
    const uint8_t* block = pair;
    for (int64_t b = 0; b < 2 * num_blocks; ++b, block += 2112) {
      float* s = sum + b % 2 * kPanelRows;
      for (int r = 0; r < kPanelRows; ++r) {
        float in_block = 0.f;
        for (int group = 0; group < 4; ++group) {
          const int64_t g = 4 * (b / 2) + group;
          const int8_t* x = rows.q[0] + 32 * g;
          int32_t dot = 0;
          for (int k = 0; k < 32; ++k) {
            const uint8_t* code = block + (8 * group + k / 4) * 64 + 4 * r + k % 4;
            dot += static_cast<int8_t>(*code) * x[k];
          }
          in_block = fmaf(static_cast<float>(dot), rows.scale[0][g], in_block);
        }
        float scale;
        std::memcpy(&scale, block + 2048 + 4 * r, sizeof(scale));
        s[r] = fmaf(in_block, scale, s[r]);
      }
    }
    std::memcpy(out, sum, sizeof(sum));
  }
};

struct Bf16 {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kMr = 1;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    float sum[kPairCols] = {};
    const uint8_t* block = pair;
    for (int64_t b = 0; b < 2 * num_blocks; ++b, block += 1024) {
      float* s = sum + b % 2 * kPanelRows;
      const float* x = rows.f32[0] + b / 2 * 32;
      for (int v = 0; v < 16; ++v) {
        for (int r = 0; r < kPanelRows; ++r) {
          const uint32_t two = word(block + 64 * v, r);
          s[r] += bf16_value(two << 16) * x[2 * v];
          s[r] += bf16_value(two & 0xffff0000u) * x[2 * v + 1];
        }
      }
    }
    std::memcpy(out, sum, sizeof(sum));
  }
};

struct Fp8Values {
  constexpr Fp8Values() {
    for (int code = 0; code < 256; ++code) value[code] = fp8_value(static_cast<uint8_t>(code));
  }
  float value[256] = {};
};
constexpr Fp8Values kFp8Values;

struct Fp8 {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr int kMr = 1;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    float sum[kPairCols] = {};
    for (int64_t b = 0; b < 2 * num_blocks; ++b) {
      const Fp8Block<const uint8_t> block = fp8_block(pair + 2080 * b);
      Fp8BlockData data;
      std::memcpy(&data, block.data, sizeof(data));
      const float* x = rows.f32[0] + b / 2 * 128;
      float in_block[kPanelRows] = {};
      for (int k = 0; k < 128; ++k) {
        const uint8_t* codes = block.codes + k / 4 * 64 + fp8_byte(k);
        for (int r = 0; r < kPanelRows; ++r) in_block[r] += kFp8Values.value[codes[4 * r]] * x[k];
      }
      float* s = sum + b % 2 * kPanelRows;
      for (int r = 0; r < kPanelRows; ++r) s[r] += in_block[r] * data.scale;
    }
    std::memcpy(out, sum, sizeof(sum));
  }
};

struct Fp32 {
  static constexpr Format kFormat = Format::kFp32;
  static constexpr int kMr = 1;
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    float sum[kPairCols] = {};
    const uint8_t* block = pair;
    for (int64_t b = 0; b < 2 * num_blocks; ++b, block += 2048) {
      float* s = sum + b % 2 * kPanelRows;
      const float* x = rows.f32[0] + b / 2 * 32;
      for (int v = 0; v < 32; ++v) {
        float w[kPanelRows];
        std::memcpy(w, block + 64 * v, sizeof(w));
        for (int r = 0; r < kPanelRows; ++r) s[r] += w[r] * x[v];
      }
    }
    std::memcpy(out, sum, sizeof(sum));
  }
};

}  // namespace

extern const KernelTable table = {
    Isa::kScalar,
    {format_kernels<Int4, NoTiles>(), format_kernels<Int8, NoTiles>(),
     format_kernels<Bf16, NoTiles>(), format_kernels<Fp8, NoTiles>(),
     format_kernels<Fp32, NoTiles>(), format_kernels<Gguf<Format::kQ4_0>, NoTiles>(),
     format_kernels<Gguf<Format::kQ8_0>, NoTiles>(), format_kernels<Gguf<Format::kQ4K>, NoTiles>(),
     format_kernels<Gguf<Format::kQ5K>, NoTiles>(), format_kernels<Gguf<Format::kQ6K>, NoTiles>()},
    op_kernels(),
    {attention_kernels<Fp32Dot>(), attention_kernels<Fp32Dot>()}};

}  // namespace scalar
}  // namespace moejet
