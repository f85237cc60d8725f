#include "attention.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace moejet {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// Rows of one part, and of all parts of a wave: they bound its memory. One query is the least.
constexpr int64_t kMaxPartRows = 4096;
constexpr int64_t kMaxWaveRows = 8192;
// fp32 values of all splits' sums in a wave.
constexpr int64_t kMaxWavePartials = int64_t{16} << 20;
// Splits have at least this many keys, and a part makes at most this many tasks by splitting.
constexpr int64_t kMinSplitKeys = 128;
constexpr int64_t kMaxSplits = 64;
constexpr int64_t kInvariantSplitKeys = 2048;  // whole key blocks of every kernel
constexpr int64_t kMergeRows = 16;
constexpr int64_t kGatherKeys = 32;

// A split of n keys costs the sums of one step more, so that its keys may grow with the square root
// of the context. Threads must not enter: the result would depend on them.
int64_t splits_of(int64_t context, int64_t groups) {
  int64_t splits = 1;
  while (16 * splits * splits < context && 2 * splits * kMinSplitKeys <= context &&
         2 * splits * groups <= kMaxSplits) {
    splits *= 2;
  }
  return splits;
}

int64_t partial_values(int64_t splits, int64_t rows, int64_t rank) {
  return splits * rows * round_up(rank, kQueryPanel);
}

}  // namespace

bool prefers_expanded(const AttentionWeights& weights, int64_t query_len) {
  const int64_t absorbed = query_len * (2 * weights.rank() + weights.rope);
  const int64_t per_key = weights.nope() + weights.value();
  return query_len * (per_key + weights.rope) + weights.rank() * per_key < absorbed;
}

AttentionTask::AttentionTask(const AttentionWeights& weights, const KernelTable& table,
                             Workspace* workspace, AttentionScratch* scratch, int num_threads)
    : weights_(weights),
      table_(table),
      scratch_(scratch),
      query_task_(*weights.w_uk_transposed, table, workspace, num_threads),
      key_task_(*weights.w_uk, table, workspace, num_threads),
      value_task_(*weights.w_uv, table, workspace, num_threads) {
  batch_.heads = weights.heads();
  batch_.nope = weights.nope();
  batch_.rope = weights.rope;
  batch_.rank = weights.rank();
  batch_.value = weights.value();
  batch_.scale = static_cast<float>(weights.scale * kLog2E);
}

void AttentionTask::begin(const AttentionCall& call) {
  call_ = call;
  kernels_ = &table_.attention[call.cache_dtype == DType::kF32 ? 0 : 1];
  batch_.q = call.q;
  batch_.q_stride = call.q_stride;
  batch_.q_head_stride = call.q_head_stride;
  batch_.out = call.out;
  batch_.out_stride = call.out_stride;
  batch_.out_head_stride = call.out_head_stride;
  batch_.cache = call.cache;
  batch_.cache_dtype = call.cache_dtype;
  batch_.latent = latent_layout(batch_.rank, batch_.rope, dtype_bytes(call.cache_dtype));
  batch_.block_size = call.block_size;
  phase_ = Phase::kUnit;
  request_ = query_ = token_ = 0;

  const int64_t latent = kernels_->row_elements(batch_.rank + batch_.rope);
  const int64_t head = kernels_->row_elements(batch_.nope + batch_.rope);
  const int64_t key_block = kernels_->key_block;
  const auto take = [&](Layout* layout) {
    for (AttentionWorker& worker : scratch_->workers_) {
      worker.queries = layout->take<float>(
          std::max(kAbsorbedRows * latent, static_cast<int64_t>(kQueryBlock) * head));
      worker.staging = layout->take<float>(kQueryPanel * kernels_->pair * std::max(latent, head));
      worker.keys = layout->take<float>(key_block * latent);
      worker.values = layout->take<float>(kernels_->packed_value_elements(batch_.rank));
      worker.scores = layout->take<float>(key_block * kQueryBlock);
      worker.weights = layout->take<float>(2 * key_block * kQueryBlock);
      worker.product = layout->take<float>(4 * kQueryPanel * kQueryPanel);
    }
  };
  reserve_scratch(&scratch_->worker_memory_, take);
}

