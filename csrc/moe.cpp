#include "moe.h"

#include <algorithm>

#include "scratch.h"

namespace moejet {
namespace {

// Tokens are processed in chunks so that scratch memory stays bounded: at most this many routed
// rows (of hidden_size and intermediate_size values each), and this many tokens.
constexpr int64_t kMaxChunkRows = 8192;
constexpr int64_t kMaxChunkTokens = 1024;
// A down task's sums should stay in L2.
constexpr int64_t kMaxAccumulatorFloats = 128 * 1024;
// Below this many values the caller prepares activations alone: a barrier would cost as much.
constexpr int64_t kSerialPrepareValues = 32 * 1024;
constexpr int64_t kGateUpTasksPerThread = 32;
constexpr int64_t kDownTasksPerThread = 16;

void take_scratch(Layout* layout, Arithmetic arithmetic, const Routing& routing,
                  int64_t pairs_per_task, MoeBatch* batch, std::vector<WorkerScratch>* workers) {
  const int64_t x_padded = batch->gate_up.k_padded, h_padded = batch->down.k_padded;
  if (routing.any_vector) {
    batch->x_acts = take_activations(layout, batch->format, batch->num_tokens, x_padded);
    batch->h_acts = take_activations(layout, batch->down_format, routing.num_rows, h_padded);
  }
  batch->x_tiles = take_tiles(layout, arithmetic, routing.num_tile_rows, x_padded);
  batch->h_tiles = take_tiles(layout, arithmetic, routing.num_tile_rows, h_padded);
  if (arithmetic == Arithmetic::kInt8) {
    batch->h_tiles.bf16 = layout->take<uint16_t>(routing.num_tile_rows * h_padded);
  }
  for (WorkerScratch& worker : *workers) {
    worker.row = layout->take<float>(x_padded);
    worker.results = layout->take<float>(kPairBlock * kRowBlock * kPairCols);
    worker.accumulator = layout->take<float>(batch->num_tokens * pairs_per_task * kPairCols);
    worker.unpacked = layout->take<uint8_t>(kUnpackedBytes);
  }
}

// The arithmetic that the weights ask for, if the tile kernels of both formats have it.
Arithmetic common_arithmetic(const ExpertWeights& weights, const KernelTable& table) {
  for (const Format format : {weights.format(), weights.down_format()}) {
    const FormatKernels& kernels = kernels_of(table, format, weights.arithmetic());
    if (kernels.tile_arithmetic != weights.arithmetic()) return Arithmetic::kBf16;
  }
  return weights.arithmetic();
}

// Rows from which both kinds of projections use tiles; 0: never. An expert's rows go through both,
// in one form.
int common_tile_rows(const FormatKernels& gate_up, const FormatKernels& down) {
  if (gate_up.min_tile_rows == 0 || down.min_tile_rows == 0) return 0;
  return std::max(gate_up.min_tile_rows, down.min_tile_rows);
}

}  // namespace

MoeTask::MoeTask(const ExpertWeights& weights, const KernelTable& table, Workspace* workspace,
                 int num_threads)
    : weights_(weights),
      gate_up_kernels_(kernels_of(table, weights.format(), common_arithmetic(weights, table))),
      down_kernels_(kernels_of(table, weights.down_format(), common_arithmetic(weights, table))),
      min_tile_rows_(common_tile_rows(gate_up_kernels_, down_kernels_)),
      workspace_(workspace),
      scratch_(static_cast<size_t>(num_threads)),
      units_(weights.gate_up().num_pairs / 2, weights.num_nodes()),
      items_(weights.num_nodes()) {
  batch_.format = weights.format();
  batch_.down_format = weights.down_format();
  batch_.hidden_size = weights.hidden_size();
  batch_.intermediate_size = weights.intermediate_size();
  batch_.gate_up = weights.gate_up();
  batch_.down = weights.down();
}

void MoeTask::begin(const MoeCall& call) {
  call_ = call;
  const int64_t most =
      std::clamp<int64_t>(kMaxChunkRows / std::max<int64_t>(call.top_k, 1), 1, kMaxChunkTokens);
  chunk_ = 0;
  num_chunks_ = ceil_div(call.num_tokens, most);
  phase_ = Phase::kChunk;
}

void MoeTask::begin_chunk() {
  // Even chunks: a short last one would read all weights for little work.
  const int64_t begin = call_.num_tokens * chunk_ / num_chunks_;
  const int64_t end = call_.num_tokens * (chunk_ + 1) / num_chunks_;
  ++chunk_;
  MoeCall part = call_;
  part.num_tokens = end - begin;
  part.x =
      static_cast<const uint8_t*>(call_.x) + begin * call_.x_stride * dtype_bytes(call_.x_dtype);
  part.out =
      static_cast<uint8_t*>(call_.out) + begin * call_.out_stride * dtype_bytes(call_.out_dtype);
  part.topk_ids += begin * call_.top_k;
  part.topk_weights += begin * call_.top_k;
  route(part);
  batch_.num_tokens = part.num_tokens;
  batch_.x = part.x;
  batch_.x_dtype = part.x_dtype;
  batch_.x_stride = part.x_stride;
  batch_.out = part.out;
  batch_.out_dtype = part.out_dtype;
  batch_.out_stride = part.out_stride;
  plan();
  reserve_scratch(workspace_, [&](Layout* layout) {
    take_scratch(layout, down_kernels_.tile_arithmetic, routing_, pairs_per_task_, &batch_,
                 &scratch_);
  });
  divide_among_nodes();
}

void MoeTask::route(const MoeCall& call) {
  const int64_t num_pairs = call.num_tokens * call.top_k;
  const int64_t num_experts = weights_.num_experts();
  Routing& r = routing_;
  r.num_rows = r.num_tile_rows = 0;
  r.any_vector = false;
  r.slot_expert.clear();
  r.slot_tile.clear();
  r.token_tiles.clear();
  r.slot_begin.assign(1, 0);
  r.token_begin.assign(1, 0);
  r.count.assign(static_cast<size_t>(num_experts), 0);
  r.next.resize(static_cast<size_t>(num_experts));
  r.next_tile.assign(static_cast<size_t>(num_experts), -1);
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (call.topk_ids[i] >= 0) ++r.count[call.topk_ids[i]];
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    const int32_t count = r.count[e];
    if (count == 0) continue;
    const bool tiles = min_tile_rows_ > 0 && count >= min_tile_rows_;
    r.next[e] = static_cast<int32_t>(r.num_rows);
    if (tiles) {
      r.next_tile[e] = static_cast<int32_t>(r.num_tile_rows);
      r.num_tile_rows += round_up(count, kTileRows);
    }
    r.any_vector |= !tiles;
    r.slot_expert.push_back(static_cast<int32_t>(e));
    r.slot_tile.push_back(r.next_tile[e]);
    r.num_rows += count;
    r.slot_begin.push_back(static_cast<int32_t>(r.num_rows));
  }
  r.row_token.resize(static_cast<size_t>(r.num_rows));
  r.row_weight.resize(static_cast<size_t>(r.num_rows));
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    for (int64_t i = t * call.top_k; i < (t + 1) * call.top_k; ++i) {
      const int32_t e = call.topk_ids[i];
      if (e < 0) continue;
      r.row_token[r.next[e]] = static_cast<int32_t>(t);
      r.row_weight[r.next[e]++] = call.topk_weights[i];
      if (r.next_tile[e] >= 0) r.token_tiles.push_back(r.next_tile[e]++);
    }
    r.token_begin.push_back(static_cast<int32_t>(r.token_tiles.size()));
  }
  batch_.num_slots = static_cast<int>(r.slot_expert.size());
  expert_loads_.fetch_add(batch_.num_slots, std::memory_order_relaxed);
  batch_.slot_begin = r.slot_begin.data();
  batch_.slot_tile = r.slot_tile.data();
  batch_.row_token = r.row_token.data();
  batch_.row_weight = r.row_weight.data();
  batch_.token_begin = r.token_begin.data();
  batch_.token_tiles = r.token_tiles.data();
  batch_.any_vector = r.any_vector;
}

