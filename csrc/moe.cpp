#include "moe.h"

#include <algorithm>
#include <atomic>
#include <vector>

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
constexpr int64_t kGateUpTasksPerThread = 16;
constexpr int64_t kDownTasksPerThread = 8;

// Routed rows sorted by expert (counting sort, stable in token order).
struct Routing {
  std::vector<const uint8_t*> slot_weights;
  std::vector<int32_t> slot_begin, slot_tile;
  std::vector<int32_t> row_token;
  std::vector<float> row_weight;
  std::vector<int32_t> token_begin, token_tiles;
  int64_t num_rows = 0;
  int64_t num_tile_rows = 0;
  bool any_vector = false;
};

Routing route(const ExpertWeights& weights, const MoeCall& call, int min_tile_rows) {
  const int64_t num_pairs = call.num_tokens * call.top_k;
  const int64_t num_experts = weights.num_experts();
  Routing routing;
  std::vector<int32_t> count(num_experts, 0);
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (call.topk_ids[i] >= 0) ++count[call.topk_ids[i]];
  }
  std::vector<int32_t> next(num_experts, 0);        // row of the expert's next token
  std::vector<int32_t> next_tile(num_experts, -1);  // the same among tile rows
  routing.slot_begin.push_back(0);
  for (int64_t e = 0; e < num_experts; ++e) {
    if (count[e] == 0) continue;
    const bool tiles = min_tile_rows > 0 && count[e] >= min_tile_rows;
    next[e] = static_cast<int32_t>(routing.num_rows);
    if (tiles) {
      next_tile[e] = static_cast<int32_t>(routing.num_tile_rows);
      routing.num_tile_rows += round_up(count[e], kTileRows);
    }
    routing.any_vector |= !tiles;
    routing.slot_weights.push_back(weights.expert(e));
    routing.slot_tile.push_back(next_tile[e]);
    routing.num_rows += count[e];
    routing.slot_begin.push_back(static_cast<int32_t>(routing.num_rows));
  }
  routing.row_token.resize(routing.num_rows);
  routing.row_weight.resize(routing.num_rows);
  routing.token_begin.push_back(0);
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    for (int64_t i = t * call.top_k; i < (t + 1) * call.top_k; ++i) {
      const int32_t e = call.topk_ids[i];
      if (e < 0) continue;
      routing.row_token[next[e]] = static_cast<int32_t>(t);
      routing.row_weight[next[e]++] = call.topk_weights[i];
      if (next_tile[e] >= 0) routing.token_tiles.push_back(next_tile[e]++);
    }
    routing.token_begin.push_back(static_cast<int32_t>(routing.token_tiles.size()));
  }
  return routing;
}

struct Plan {
  int64_t units, units_per_task, gate_up_tasks;
  int64_t pairs_per_task, down_tasks;
};

Plan make_plan(const MoeBatch& batch, int num_threads) {
  Plan plan;
  plan.units = batch.gate_up.num_pairs / 2;
  const int64_t all_units = plan.units * std::max(batch.num_slots, 1);
  plan.units_per_task =
      std::clamp<int64_t>(ceil_div(all_units, kGateUpTasksPerThread * num_threads), 1, plan.units);
  plan.gate_up_tasks = ceil_div(plan.units, plan.units_per_task) * batch.num_slots;
  const int64_t by_threads = ceil_div(batch.down.num_pairs, kDownTasksPerThread * num_threads);
  const int64_t by_memory = kMaxAccumulatorFloats / (kPairCols * batch.num_tokens);
  plan.pairs_per_task = std::max<int64_t>(1, std::min(by_threads, by_memory));
  plan.down_tasks = ceil_div(batch.down.num_pairs, plan.pairs_per_task);
  return plan;
}

void take_scratch(Layout* layout, const Routing& routing, const Plan& plan, MoeBatch* batch,
                  std::vector<WorkerScratch>* workers) {
  const int64_t x_padded = batch->gate_up.k_padded, h_padded = batch->down.k_padded;
  if (routing.any_vector) {
    batch->x_acts = take_activations(layout, batch->format, batch->num_tokens, x_padded);
    batch->h_acts = take_activations(layout, batch->format, routing.num_rows, h_padded);
  }
  batch->x_tiles = layout->take<uint16_t>(routing.num_tile_rows * x_padded);
  batch->h_tiles = layout->take<uint16_t>(routing.num_tile_rows * h_padded);
  for (WorkerScratch& worker : *workers) {
    worker.row = layout->take<float>(x_padded);
    worker.gate_up = layout->take<float>(std::max(kVectorRowBlock, kTileRowBlock) * 2 * kPairCols);
    worker.accumulator = layout->take<float>(batch->num_tokens * plan.pairs_per_task * kPairCols);
    worker.unpacked =
        layout->take<uint16_t>(routing.num_tile_rows > 0 ? kTileChunkK * kPairCols : 0);
  }
}

