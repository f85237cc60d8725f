// Embedding, residual sums, RMS norm, rotary embedding, latent cache rows; see ops.h.
#pragma once

#include "op-lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

inline void embed_row(const EmbedTable& table, int64_t token, float* out) {
  const int64_t start = token * table.row_stride;
  if (table.dtype == DType::kF32) {
    std::memcpy(out, static_cast<const float*>(table.weight) + start,
                static_cast<size_t>(table.hidden_size) * sizeof(float));
    return;
  }
  const uint16_t* row = static_cast<const uint16_t*>(table.weight) + start;
  int64_t i = 0;
  for (; i + kLanes <= table.hidden_size; i += kLanes) store(out + i, bf16_lanes(row + i));
  for (; i < table.hidden_size; ++i) out[i] = element(row, DType::kBf16, i);
}

// h += a + b with body(new h, i, count) for the vectors in order; b may be null.
template <class Body>
inline void add_lanes(int64_t n, const float* a, const float* b, float* h, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    F delta = load<F>(a + i);
    if (b != nullptr) delta = delta + load<F>(b + i);
    const F sum = load<F>(h + i) + delta;
    store(h + i, sum);
    body(sum, i);
  }
  if (i == n) return;
  F delta = load_first(a + i, n - i);
  if (b != nullptr) delta = delta + load_first(b + i, n - i);
  const F sum = load_first(h + i, n - i) + delta;
  store_first(h + i, sum, n - i);
  body(sum, i);
}

inline void add_row(int64_t n, const float* a, const float* b, float* h) {
  add_lanes(n, a, b, h, [](F, int64_t) {});
}

// 1 / sqrt(mean + eps) of n squares.
inline float inverse_rms(const SumLanes& squares, int64_t n, float eps) {
  return 1.f / __builtin_sqrtf(squares.total() / static_cast<float>(n) + eps);
}

// The squares of lanes i .. i + 15 go to part i / 16 % 4.
inline void add_square(SumLanes* squares, F v, int64_t i) {
  F& part = squares->part[i / kLanes % 4];
  part = part + v * v;
}

inline float row_inverse_rms(const float* x, int64_t n, float eps) {
  SumLanes squares;
  for_lanes(x, n, [&](F v, int64_t i, int) { add_square(&squares, v, i); });
  return inverse_rms(squares, n, eps);
}

inline void scale_row(const float* weight, int64_t n, float inverse, const float* x, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(y + i, load<F>(x + i) * inverse * load<F>(weight + i));
  }
  for (; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

inline void rms_norm_row(const RmsNorm& norm, const float* x, float* y) {
  scale_row(norm.weight, norm.dim, row_inverse_rms(x, norm.dim, norm.eps), x, y);
}

inline void add_rms_norm_row(const RmsNorm& norm, const float* a, const float* b, float* h,
                             float* y) {
  SumLanes squares;
  add_lanes(norm.dim, a, b, h, [&](F v, int64_t i) { add_square(&squares, v, i); });
  scale_row(norm.weight, norm.dim, inverse_rms(squares, norm.dim, norm.eps), h, y);
}

// One head; x and y may be the same.
inline void rotate(const float* cos_sin, int64_t dim, bool interleave, const float* x,
                   float* __restrict y) {
  const int64_t half = dim / 2;
  float first[kMaxRopeDim / 2], second[kMaxRopeDim / 2];
  if (interleave) {
    for (int64_t i = 0; i < half; ++i) {
      first[i] = x[2 * i];
      second[i] = x[2 * i + 1];
    }
  } else {
    std::memcpy(first, x, static_cast<size_t>(half) * sizeof(float));
    std::memcpy(second, x + half, static_cast<size_t>(half) * sizeof(float));
  }
  const float* cos = cos_sin;
  const float* sin = cos_sin + half;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = first[i] * cos[i] - second[i] * sin[i];
    y[half + i] = second[i] * cos[i] + first[i] * sin[i];
  }
}

inline void rope_row(const RopeRow& row) {
  for (int64_t head = 0; head < row.num_heads; ++head) {
    rotate(row.cos_sin, row.dim, row.interleave, row.x + head * row.x_stride,
           row.y + head * row.y_stride);
  }
}

// A group of a latent row to fp8 codes; returns their scale.
inline float store_fp8_group(const float* src, int64_t n, uint8_t* codes) {
  WI largest = {};
  for_wide(src, n, 0.f, [&](W v, int64_t, int) { largest = larger(largest, wide_magnitude(v)); });
  const int32_t max_bits = max_wide(largest);
  float amax;
  std::memcpy(&amax, &max_bits, sizeof(amax));
  if (max_bits >= 0x7f800000 || amax < kFp8MinAmax) {
    std::memset(codes, 0, static_cast<size_t>(n));
    return max_bits >= 0x7f800000 ? __builtin_nanf("") : 0.f;
  }
  const float scale = amax / kFp8Max;
  for_wide(src, n, 0.f, [&](W v, int64_t i, int count) {
    const WideU8 bytes = fp8_codes(v / scale);
    std::memcpy(codes + i, &bytes, static_cast<size_t>(count));
  });
  return scale;
}

// Values [begin, begin + n) of c_kv; begin is a multiple of kLatentGroup.
inline void store_c_kv(const LatentRow& row, const LatentLayout& layout, const float* src,
                       int64_t begin, int64_t n) {
  uint8_t* out = static_cast<uint8_t*>(row.out);
  if (row.out_dtype != DType::kFp8) {
    store_row(src, n, row.out_dtype, out + begin * dtype_bytes(row.out_dtype));
    return;
  }
  for (int64_t i = 0; i < n; i += kLatentGroup) {
    const int64_t first = begin + i;
    const float scale = store_fp8_group(src + i, smaller(kLatentGroup, n - i), out + first);
    std::memcpy(out + layout.scales + first / kLatentGroup * 4, &scale, sizeof(scale));
  }
}

inline void store_latent_row(const LatentRow& row) {
  const LatentLayout layout = latent_layout(row.rank, row.rope_dim, dtype_bytes(row.out_dtype));
  uint8_t* out = static_cast<uint8_t*>(row.out);
  const bool is_fp8 = row.out_dtype == DType::kFp8;
  if (is_fp8) {  // what lies between the parts and behind them
    std::memset(out + row.rank, 0, static_cast<size_t>(layout.bytes - row.rank));
  }
  if (row.norm_weight == nullptr) {
    store_c_kv(row, layout, row.c_kv, 0, row.rank);
  } else {
    const float inverse = row_inverse_rms(row.c_kv, row.rank, row.eps);
    constexpr int64_t kBlock = 2 * kLatentGroup;
    float normed[kBlock];
    for (int64_t i = 0; i < row.rank; i += kBlock) {
      const int64_t n = row.rank - i < kBlock ? row.rank - i : kBlock;
      scale_row(row.norm_weight + i, n, inverse, row.c_kv + i, normed);
      store_c_kv(row, layout, normed, i, n);
    }
  }
  out += layout.k_pe;
  const DType dtype = is_fp8 ? DType::kBf16 : row.out_dtype;
  if (row.cos_sin == nullptr) {
    store_row(row.k_pe, row.rope_dim, dtype, out);
    return;
  }
  float rotated[kMaxRopeDim];
  rotate(row.cos_sin, row.rope_dim, row.interleave, row.k_pe, rotated);
  store_row(rotated, row.rope_dim, dtype, out);
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
