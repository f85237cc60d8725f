// Vec, the widest fp32 vector of an instruction set (MOEJET_VEC_BITS), as a struct of static
// functions:
//   V, kWidth                     the type and its lanes
//   zero, broadcast, load, store, load_bf16, fma
//   load_e4m3(p)                  kWidth codes as values / kE4m3Factor; none is NaN
//   max(a, b)                     b if one of them is NaN
//   select_greater(a, b, x, y)    a > b ? x : y in each lane
//   exp2(x)                       2^x for x <= 0, to 1e-7; NaN stays NaN
//   transpose16(src, ld, dst)     16 rows of 16 fp32, ld apart: dst[16 i + r] = src[ld r + i]
#pragma once

#if !defined(MOEJET_ISA_NS) || !defined(MOEJET_VEC_BITS)
#error "vec-inl.h belongs into a file of isa/"
#endif

#include "../lanes-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// 2^f on [-0.5, 0.5], least maximum of the relative error.
constexpr float kExp2[6] = {1.f,         0.693146944f,   0.240221202f,
                            0.05550713f, 0.00967554189f, 0.00132764725f};

inline void transpose16_by_element(const float* src, int64_t ld, float* dst) {
  for (int r = 0; r < 16; ++r) {
    for (int i = 0; i < 16; ++i) dst[16 * i + r] = src[ld * r + i];
  }
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet

#if MOEJET_VEC_BITS == 512
#include "vec512-inl.h"
#elif MOEJET_VEC_BITS == 256
#include "vec256-inl.h"
#else
#include "vec128-inl.h"
#endif

namespace moejet {
namespace MOEJET_ISA_NS {

// The first n of a vector's lanes; all of them if n is more.
inline void store_part(float* dst, Vec::V v, int64_t n) {
  if (n >= Vec::kWidth) return Vec::store(dst, v);
  float all[Vec::kWidth];
  Vec::store(all, v);
  for (int64_t i = 0; i < n; ++i) dst[i] = all[i];
}
inline Vec::V load_part(const float* src, int64_t n) {
  if (n >= Vec::kWidth) return Vec::load(src);
  float all[Vec::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = src[i];
  return Vec::load(all);
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
