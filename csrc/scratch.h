// How one reservation of scratch memory is divided, for moe.cpp, linear.cpp and attention.cpp.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "sanitizer.h"
#include "workspace.h"

namespace moejet {

// Hands out 64-byte aligned parts of one reservation; with a null base it only adds up sizes.
class Layout {
 public:
  explicit Layout(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    const int64_t taken = round_up(bytes, 64) + kRedZone;
    uint8_t* part = base_ == nullptr ? nullptr : base_ + bytes_;
    if (part != nullptr) {
      unpoison(part, bytes);
      poison(part + bytes, taken - bytes);
    }
    bytes_ += taken;
    return reinterpret_cast<T*>(part);
  }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* base_;
  int64_t bytes_ = 0;
};

// Reserves what take(Layout*) takes. It is called twice, first to add up sizes.
template <class Take>
void reserve_scratch(Workspace* workspace, const Take& take) {
  Layout sizes(nullptr);
  take(&sizes);
  Layout layout(workspace->reserve(static_cast<size_t>(sizes.bytes())));
  take(&layout);
}

inline Activations take_activations(Layout* layout, Format format, int64_t rows, int64_t k_padded) {
  Activations acts{};
  acts.ld = k_padded;
  acts.ld_groups = k_padded / kActGroup;
  if (takes_fp32(format)) {
    acts.f32 = layout->take<float>(rows * acts.ld);
  } else {
    acts.q = layout->take<int8_t>(rows * acts.ld);
    acts.scale = layout->take<float>(rows * acts.ld_groups);
    acts.offset = layout->take<int32_t>(rows * acts.ld_groups);
    acts.half_offset = layout->take<int32_t>(2 * rows * acts.ld_groups);
  }
  return acts;
}

// For a multiple of 16 rows.
inline TileActivations take_tiles(Layout* layout, Arithmetic arithmetic, int64_t rows,
                                  int64_t k_padded) {
  TileActivations tiles{};
  if (arithmetic == Arithmetic::kBf16) {
    tiles.bf16 = layout->take<uint16_t>(rows * k_padded);
  } else {
    tiles.q = layout->take<int8_t>(rows * k_padded);
    tiles.scale = layout->take<float>(rows * ceil_div(k_padded, kInt8Group));
  }
  return tiles;
}

}  // namespace moejet