bool AttentionTask::begin_unit() {
  if (request_ == call_.num_requests) return false;
  const int64_t query_len = call_.query_lens[request_];
  const bool is_expanded = call_.form == AttentionForm::kAuto
                               ? prefers_expanded(weights_, query_len)
                               : call_.form == AttentionForm::kExpanded;
  if (is_expanded && query_ == 0) {
    begin_expanded();
  } else {
    begin_wave();
  }
  return true;
}

// ---- Absorbed form ----

void AttentionTask::add_part(int64_t request, int64_t query, int64_t num_queries) {
  const int64_t before = call_.context_lens[request] - call_.query_lens[request];
  AbsorbedPart part{};
  part.blocks = blocks_of(request);
  part.token = token_;
  part.num_queries = num_queries;
  part.first_position = before + query;
  const int64_t groups = ceil_div(num_queries * batch_.heads, kAbsorbedRows);
  const int64_t context = part.first_position + num_queries;
  if (call_.form == AttentionForm::kInvariant) {
    part.split_keys = kInvariantSplitKeys;
    part.num_splits = ceil_div(context, kInvariantSplitKeys);
  } else {
    part.num_splits = splits_of(context, groups);
  }
  parts_.push_back(part);
}

// Takes requests, or parts of them, whose tokens are consecutive in q, until the wave is full.
void AttentionTask::begin_wave() {
  parts_.clear();
  wave_token_ = token_;
  int64_t rows = 0, partials = 0;
  while (request_ < call_.num_requests) {
    const int64_t query_len = call_.query_lens[request_];
    if (query_ == 0 && call_.form == AttentionForm::kAuto &&
        prefers_expanded(weights_, query_len)) {
      break;
    }
    const int64_t most = std::max<int64_t>(1, kMaxPartRows / batch_.heads);
    add_part(request_, query_, std::min(most, query_len - query_));
    const AbsorbedPart& part = parts_.back();
    rows += part.num_queries * batch_.heads;
    partials += partial_values(part.num_splits, part.num_queries * batch_.heads, batch_.rank);
    if (parts_.size() > 1 && (rows > kMaxWaveRows || partials > kMaxWavePartials)) {
      parts_.pop_back();
      break;
    }
    token_ += part.num_queries;
    query_ += part.num_queries;
    if (query_ == query_len) {
      query_ = 0;
      ++request_;
    }
  }
  wave_tokens_ = token_ - wave_token_;
  place_wave(wave_tokens_);

  LinearCall query{};
  query.num_tokens = wave_tokens_;
  query.x = batch_.q + wave_token_ * batch_.q_stride;
  query.x_dtype = DType::kF32;
  query.x_stride = batch_.q_stride;
  query.x_matrix_stride = batch_.q_head_stride;
  query.out = const_cast<float*>(parts_[0].q_latent);
  query.out_dtype = DType::kF32;
  query.out_stride = batch_.heads * batch_.rank;
  query.out_matrix_stride = batch_.rank;
  query_task_.begin(query);
  phase_ = Phase::kQuery;
}

void AttentionTask::place_wave(int64_t num_tokens) {
  float* q_latent = nullptr;
  const auto take = [&](Layout* layout) {
    q_latent = layout->take<float>(num_tokens * batch_.heads * batch_.rank);
    mixed_ = layout->take<float>(num_tokens * batch_.heads * batch_.rank);
    for (AbsorbedPart& part : parts_) {
      const int64_t rows = part.num_queries * batch_.heads;
      const int64_t states = part.num_splits * round_up(rows, kQueryPanel);
      part.partial = layout->take<float>(partial_values(part.num_splits, rows, batch_.rank));
      part.max = layout->take<float>(states);
      part.sum = layout->take<float>(states);
    }
  };
  reserve_scratch(&scratch_->data_, take);

  attend_items_.clear();
  merge_items_.clear();
  for (size_t p = 0; p < parts_.size(); ++p) {
    AbsorbedPart& part = parts_[p];
    const int64_t offset = (part.token - wave_token_) * batch_.heads * batch_.rank;
    part.q_latent = q_latent + offset;
    part.mixed = mixed_ + offset;
    const int64_t rows = part.num_queries * batch_.heads;
    const auto index = static_cast<int32_t>(p);
    for (int64_t group = 0; group < ceil_div(rows, kAbsorbedRows); ++group) {
      for (int64_t split = 0; split < part.num_splits; ++split) {
        attend_items_.push_back({index, static_cast<int32_t>(group), static_cast<int32_t>(split)});
      }
    }
    for (int64_t row = 0; row < rows; row += kMergeRows) {
      merge_items_.push_back({index, static_cast<int32_t>(row),
                              static_cast<int32_t>(std::min(row + kMergeRows, rows))});
    }
  }
}

