// Lets AddressSanitizer see our own allocations: memory between the parts of one reservation, or
// beyond packed weights, belongs to nobody. Without the sanitizer nothing here costs anything.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace moejet {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kRedZone = 64;  // bytes behind each part of a reservation
inline void poison(const void* start, int64_t bytes) {
  __asan_poison_memory_region(start, static_cast<size_t>(bytes));
}
inline void unpoison(const void* start, int64_t bytes) {
  __asan_unpoison_memory_region(start, static_cast<size_t>(bytes));
}
#else
constexpr int64_t kRedZone = 0;
inline void poison(const void*, int64_t) {}
inline void unpoison(const void*, int64_t) {}
#endif

}  // namespace moejet
