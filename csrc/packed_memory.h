// Memory for packed weights: one mapping per node, on a 2 MB boundary and backed by huge pages
// where it is large enough. Pages become resident when written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "nodes.h"

namespace moejet {

// Becomes MemoryError with this message.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// The number of nodes. Throws std::invalid_argument unless there is one, and all are kAnyNode or
// numbers of nodes.
int check_nodes(const std::vector<int>& memory_nodes);

class PackedMemory {
 public:
  // count * bytes_each zero bytes, on the given node of the system as long as it has room. Throws
  // OutOfMemory naming `what` if the address space cannot be had.
  PackedMemory(int64_t count, int64_t bytes_each, const char* what, int node = kAnyNode);
  ~PackedMemory();
  PackedMemory(const PackedMemory&) = delete;
  PackedMemory& operator=(const PackedMemory&) = delete;

  // Puts a private view of the file's bytes from `offset` on, a multiple of the page size, in place
  // of the memory: shared with other processes until written to. The file must be long enough and
  // stay as it is. Throws std::system_error.
  void map_file(int fd, int64_t offset);

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // Why the system refused to place the memory; empty if it did or was not asked. Then the worker
  // that first writes to a page decides.
  const std::string& bind_error() const { return bind_error_; }

 private:
  int64_t bytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  uint8_t* data_ = nullptr;
  std::string bind_error_;
};

// `count` objects (experts, matrices), each cut into one slice per node: a mapping for each node
// holds the slices of all objects, slice_bytes[node] apart.
class NodeMemory {
 public:
  // nodes: numbers of the system, or kAnyNode.
  NodeMemory(const std::vector<int>& nodes, int64_t count, std::vector<int64_t> slice_bytes,
             const char* what);

  int num_nodes() const { return static_cast<int>(parts_.size()); }
  // Some part was to lie on one node of the system.
  bool is_placed() const { return is_placed_; }
  int64_t slice_bytes(int node) const { return slice_bytes_[static_cast<size_t>(node)]; }
  uint8_t* slice(int64_t object, int node) const {
    return parts_[static_cast<size_t>(node)]->data() + object * slice_bytes(node);
  }
  int64_t node_bytes(int node) const { return parts_[static_cast<size_t>(node)]->bytes(); }
  void map_file(int node, int fd, int64_t offset) const {
    parts_[static_cast<size_t>(node)]->map_file(fd, offset);
  }
  int64_t bytes() const;
  // Of the first node that has one.
  std::string bind_error() const;

 private:
  std::vector<int64_t> slice_bytes_;
  std::vector<std::unique_ptr<PackedMemory>> parts_;
  bool is_placed_ = false;
};

}  // namespace moejet
