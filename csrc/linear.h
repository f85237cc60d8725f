// Dense projections on the CPU: G packed matrices of one shape, applied side by side.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "packed_memory.h"
#include "packing.h"
#include "task.h"
#include "thread_pool.h"
#include "workspace.h"

namespace moejet {

class LinearWeights {
 public:
  // G matrices [rows, cols]; unset ones are zero.
  LinearWeights(int64_t num_matrices, int64_t rows, int64_t cols, Format format);

  void set(int64_t matrix, const SourceMatrix& source, const KernelTable& table, ThreadPool* pool);
  void dequantize(int64_t matrix, float* out) const;
  void fill_random(uint64_t seed, ThreadPool* pool);

  int64_t num_matrices() const { return num_matrices_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  Format format() const { return format_; }
  const PairGeometry& geometry() const { return geometry_; }
  int64_t matrix_bytes() const { return geometry_.num_pairs * geometry_.pair_bytes; }
  int64_t bytes() const { return memory_.bytes(); }
  const uint8_t* data() const { return memory_.data(); }

 private:
  PanelLayout layout(int64_t matrix) const {
    return whole_pairs(memory_.data() + matrix * matrix_bytes(), format_, geometry_);
  }

  const int64_t num_matrices_, rows_, cols_;
  const Format format_;
  const PairGeometry geometry_;
  PackedMemory memory_;
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

  const LinearWeights& weights_;
  const FormatKernels& kernels_;
  Workspace* workspace_;
  std::vector<WorkerScratch> scratch_;  // of each worker
  LinearCall call_{};
  int64_t chunk_ = 0, num_chunks_ = 0;
  enum class Phase { kChunk, kPrepare, kCompute } phase_ = Phase::kChunk;
  LinearBatch batch_{};
  int64_t input_rows_ = 0, pairs_per_task_ = 0, tasks_per_matrix_ = 0, num_tasks_ = 0;
  std::atomic<int64_t> next_item_{0};  // of the phase
};

void linear_forward(const LinearWeights& weights, const LinearCall& call, ThreadPool* pool,
                    const KernelTable& table);

}  // namespace moejet