void MoeTask::plan() {
  const int64_t num_threads = static_cast<int64_t>(scratch_.size());
  const int64_t units = batch_.gate_up.num_pairs / 2;
  const int64_t all_units = units * std::max(batch_.num_slots, 1);
  units_per_task_ =
      std::clamp<int64_t>(ceil_div(all_units, kGateUpTasksPerThread * num_threads), 1, units);
  const int64_t by_threads = ceil_div(batch_.down.num_pairs, kDownTasksPerThread * num_threads);
  const int64_t by_memory = kMaxAccumulatorFloats / (kPairCols * batch_.num_tokens);
  pairs_per_task_ = std::max<int64_t>(1, std::min(by_threads, by_memory));
}

// Kernels see one batch per node, in which pairs keep their numbers and the weights begin so that
// the node's pairs are found.
void MoeTask::divide_among_nodes() {
  const size_t num_nodes = static_cast<size_t>(weights_.num_nodes());
  const size_t num_slots = routing_.slot_expert.size();
  routing_.slot_weights.resize(num_nodes * num_slots);
  node_batches_.assign(num_nodes, batch_);
  for (size_t n = 0; n < num_nodes; ++n) {
    const int node = static_cast<int>(n);
    const uint8_t** slots = routing_.slot_weights.data() + n * num_slots;
    for (size_t s = 0; s < num_slots; ++s) {
      slots[s] = weights_.expert(routing_.slot_expert[s], node);
    }
    node_batches_[n].slot_weights = slots;
    node_batches_[n].down_offset = weights_.down_offset(node);
  }
}

