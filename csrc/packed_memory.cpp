#include "packed_memory.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "sanitizer.h"

namespace moejet {
namespace {

constexpr int kMaxNodes = 1024;  // more than any kernel is configured for

// Empty, or why not. By system call: libnuma would be one more library to have.
std::string place_on_node(void* start, size_t bytes, int node) {
#if defined(SYS_mbind)
  constexpr int kPreferred = 1;  // MPOL_PREFERRED: other nodes when this one is full
  unsigned long mask[kMaxNodes / 64] = {};
  mask[node / 64] |= 1ul << node % 64;
  if (syscall(SYS_mbind, start, bytes, kPreferred, mask, kMaxNodes + 1, 0) == 0) return {};
  return "mbind to memory node " + std::to_string(node) + " failed: " + std::strerror(errno);
#else
  (void)start, (void)bytes;
  return "this system has no mbind for memory node " + std::to_string(node);
#endif
}

}  // namespace

int check_nodes(const std::vector<int>& memory_nodes) {
  if (memory_nodes.empty()) {
    throw std::invalid_argument("memory_nodes is empty: use [-1] for memory of any node");
  }
  for (const int node : memory_nodes) {
    if (node < kAnyNode || node >= kMaxNodes) {
      throw std::invalid_argument("memory_nodes: " + std::to_string(node) +
                                  " is no node: use its number, or -1 for any");
    }
  }
  return static_cast<int>(memory_nodes.size());
}

PackedMemory::PackedMemory(int64_t count, int64_t bytes_each, const char* what, int node) {
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
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t whole_pages = (static_cast<size_t>(bytes_) + page - 1) / page * page;
  if (node != kAnyNode && bytes_ > 0) bind_error_ = place_on_node(data_, whole_pages, node);
  const uint8_t* end = static_cast<const uint8_t*>(mapping_) + mapping_bytes_;
  poison(mapping_, data_ - static_cast<uint8_t*>(mapping_));
  poison(data_ + bytes_, end - (data_ + bytes_));
}

void PackedMemory::map_file(int fd, int64_t offset) {
  if (bytes_ == 0) return;
  struct stat info{};
  if (fstat(fd, &info) != 0) {
    throw std::system_error(errno, std::generic_category(), "cannot map packed weights");
  }
  if (offset < 0 || offset > info.st_size - bytes_) {
    throw std::system_error(EINVAL, std::generic_category(),
                            "cannot map packed weights: the file is too short");
  }
  unpoison(mapping_, static_cast<int64_t>(mapping_bytes_));
  const void* view = mmap(data_, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, offset);
  if (view == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "cannot map packed weights");
  }
#if defined(MADV_HUGEPAGE)
  madvise(data_, static_cast<size_t>(bytes_), MADV_HUGEPAGE);
#endif
}

PackedMemory::~PackedMemory() {
  unpoison(mapping_, static_cast<int64_t>(mapping_bytes_));
  munmap(mapping_, mapping_bytes_);
}

NodeMemory::NodeMemory(const std::vector<int>& nodes, int64_t count,
                       std::vector<int64_t> slice_bytes, const char* what)
    : slice_bytes_(std::move(slice_bytes)) {
  for (size_t node = 0; node < nodes.size(); ++node) {
    parts_.push_back(std::make_unique<PackedMemory>(count, slice_bytes_[node], what, nodes[node]));
    is_placed_ |= nodes[node] != kAnyNode;
  }
}

int64_t NodeMemory::bytes() const {
  int64_t sum = 0;
  for (int node = 0; node < num_nodes(); ++node) sum += node_bytes(node);
  return sum;
}

std::string NodeMemory::bind_error() const {
  for (const auto& part : parts_) {
    if (!part->bind_error().empty()) return part->bind_error();
  }
  return {};
}

}  // namespace moejet
