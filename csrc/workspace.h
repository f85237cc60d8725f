// Grow-only scratch memory that a pool lends to one caller at a time.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "sanitizer.h"

namespace moejet {

class Workspace {
 public:
  Workspace() = default;
  ~Workspace() { release(); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // At least `bytes` bytes on a 2 MB boundary, valid until the next call. Earlier contents are
  // lost.
  uint8_t* reserve(size_t bytes) {
    unpoison(data_, static_cast<int64_t>(capacity_));  // what an earlier user divided
    if (bytes <= capacity_) return data_;
    release();
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* memory = nullptr;
    if (posix_memalign(&memory, kHugePage, rounded) != 0) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(memory);
    capacity_ = rounded;
#if defined(MADV_HUGEPAGE)
    madvise(data_, capacity_, MADV_HUGEPAGE);  // advice only: small pages work as well
#endif
    return data_;
  }

  void release() {
    free(data_);
    data_ = nullptr;
    capacity_ = 0;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace moejet