// A gate-up task is a part of one expert's units on one node.
int64_t MoeTask::gate_up_tasks_per_slot(int node) const {
  return ceil_div(units_.size(node), units_per_task_);
}

bool MoeTask::begin_gate_up() {
  phase_ = Phase::kGateUp;
  for (int node = 0; node < units_.num_nodes(); ++node) {
    items_.set(node, gate_up_tasks_per_slot(node) * batch_.num_slots);
  }
  return true;
}

// False if there is nothing to quantise, or it is done already.
bool MoeTask::begin_quantize() {
  phase_ = Phase::kQuantize;
  if (down_kernels_.quantize_h == nullptr) return false;
  const int64_t tiles = routing_.num_tile_rows / kTileRows;
  items_.set_all(tiles);
  if (routing_.num_tile_rows * batch_.intermediate_size > kSerialPrepareValues) return true;
  for (int64_t tile = 0; tile < tiles; ++tile) down_kernels_.quantize_h(batch_, tile);
  return false;
}

// A down task is a part of one node's pairs, for all experts.
bool MoeTask::begin_down() {
  phase_ = Phase::kDown;
  for (int node = 0; node < units_.num_nodes(); ++node) {
    items_.set(node, ceil_div(weights_.down_slices().size(node), pairs_per_task_));
  }
  return true;
}

bool MoeTask::next() {
  switch (phase_) {
    case Phase::kPrepare:
      return begin_gate_up();
    case Phase::kGateUp:
      return begin_quantize() || begin_down();
    case Phase::kQuantize:
      return begin_down();
    case Phase::kDown:
    case Phase::kChunk:
      if (chunk_ == num_chunks_) return false;
      begin_chunk();
      phase_ = Phase::kPrepare;
      items_.set_all(batch_.num_tokens);
      if (batch_.num_tokens * batch_.hidden_size > kSerialPrepareValues) return true;
      for (int64_t t = 0; t < batch_.num_tokens; ++t)
        gate_up_kernels_.prepare(batch_, t, &scratch_[0]);
      return begin_gate_up();
  }
  return false;
}

void MoeTask::work(int worker) {
  WorkerScratch* scratch = &scratch_[static_cast<size_t>(worker)];
  const int own_node = ThreadPool::current_node();
  if (phase_ == Phase::kPrepare) {
    items_.drain(own_node, [&](int, int64_t t) { gate_up_kernels_.prepare(batch_, t, scratch); });
  } else if (phase_ == Phase::kGateUp) {
    items_.drain(own_node, [&](int node, int64_t task) {
      const int64_t tasks_per_slot = gate_up_tasks_per_slot(node);
      const int64_t unit = units_.begin(node) + task % tasks_per_slot * units_per_task_;
      gate_up_kernels_.gate_up(node_batches_[static_cast<size_t>(node)],
                               static_cast<int>(task / tasks_per_slot), unit,
                               std::min(unit + units_per_task_, units_.end(node)), scratch);
    });
  } else if (phase_ == Phase::kQuantize) {
    items_.drain(own_node, [&](int, int64_t tile) { down_kernels_.quantize_h(batch_, tile); });
  } else {
    items_.drain(own_node, [&](int node, int64_t task) {
      const Slices& pairs = weights_.down_slices();
      const int64_t pair = pairs.begin(node) + task * pairs_per_task_;
      down_kernels_.down(node_batches_[static_cast<size_t>(node)], pair,
                         std::min(pair + pairs_per_task_, pairs.end(node)), scratch);
    });
  }
}

void moe_forward(const ExpertWeights& weights, const MoeCall& call, ThreadPool* pool,
                 const KernelTable& table) {
  ThreadPool::Lease lease = pool->acquire();
  MoeTask task(weights, table, &lease.workspace(), lease.num_threads());
  task.begin(call);
  lease.run(&task);
}

}  // namespace moejet
