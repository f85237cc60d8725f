// GGUF's formats for any processor: the order of operations that all instruction sets follow.
#pragma once

#ifndef MOEJET_ISA_NS
#error "gguf-scalar-inl.h belongs into a file of isa/"
#endif

#include <math.h>

#include "../moe-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

template <Format kF>
struct Gguf {
  static constexpr Format kFormat = kF;
  static constexpr int kMr = 1;
  static constexpr int kManyRows = 0;
  static constexpr int kBlockGroups = block_shape(kF).k / 32;

  // Sum of the products of inputs [begin, end) of a group.
  static int32_t dot(const uint8_t* block, int g, int begin, int end, int r, const int8_t* x) {
    int32_t sum = 0;
    for (int i = begin; i < end; ++i) sum += gguf_code<kF>(block, g, i, r) * x[i];
    return sum;
  }

  // Adds group g, the rows' group `group`, to what the block's end is applied to.
  static void add_group(const uint8_t* block, int g, int r, const RowRefs& rows, int64_t group,
                        float* sum, float* mins) {
    const int8_t* x = rows.q[0] + 32 * group;
    const float x_scale = rows.scale[0][group];
    if constexpr (kF == Format::kQ6K) {
      float both = 0.f;
      for (int half = 0; half < 2; ++half) {
        const int32_t products =
            rows.half_offset[0][2 * group + half] + dot(block, g, 16 * half, 16 * half + 16, r, x);
        const int8_t scale = static_cast<int8_t>(gguf_scale_byte(block, 2 * g + half, r));
        both = fmaf(static_cast<float>(products), scale, both);
      }
      *sum = fmaf(both, x_scale, *sum);
    } else if constexpr (gguf_has_mins(kF)) {
      const GgufScaleMin packed = gguf_scale_min(block, g, r);
      const float products = static_cast<float>(dot(block, g, 0, 32, r, x));
      *sum = fmaf(products * static_cast<float>(packed.scale), x_scale, *sum);
      const float offset = static_cast<float>(rows.offset[0][group]);
      *mins = fmaf(offset * static_cast<float>(packed.min), x_scale, *mins);
    } else {
      const int32_t start = kF == Format::kQ4_0 ? rows.offset[0][group] : 0;
      const float products = static_cast<float>(start + dot(block, g, 0, 32, r, x));
      *sum = fmaf(products, gguf_half<kF>(block, g, r) * x_scale, *sum);
    }
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    std::memset(out, 0, kPairCols * sizeof(float));
    const uint8_t* block = pair;
    for (int64_t b = 0; b < 2 * num_blocks; ++b, block += block_shape(kF).bytes) {
      for (int r = 0; r < kPanelRows; ++r) {
        float* total = out + b % 2 * kPanelRows + r;
        float sum = 0.f, mins = 0.f;
        for (int c = 0; c < gguf_chunks(kF); ++c) {
          for (int side = 0; side < 2; ++side) {
            const int g = gguf_first_group(kF, c) + side * gguf_group_step(kF);
            constexpr bool kPlain = kBlockGroups == 2;
            add_group(block, g, r, rows, b / 2 * kBlockGroups + g, kPlain ? total : &sum, &mins);
          }
        }
        if constexpr (kBlockGroups == 8) {
          *total = fmaf(sum, gguf_half<kF>(block, 0, r), *total);
        }
        // offset is -8 times the sum of activations.
        if constexpr (gguf_has_mins(kF)) {
          *total = fmaf(mins, gguf_half<kF>(block, 1, r) * 0.125f, *total);
        }
      }
    }
  }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
