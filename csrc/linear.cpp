#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "scratch.h"

namespace moejet {
namespace {

// Bounds scratch memory, which is proportional to the tokens of a chunk.
constexpr int64_t kMaxChunkTokens = 1024;
// Below this many values the caller prepares inputs alone: a barrier would cost as much.
constexpr int64_t kSerialPrepareValues = 32 * 1024;
constexpr int64_t kTasksPerThread = 8;

PairGeometry linear_geometry(Format format, int64_t rows, int64_t cols) {
  check_size("rows", rows);
  check_size("cols", cols);
  return pair_geometry(format, cols, ceil_div(rows, kPairCols));
}

void take_scratch(Layout* layout, int64_t input_rows, int64_t input_tile_rows, LinearBatch* batch,
                  std::vector<WorkerScratch>* workers) {
  const int64_t k_padded = batch->geometry.k_padded;
  if (batch->tiles) {
    batch->a_tiles = layout->take<uint16_t>(input_tile_rows * k_padded);
  } else {
    batch->acts = take_activations(layout, batch->format, input_rows, k_padded);
  }
  for (WorkerScratch& worker : *workers) {
    worker.row = layout->take<float>(k_padded);
    worker.gate_up = layout->take<float>(std::max(kVectorRowBlock, kTileRowBlock) * kPairCols);
    worker.unpacked = layout->take<uint16_t>(batch->tiles ? kTileChunkK * kPairCols : 0);
  }
}

void forward_chunk(const LinearWeights& weights, const LinearCall& call, ThreadPool::Lease* lease,
                   const FormatKernels& kernels) {
  LinearBatch batch{};
  batch.format = weights.format();
  batch.num_tokens = call.num_tokens;
  batch.num_matrices = weights.num_matrices();
  batch.rows = weights.rows();
  batch.cols = weights.cols();
  batch.geometry = weights.geometry();
  batch.weights = weights.data();
  batch.matrix_bytes = weights.matrix_bytes();
  batch.x = call.x;
  batch.x_dtype = call.x_dtype;
  batch.x_stride = call.x_stride;
  batch.x_matrix_stride = call.x_matrix_stride;
  batch.out = call.out;
  batch.out_dtype = call.out_dtype;
  batch.out_stride = call.out_stride;
  batch.out_matrix_stride = call.out_matrix_stride;
  batch.tiles = kernels.min_tile_rows > 0 && call.num_tokens >= kernels.min_tile_rows;

  const int64_t inputs = call.x_matrix_stride == 0 ? 1 : batch.num_matrices;
  const int64_t input_rows = inputs * batch.num_tokens;
  const int64_t input_tile_rows = inputs * round_up(batch.num_tokens, kTileRows);
  std::vector<WorkerScratch> workers(lease->num_threads());
  Layout sizes(nullptr);
  take_scratch(&sizes, input_rows, input_tile_rows, &batch, &workers);
  Layout layout(lease->workspace().reserve(static_cast<size_t>(sizes.bytes())));
  take_scratch(&layout, input_rows, input_tile_rows, &batch, &workers);

  const int64_t all_pairs = batch.geometry.num_pairs * batch.num_matrices;
  const int64_t pairs_per_task = std::clamp<int64_t>(
      ceil_div(all_pairs, kTasksPerThread * lease->num_threads()), 1, batch.geometry.num_pairs);
  const int64_t tasks_per_matrix = ceil_div(batch.geometry.num_pairs, pairs_per_task);
  const int64_t num_tasks = tasks_per_matrix * batch.num_matrices;

  const bool serial = input_rows * batch.cols <= kSerialPrepareValues;
  if (serial) {
    for (int64_t row = 0; row < input_rows; ++row) kernels.linear_prepare(batch, row, &workers[0]);
  }
  std::atomic<int64_t> next_row{0}, next_task{0};
  const auto take = [](std::atomic<int64_t>* next) {
    return next->fetch_add(1, std::memory_order_relaxed);
  };
  const int first_phase = serial ? 1 : 0;
  lease->run(2 - first_phase, [&](int phase, int worker) {
    WorkerScratch* scratch = &workers[worker];
    if (phase + first_phase == 0) {
      for (int64_t row; (row = take(&next_row)) < input_rows;) {
        kernels.linear_prepare(batch, row, scratch);
      }
      return;
    }
    for (int64_t task; (task = take(&next_task)) < num_tasks;) {
      const int64_t pair = task % tasks_per_matrix * pairs_per_task;
      kernels.linear(batch, task / tasks_per_matrix, pair,
                     std::min(pair + pairs_per_task, batch.geometry.num_pairs), scratch);
    }
  });
}

}  // namespace

LinearWeights::LinearWeights(int64_t num_matrices, int64_t rows, int64_t cols, Format format)
    : num_matrices_((check_size("num_matrices", num_matrices), num_matrices)),
      rows_(rows),
      cols_(cols),
      format_(format),
      geometry_(linear_geometry(format, rows, cols)),
      memory_(num_matrices, matrix_bytes(), "matrices") {}

void LinearWeights::set(int64_t matrix, const SourceMatrix& source, const KernelTable& table,
                        ThreadPool* pool) {
  pack_matrix(format_, source, layout(matrix), table, pool);
}

void LinearWeights::dequantize(int64_t matrix, float* out) const {
  unpack_matrix(format_, layout(matrix), rows_, cols_, out);
}

void LinearWeights::fill_random(uint64_t seed, ThreadPool* pool) {
  const float sigma = 1.f / std::sqrt(static_cast<float>(cols_));
  for_each_index(num_matrices_ * geometry_.num_pairs, pool, [&](int64_t i) {
    fill_pair(format_, geometry_, seed * 0x2545f4914f6cdd1dull + static_cast<uint64_t>(i), sigma,
              memory_.data() + i * geometry_.pair_bytes);
  });
}

void linear_forward(const LinearWeights& weights, const LinearCall& call, ThreadPool* pool,
                    const KernelTable& table) {
  if (call.num_tokens == 0) return;
  ThreadPool::Lease lease = pool->acquire();
  const int64_t num_chunks = ceil_div(call.num_tokens, kMaxChunkTokens);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t begin = call.num_tokens * chunk / num_chunks;
    const int64_t end = call.num_tokens * (chunk + 1) / num_chunks;
    LinearCall part = call;
    part.num_tokens = end - begin;
    part.x =
        static_cast<const uint8_t*>(call.x) + begin * call.x_stride * dtype_bytes(call.x_dtype);
    part.out =
        static_cast<uint8_t*>(call.out) + begin * call.out_stride * dtype_bytes(call.out_dtype);
    forward_chunk(weights, part, &lease, table.formats[static_cast<int>(weights.format())]);
  }
}

}  // namespace moejet