// ---- Expanded form ----

void AttentionTask::begin_expanded() {
  block_ = {};
  block_.blocks = blocks_of(request_);
  block_.token = token_;
  block_.num_queries = call_.query_lens[request_];
  context_len_ = call_.context_lens[request_];
  block_.first_position = context_len_ - block_.num_queries;
  token_ += block_.num_queries;
  ++request_;

  const int64_t keys = std::min(kContextBlock, round_up(context_len_, kernels_->key_block));
  const int64_t sub_blocks = ceil_div(keys, kernels_->key_block);
  const int64_t scalar_bytes = kernels_->pair == 2 ? 2 : 4;
  const int64_t states = batch_.heads * round_up(block_.num_queries, kQueryBlock);
  const auto take = [&](Layout* layout) {
    latents_ = layout->take<uint8_t>(keys * batch_.rank * dtype_bytes(latents_dtype()));
    keys_ = layout->take<uint8_t>(keys * batch_.heads * batch_.nope * scalar_bytes);
    values_ = layout->take<uint8_t>(keys * batch_.heads * batch_.value * scalar_bytes);
    block_.packed_keys = layout->take<float>(
        batch_.heads * sub_blocks * kernels_->packed_key_elements(batch_.nope + batch_.rope));
    block_.packed_values = layout->take<float>(batch_.heads * sub_blocks *
                                               kernels_->packed_value_elements(batch_.value));
    block_.max = layout->take<float>(states);
    block_.sum = layout->take<float>(states);
  };
  reserve_scratch(&scratch_->data_, take);
  block_.keys = keys_;
  block_.values = values_;
  begin_block();
}

void AttentionTask::begin_block() {
  block_.num_keys = std::min(kContextBlock, context_len_ - block_.key_begin);
  LinearCall rebuild{};
  rebuild.num_tokens = block_.num_keys;
  rebuild.x = latents_;
  rebuild.x_dtype = latents_dtype();
  rebuild.x_stride = batch_.rank;
  rebuild.x_matrix_stride = 0;
  rebuild.out_dtype = kernels_->pair == 2 ? DType::kBf16 : DType::kF32;
  rebuild.out = keys_;
  rebuild.out_stride = batch_.heads * batch_.nope;
  rebuild.out_matrix_stride = batch_.nope;
  key_task_.begin(rebuild);
  rebuild.out = values_;
  rebuild.out_stride = batch_.heads * batch_.value;
  rebuild.out_matrix_stride = batch_.value;
  value_task_.begin(rebuild);
  num_items_ = ceil_div(block_.num_keys, kGatherKeys);
  phase_ = Phase::kGather;
}

void AttentionTask::gather(int64_t item) {
  const int64_t begin = item * kGatherKeys;
  const int64_t bytes = batch_.rank * dtype_bytes(latents_dtype());
  const uint8_t* cache = static_cast<const uint8_t*>(batch_.cache);
  for (int64_t t = begin; t < std::min(begin + kGatherKeys, block_.num_keys); ++t) {
    const int64_t key = block_.key_begin + t;
    const int64_t slot =
        block_.blocks[key / batch_.block_size] * batch_.block_size + key % batch_.block_size;
    const uint8_t* row = cache + slot * batch_.latent.bytes;
    if (batch_.cache_dtype == DType::kFp8) {
      kernels_->decode(batch_, row, latents_ + t * bytes);
    } else {
      std::memcpy(latents_ + t * bytes, row, static_cast<size_t>(bytes));
    }
  }
}

// ---- Phases ----

