// Packing, reading back and random filling of whole matrices; the layout is in pack.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "nodes.h"
#include "pack.h"
#include "thread_pool.h"

namespace moejet {

// As users write it.
const char* format_name(Format format);

// A source matrix [rows, cols], rows row_stride elements (int4, GGUF: bytes) apart.
struct SourceMatrix {
  const void* data;
  DType dtype;
  int64_t row_stride, rows, cols;
  // fp8 only: [ceil(rows / 128), ceil(cols / 128)], what each 128 x 128 block is multiplied by;
  // finite and not negative.
  const float* scale_inv = nullptr;
  // int4 only: bf16 [rows, cols / 32], cols being a multiple of 32; finite.
  const uint16_t* group_scales = nullptr;
  Format gguf_format = Format::kQ4_0;  // of kGguf; cols is whole blocks of it
};

// Throws std::invalid_argument, naming the value, unless 1 <= value <= 2^20 (or limit).
void check_size(const char* name, int64_t value, int64_t limit = int64_t{1} << 20);

// body(i) for i in [0, count) on the pool's workers, or here if pool is null.
template <class Body>
void for_each_index(int64_t count, ThreadPool* pool, const Body& body) {
  if (pool == nullptr) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  pool->acquire().run(1, [&](int, int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

// body(node, i) for i in [0, counts[node]) of every node, as far as possible by that node's
// workers.
template <class Body>
void for_each_on_nodes(const std::vector<int64_t>& counts, ThreadPool* pool, const Body& body) {
  NodeItems items(static_cast<int>(counts.size()));
  for (size_t node = 0; node < counts.size(); ++node) {
    items.set(static_cast<int>(node), counts[node]);
  }
  if (pool == nullptr) return items.drain(0, body);
  pool->acquire().run(1, [&](int, int) { items.drain(ThreadPool::current_node(), body); });
}

// Where the panels of a matrix lie: panel p of a node's slice starts at origins[node] + p /
// per_group * group_bytes + p % per_group * panel_bytes; its blocks are 2 * block bytes apart.
struct PanelLayout {
  std::vector<uint8_t*> origins;
  Slices slices;  // of the panels
  int64_t num_panels;
  int64_t per_group, group_bytes, panel_bytes;
  uint8_t* panel(int64_t p) const {
    return origins[static_cast<size_t>(slices.node_of(p))] + p / per_group * group_bytes +
           p % per_group * panel_bytes;
  }
};
// origins: where pair 0 would lie if the node had all pairs. Both panels of each pair belong to the
// matrix.
PanelLayout whole_pairs(std::vector<uint8_t*> origins, Format format, const PairGeometry& geometry);
// The matrix has one panel (0 or 1) of each pair; nodes have whole units.
PanelLayout half_pairs(std::vector<uint8_t*> origins, Format format, const PairGeometry& geometry,
                       int which);

// Quantises and packs; fp8 into fp8 and int4 into int4_g32 keep every code and scale, GGUF sources
// fit into their own format only and keep every bit. Throws std::invalid_argument if a value cannot
// be represented; the packed matrix is then undefined.
void pack_matrix(Format format, const SourceMatrix& source, const PanelLayout& layout,
                 const KernelTable& table, ThreadPool* pool);
// The values that the kernels compute with, fp32 [rows, cols].
void unpack_matrix(Format format, const PanelLayout& layout, int64_t rows, int64_t cols,
                   float* out);
// Random weights with a standard deviation of about sigma for one pair.
void fill_pair(Format format, const PairGeometry& geometry, uint64_t seed, float sigma,
               uint8_t* pair);

}  // namespace moejet
