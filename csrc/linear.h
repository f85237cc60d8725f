// Dense projections on the CPU: G packed matrices of one shape, applied side by side.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "nodes.h"
#include "packed_memory.h"
#include "packing.h"
#include "task.h"
#include "thread_pool.h"
#include "workspace.h"

namespace moejet {

class LinearWeights {
 public:
  // G matrices [rows, cols]; unset ones are zero. The rows of each are divided among memory_nodes;
  // see ExpertWeights.
  LinearWeights(int64_t num_matrices, int64_t rows, int64_t cols, Format format,
                const std::vector<int>& memory_nodes = {kAnyNode},
                Arithmetic arithmetic = Arithmetic::kBf16);

  void set(int64_t matrix, const SourceMatrix& source, const KernelTable& table, ThreadPool* pool);
  void dequantize(int64_t matrix, float* out) const;
  void fill_random(uint64_t seed, ThreadPool* pool);

  int64_t num_matrices() const { return num_matrices_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  Format format() const { return format_; }
  Arithmetic arithmetic() const { return arithmetic_; }
  const PairGeometry& geometry() const { return geometry_; }
  int num_nodes() const { return memory_.num_nodes(); }
  // The pairs that lie with each node.
  const Slices& slices() const { return slices_; }
  // Pair p of matrix g in the node's slice lies at data(node) + g * matrix_bytes(node) + p *
  // pair_bytes.
  const uint8_t* data(int node) const { return origin(0, node); }
  int64_t matrix_bytes(int node) const { return memory_.slice_bytes(node); }
  int64_t bytes() const { return memory_.bytes(); }
  // Why the system would not place the memory on its nodes, or empty.
  std::string bind_error() const { return memory_.bind_error(); }
  const NodeMemory& memory() const { return memory_; }

 private:
  PanelLayout layout(int64_t matrix) const;
  std::vector<int64_t> slice_bytes() const;
  uint8_t* origin(int64_t matrix, int node) const {
    return memory_.slice(matrix, node) - slices_.begin(node) * geometry_.pair_bytes;
  }

  const int64_t num_matrices_, rows_, cols_;
  const Format format_;
  const Arithmetic arithmetic_;
  const PairGeometry geometry_;
  const Slices slices_;
  const NodeMemory memory_;
};

struct LinearCall {
  int64_t num_tokens;
  const void* x;  // [num_tokens, G, cols]
  DType x_dtype;
  int64_t x_stride, x_matrix_stride;  // elements; matrix stride 0: all matrices read the same input
  void* out;                          // [num_tokens, G, rows]
  DType out_dtype;
  int64_t out_stride, out_matrix_stride;
};

// out[t, g] = W_g x[t, g] as a task; may be used for one call after another. The result does not
// depend on the number of threads. Scratch memory comes from `workspace`, which must not serve
// anything else during a call.
class LinearTask final : public Task {
 public:
  LinearTask(const LinearWeights& weights, const KernelTable& table, Workspace* workspace,
             int num_threads);
  void begin(const LinearCall& call);
  bool next() override;
  void work(int worker) override;

 private:
  void begin_chunk();
  bool begin_compute();
  int64_t tasks_per_matrix(int node) const;

  const LinearWeights& weights_;
  const FormatKernels& kernels_;
  Workspace* workspace_;
  std::vector<WorkerScratch> scratch_;  // of each worker
  LinearCall call_{};
  int64_t chunk_ = 0, num_chunks_ = 0;
  enum class Phase { kChunk, kPrepare, kCompute } phase_ = Phase::kChunk;
  LinearBatch batch_{};
  std::vector<LinearBatch> node_batches_;  // batch_ with each node's weights
  int64_t input_rows_ = 0, pairs_per_task_ = 0;
  NodeItems items_;  // of the phase
};

void linear_forward(const LinearWeights& weights, const LinearCall& call, ThreadPool* pool,
                    const KernelTable& table);

}  // namespace moejet
