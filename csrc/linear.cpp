#include "linear.h"

#include <algorithm>
#include <cmath>
#include <utility>

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

void take_scratch(Layout* layout, const FormatKernels& kernels, int64_t input_rows,
                  int64_t input_tile_rows, LinearBatch* batch,
                  std::vector<WorkerScratch>* workers) {
  const int64_t k_padded = batch->geometry.k_padded;
  if (batch->tiles) {
    batch->a_tiles = take_tiles(layout, kernels.tile_arithmetic, input_tile_rows, k_padded);
  } else {
    batch->acts = take_activations(layout, batch->format, input_rows, k_padded);
  }
  for (WorkerScratch& worker : *workers) {
    worker.row = layout->take<float>(k_padded);
    worker.results = layout->take<float>(kPairBlock * kRowBlock * kPairCols);
    worker.unpacked = layout->take<uint8_t>(kUnpackedBytes);
  }
}

}  // namespace

LinearWeights::LinearWeights(int64_t num_matrices, int64_t rows, int64_t cols, Format format,
                             const std::vector<int>& memory_nodes, Arithmetic arithmetic)
    : num_matrices_((check_size("num_matrices", num_matrices), num_matrices)),
      rows_(rows),
      cols_(cols),
      format_(format),
      arithmetic_(arithmetic),
      geometry_(linear_geometry(format, rows, cols)),
      slices_(geometry_.num_pairs, check_nodes(memory_nodes)),
      memory_(memory_nodes, num_matrices, slice_bytes(), "matrices") {}

std::vector<int64_t> LinearWeights::slice_bytes() const {
  std::vector<int64_t> bytes;
  for (int node = 0; node < slices_.num_nodes(); ++node) {
    bytes.push_back(slices_.size(node) * geometry_.pair_bytes);
  }
  return bytes;
}

PanelLayout LinearWeights::layout(int64_t matrix) const {
  std::vector<uint8_t*> origins;
  for (int node = 0; node < num_nodes(); ++node) origins.push_back(origin(matrix, node));
  return whole_pairs(std::move(origins), format_, geometry_);
}

void LinearWeights::set(int64_t matrix, const SourceMatrix& source, const KernelTable& table,
                        ThreadPool* pool) {
  pack_matrix(format_, source, layout(matrix), table, pool);
}

void LinearWeights::dequantize(int64_t matrix, float* out) const {
  unpack_matrix(format_, layout(matrix), rows_, cols_, out);
}

void LinearWeights::fill_random(uint64_t seed, ThreadPool* pool) {
  const float sigma = 1.f / std::sqrt(static_cast<float>(cols_));
  std::vector<int64_t> counts;
  for (int node = 0; node < num_nodes(); ++node) {
    counts.push_back(num_matrices_ * slices_.size(node));
  }
  for_each_on_nodes(counts, pool, [&](int node, int64_t i) {
    const int64_t matrix = i / slices_.size(node);
    const int64_t pair = slices_.begin(node) + i % slices_.size(node);
    const int64_t number = matrix * geometry_.num_pairs + pair;  // whatever its node
    fill_pair(format_, geometry_, seed * 0x2545f4914f6cdd1dull + static_cast<uint64_t>(number),
              sigma, origin(matrix, node) + pair * geometry_.pair_bytes);
  });
}

LinearTask::LinearTask(const LinearWeights& weights, const KernelTable& table, Workspace* workspace,
                       int num_threads)
    : weights_(weights),
      kernels_(kernels_of(table, weights.format(), weights.arithmetic())),
      workspace_(workspace),
      scratch_(static_cast<size_t>(num_threads)),
      items_(weights.num_nodes()) {
  batch_.format = weights.format();
  batch_.num_matrices = weights.num_matrices();
  batch_.rows = weights.rows();
  batch_.cols = weights.cols();
  batch_.geometry = weights.geometry();
}

void LinearTask::begin(const LinearCall& call) {
  call_ = call;
  chunk_ = 0;
  num_chunks_ = ceil_div(call.num_tokens, kMaxChunkTokens);
  phase_ = Phase::kChunk;
}