void forward_chunk(const ExpertWeights& weights, const MoeCall& call, ThreadPool::Lease* lease,
                   const FormatKernels& kernels) {
  const Routing routing = route(weights, call, kernels.min_tile_rows);
  MoeBatch batch{};
  batch.format = weights.format();
  batch.num_tokens = call.num_tokens;
  batch.hidden_size = weights.hidden_size();
  batch.intermediate_size = weights.intermediate_size();
  batch.gate_up = weights.gate_up();
  batch.down = weights.down();
  batch.x = call.x;
  batch.x_dtype = call.x_dtype;
  batch.x_stride = call.x_stride;
  batch.out = call.out;
  batch.out_dtype = call.out_dtype;
  batch.out_stride = call.out_stride;
  batch.num_slots = static_cast<int>(routing.slot_weights.size());
  batch.slot_weights = routing.slot_weights.data();
  batch.down_offset = weights.down_offset();
  batch.slot_begin = routing.slot_begin.data();
  batch.slot_tile = routing.slot_tile.data();
  batch.row_token = routing.row_token.data();
  batch.row_weight = routing.row_weight.data();
  batch.token_begin = routing.token_begin.data();
  batch.token_tiles = routing.token_tiles.data();
  batch.any_vector = routing.any_vector;

  const Plan plan = make_plan(batch, lease->num_threads());
  std::vector<WorkerScratch> workers(lease->num_threads());
  Layout sizes(nullptr);
  take_scratch(&sizes, routing, plan, &batch, &workers);
  Layout layout(lease->workspace().reserve(static_cast<size_t>(sizes.bytes())));
  take_scratch(&layout, routing, plan, &batch, &workers);

  const bool serial = batch.num_tokens * batch.hidden_size <= kSerialPrepareValues;
  if (serial) {
    for (int64_t t = 0; t < batch.num_tokens; ++t) kernels.prepare(batch, t, &workers[0]);
  }
  std::atomic<int64_t> next_token{0}, next_gate_up{0}, next_down{0};
  const auto take = [](std::atomic<int64_t>* next) {
    return next->fetch_add(1, std::memory_order_relaxed);
  };
  const int first_phase = serial ? 1 : 0;
  lease->run(3 - first_phase, [&](int phase, int worker) {
    WorkerScratch* scratch = &workers[worker];
    switch (phase + first_phase) {
      case 0:
        for (int64_t t; (t = take(&next_token)) < batch.num_tokens;) {
          kernels.prepare(batch, t, scratch);
        }
        break;
      case 1:
        for (int64_t task; (task = take(&next_gate_up)) < plan.gate_up_tasks;) {
          const int64_t tasks_per_slot = plan.gate_up_tasks / batch.num_slots;
          const int64_t unit = task % tasks_per_slot * plan.units_per_task;
          kernels.gate_up(batch, static_cast<int>(task / tasks_per_slot), unit,
                          std::min(unit + plan.units_per_task, plan.units), scratch);
        }
        break;
      default:
        for (int64_t task; (task = take(&next_down)) < plan.down_tasks;) {
          const int64_t pair = task * plan.pairs_per_task;
          kernels.down(batch, pair, std::min(pair + plan.pairs_per_task, batch.down.num_pairs),
                       scratch);
        }
    }
  });
}

}  // namespace

void moe_forward(const ExpertWeights& weights, const MoeCall& call, ThreadPool* pool,
                 const KernelTable& table) {
  if (call.num_tokens == 0) return;
  ThreadPool::Lease lease = pool->acquire();
  const int64_t most =
      std::clamp<int64_t>(kMaxChunkRows / std::max<int64_t>(call.top_k, 1), 1, kMaxChunkTokens);
  const int64_t num_chunks = ceil_div(call.num_tokens, most);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    // Even chunks: a short last one would read all weights for little work.
    const int64_t begin = call.num_tokens * chunk / num_chunks;
    const int64_t end = call.num_tokens * (chunk + 1) / num_chunks;
    MoeCall part = call;
    part.num_tokens = end - begin;
    part.x =
        static_cast<const uint8_t*>(call.x) + begin * call.x_stride * dtype_bytes(call.x_dtype);
    part.out =
        static_cast<uint8_t*>(call.out) + begin * call.out_stride * dtype_bytes(call.out_dtype);
    part.topk_ids = call.topk_ids + begin * call.top_k;
    part.topk_weights = call.topk_weights + begin * call.top_k;
    forward_chunk(weights, part, &lease, table.formats[static_cast<int>(weights.format())]);
  }
}

}  // namespace moejet
