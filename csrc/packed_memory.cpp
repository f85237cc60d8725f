#include "packed_memory.h"

#include <sys/mman.h>

#include "sanitizer.h"

namespace moejet {

PackedMemory::PackedMemory(int64_t count, int64_t bytes_each, const char* what) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const double wanted = static_cast<double>(count) * static_cast<double>(bytes_each);
  const std::string size =
      std::to_string(wanted / 1e9) + " GB for " + std::to_string(count) + " " + what;
  if (wanted > 1e15) throw OutOfMemory("cannot reserve " + size);
  bytes_ = count * bytes_each;
  mapping_bytes_ = static_cast<size_t>(bytes_) + kHugePage;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw OutOfMemory("cannot reserve " + size);
  const uintptr_t start = reinterpret_cast<uintptr_t>(mapping_);
  data_ = reinterpret_cast<uint8_t*>((start + kHugePage - 1) / kHugePage * kHugePage);
#if defined(MADV_HUGEPAGE)
  // Advice: without it, small pages. Less than one huge page would only waste the rest of it.
  if (static_cast<size_t>(bytes_) >= kHugePage) {
    madvise(data_, static_cast<size_t>(bytes_), MADV_HUGEPAGE);
  }
#endif
  const uint8_t* end = static_cast<const uint8_t*>(mapping_) + mapping_bytes_;
  poison(mapping_, data_ - static_cast<uint8_t*>(mapping_));
  poison(data_ + bytes_, end - (data_ + bytes_));
}

PackedMemory::~PackedMemory() {
  unpoison(mapping_, static_cast<int64_t>(mapping_bytes_));
  munmap(mapping_, mapping_bytes_);
}

}  // namespace moejet