void LinearTask::begin_chunk() {
  const int64_t begin = call_.num_tokens * chunk_ / num_chunks_;
  const int64_t end = call_.num_tokens * (chunk_ + 1) / num_chunks_;
  ++chunk_;
  batch_.num_tokens = end - begin;
  batch_.x =
      static_cast<const uint8_t*>(call_.x) + begin * call_.x_stride * dtype_bytes(call_.x_dtype);
  batch_.x_dtype = call_.x_dtype;
  batch_.x_stride = call_.x_stride;
  batch_.x_matrix_stride = call_.x_matrix_stride;
  batch_.out =
      static_cast<uint8_t*>(call_.out) + begin * call_.out_stride * dtype_bytes(call_.out_dtype);
  batch_.out_dtype = call_.out_dtype;
  batch_.out_stride = call_.out_stride;
  batch_.out_matrix_stride = call_.out_matrix_stride;
  batch_.tiles = kernels_.min_tile_rows > 0 && batch_.num_tokens >= kernels_.min_tile_rows;

  const int64_t inputs = call_.x_matrix_stride == 0 ? 1 : batch_.num_matrices;
  input_rows_ = inputs * batch_.num_tokens;
  const int64_t input_tile_rows = inputs * round_up(batch_.num_tokens, kTileRows);
  reserve_scratch(workspace_, [&](Layout* layout) {
    take_scratch(layout, kernels_, input_rows_, input_tile_rows, &batch_, &scratch_);
  });

  const int64_t num_threads = static_cast<int64_t>(scratch_.size());
  const int64_t all_pairs = batch_.geometry.num_pairs * batch_.num_matrices;
  pairs_per_task_ = std::clamp<int64_t>(ceil_div(all_pairs, kTasksPerThread * num_threads), 1,
                                        batch_.geometry.num_pairs);
  node_batches_.assign(static_cast<size_t>(weights_.num_nodes()), batch_);
  for (int node = 0; node < weights_.num_nodes(); ++node) {
    LinearBatch& batch = node_batches_[static_cast<size_t>(node)];
    batch.weights = weights_.data(node);
    batch.matrix_bytes = weights_.matrix_bytes(node);
  }
}

// A task is a part of one matrix's pairs on one node.
int64_t LinearTask::tasks_per_matrix(int node) const {
  return ceil_div(weights_.slices().size(node), pairs_per_task_);
}

bool LinearTask::begin_compute() {
  phase_ = Phase::kCompute;
  for (int node = 0; node < weights_.num_nodes(); ++node) {
    items_.set(node, tasks_per_matrix(node) * batch_.num_matrices);
  }
  return true;
}

bool LinearTask::next() {
  switch (phase_) {
    case Phase::kPrepare:
      return begin_compute();
    case Phase::kCompute:
    case Phase::kChunk:
      if (chunk_ == num_chunks_) return false;
      begin_chunk();
      phase_ = Phase::kPrepare;
      items_.set_all(input_rows_);
      if (input_rows_ * batch_.cols > kSerialPrepareValues) return true;
      for (int64_t row = 0; row < input_rows_; ++row) {
        kernels_.linear_prepare(batch_, row, &scratch_[0]);
      }
      return begin_compute();
  }
  return false;
}

void LinearTask::work(int worker) {
  WorkerScratch* scratch = &scratch_[static_cast<size_t>(worker)];
  const int own_node = ThreadPool::current_node();
  if (phase_ == Phase::kPrepare) {
    items_.drain(own_node,
                 [&](int, int64_t row) { kernels_.linear_prepare(batch_, row, scratch); });
    return;
  }
  items_.drain(own_node, [&](int node, int64_t task) {
    const Slices& slices = weights_.slices();
    const int64_t tasks = tasks_per_matrix(node);
    const int64_t pair = slices.begin(node) + task % tasks * pairs_per_task_;
    kernels_.linear(node_batches_[static_cast<size_t>(node)], task / tasks, pair,
                    std::min(pair + pairs_per_task_, slices.end(node)), scratch);
  });
}

void linear_forward(const LinearWeights& weights, const LinearCall& call, ThreadPool* pool,
                    const KernelTable& table) {
  ThreadPool::Lease lease = pool->acquire();
  LinearTask task(weights, table, &lease.workspace(), lease.num_threads());
  task.begin(call);
  lease.run(&task);
}

}  // namespace moejet
