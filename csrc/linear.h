// Dense projections on the CPU: G packed matrices of one shape, applied side by side.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "packed_memory.h"
#include "packing.h"
#include "thread_pool.h"

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

// out[t, g] = W_g x[t, g]. The result does not depend on the number of threads.
void linear_forward(const LinearWeights& weights, const LinearCall& call, ThreadPool* pool,
                    const KernelTable& table);

}  // namespace moejet
