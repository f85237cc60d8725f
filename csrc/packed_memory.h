// Memory for packed weights: one mapping, on a 2 MB boundary and backed by huge pages where it is
// large enough. Pages become resident when written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <utility>

namespace moejet {

// Becomes MemoryError with this message.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

class PackedMemory {
 public:
  // count * bytes_each zero bytes. Throws OutOfMemory naming `what` if the address space cannot be
  // had.
  PackedMemory(int64_t count, int64_t bytes_each, const char* what);
  ~PackedMemory();
  PackedMemory(const PackedMemory&) = delete;
  PackedMemory& operator=(const PackedMemory&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  uint8_t* data_ = nullptr;
};

}  // namespace moejet
