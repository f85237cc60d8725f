// How one reservation of scratch memory is divided, for moe.cpp and linear.cpp.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace moejet {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out 64-byte aligned parts of one reservation; with a null base it only adds up sizes.
class Layout {
 public:
  explicit Layout(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* base_;
  int64_t bytes_ = 0;
};

inline Activations take_activations(Layout* layout, Format format, int64_t rows, int64_t k_padded) {
  Activations acts{};
  acts.ld = k_padded;
  acts.ld_groups = k_padded / kActGroup;
  if (format == Format::kBf16) {
    acts.f32 = layout->take<float>(rows * acts.ld);
  } else {
    acts.q = layout->take<int8_t>(rows * acts.ld);
    acts.scale = layout->take<float>(rows * acts.ld_groups);
    acts.offset = layout->take<int32_t>(rows * acts.ld_groups);
  }
  return acts;
}

}  // namespace moejet
