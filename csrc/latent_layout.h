// A row of the latent cache, one per token and layer: C values of c_kv, then R of k_pe.
//   fp32, bf16   as they are: [C | R]
//   fp8          [C e4m3 codes | one fp32 scale for each 128 of them | R bf16 values]; the scales
//                begin at a multiple of 4 bytes, the row takes a multiple of 16. 656 bytes for
//                C = 512, R = 64, as in the quantised cache of DeepSeek's FlashMLA
//                (https://github.com/deepseek-ai/FlashMLA).
// An fp8 value is code * scale with scale = (largest magnitude of the group) / 448. A group with
// NaN or infinity has a NaN scale, one whose magnitudes are all below kFp8MinAmax has scale 0; both
// have codes 0, and no code is ever NaN. k_pe keeps bf16: its error would be the same for every
// head.
#pragma once

#include <cstdint>

namespace moejet {

constexpr int64_t kLatentGroup = 128;

struct LatentLayout {
  int64_t scales;  // bytes before the scales; fp8 only
  int64_t k_pe;    // bytes before k_pe
  int64_t bytes;   // of the row
};

// element_bytes: those of the cache's type, 1 for fp8.
static constexpr LatentLayout latent_layout(int64_t rank, int64_t rope, int element_bytes) {
  if (element_bytes > 1) return {0, rank * element_bytes, (rank + rope) * element_bytes};
  const int64_t scales = (rank + 3) / 4 * 4;
  const int64_t k_pe = scales + (rank + kLatentGroup - 1) / kLatentGroup * 4;
  return {scales, k_pe, (k_pe + 2 * rope + 15) / 16 * 16};
}

}  // namespace moejet