bool AttentionTask::next() {
  next_item_.store(0, std::memory_order_relaxed);
  for (;;) {
    switch (phase_) {
      case Phase::kUnit:
        if (!begin_unit()) return false;
        if (phase_ == Phase::kGather) return true;
        break;
      case Phase::kQuery:
        if (query_task_.next()) return true;
        for (AttentionWorker& worker : scratch_->workers_) worker.packed_part = nullptr;
        num_items_ = static_cast<int64_t>(attend_items_.size());
        phase_ = Phase::kAttend;
        return true;
      case Phase::kAttend:
        num_items_ = static_cast<int64_t>(merge_items_.size());
        phase_ = Phase::kMerge;
        return true;
      case Phase::kMerge: {
        LinearCall value{};
        value.num_tokens = wave_tokens_;
        value.x = mixed_;
        value.x_dtype = DType::kF32;
        value.x_stride = batch_.heads * batch_.rank;
        value.x_matrix_stride = batch_.rank;
        value.out = batch_.out + wave_token_ * batch_.out_stride;
        value.out_dtype = DType::kF32;
        value.out_stride = batch_.out_stride;
        value.out_matrix_stride = batch_.out_head_stride;
        value_task_.begin(value);
        phase_ = Phase::kValue;
        break;
      }
      case Phase::kValue:
        if (value_task_.next()) return true;
        phase_ = Phase::kUnit;
        break;
      case Phase::kGather:
        phase_ = Phase::kKeys;
        break;
      case Phase::kKeys:
        if (key_task_.next()) return true;
        phase_ = Phase::kValues;
        break;
      case Phase::kValues:
        if (value_task_.next()) return true;
        num_items_ = batch_.heads * ceil_div(block_.num_keys, kernels_->key_block);
        phase_ = Phase::kPack;
        return true;
      case Phase::kPack:
        num_items_ = batch_.heads * ceil_div(block_.num_queries, kQueryBlock);
        phase_ = Phase::kExpanded;
        return true;
      case Phase::kExpanded:
        block_.key_begin += block_.num_keys;
        if (block_.key_begin < context_len_) {
          begin_block();
          return true;
        }
        phase_ = Phase::kUnit;
        break;
    }
  }
}

void AttentionTask::run_item(int64_t item, AttentionWorker* worker) {
  switch (phase_) {
    case Phase::kAttend: {
      // Every worker walks through a run of items of its own, so that it can fetch ahead.
      const int64_t lanes = static_cast<int64_t>(scratch_->workers_.size());
      const int64_t lane = item % lanes, step = item / lanes;
      const int64_t index = lane * (num_items_ / lanes) + std::min(lane, num_items_ % lanes) + step;
      const Item& i = attend_items_[static_cast<size_t>(index)];
      worker->next_part = nullptr;
      if (item + lanes < num_items_) {
        const Item& following = attend_items_[static_cast<size_t>(index + 1)];
        worker->next_part = &parts_[static_cast<size_t>(following.part)];
        worker->next_split = following.second;
      }
      kernels_->absorbed(batch_, parts_[static_cast<size_t>(i.part)], i.first, i.second, worker);
      break;
    }
    case Phase::kMerge: {
      const Item& i = merge_items_[static_cast<size_t>(item)];
      kernels_->merge(batch_, parts_[static_cast<size_t>(i.part)], i.first, i.second);
      break;
    }
    case Phase::kGather:
      gather(item);
      break;
    case Phase::kPack: {
      const int64_t sub_blocks = ceil_div(block_.num_keys, kernels_->key_block);
      kernels_->pack(batch_, block_, item / sub_blocks, item % sub_blocks);
      break;
    }
    default: {
      const int64_t query_blocks = ceil_div(block_.num_queries, kQueryBlock);
      kernels_->expanded(batch_, block_, item / query_blocks, item % query_blocks, worker);
    }
  }
}

void AttentionTask::work(int worker) {
  switch (phase_) {
    case Phase::kQuery:
      return query_task_.work(worker);
    case Phase::kKeys:
      return key_task_.work(worker);
    case Phase::kValue:
    case Phase::kValues:
      return value_task_.work(worker);
    default:
      for (int64_t item;
           (item = next_item_.fetch_add(1, std::memory_order_relaxed)) < num_items_;) {
        run_item(item, &scratch_->workers_[static_cast<size_t>(worker)]);
      }
  }
}

void mla_attention(const AttentionWeights& weights, const AttentionCall& call, ThreadPool* pool,
                   const KernelTable& table) {
  ThreadPool::Lease lease = pool->acquire();
  AttentionScratch scratch(lease.num_threads());
  AttentionTask task(weights, table, &lease.workspace(), &scratch, lease.num_threads());
  task.begin(call);
  lease.run(&task);
}

}  // namespace moejet
