#include "expert_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace moejet {
namespace {

constexpr int64_t kExpertAlignment = 4096;
constexpr int64_t kMaxExperts = int64_t{1} << 16;

// Sum of `count` words, a multiple of 16, with a prefetch like the kernels'.
uint64_t sum_words(const uint64_t* words, int64_t count) {
  constexpr int64_t kAhead = 256;  // words: 2 KB
  uint64_t sums[16] = {};
  for (int64_t i = 0; i < count; i += 16) {
    __builtin_prefetch(words + i + kAhead);
    __builtin_prefetch(words + i + kAhead + 8);
    for (int j = 0; j < 16; ++j) sums[j] += words[i + j];
  }
  uint64_t total = 0;
  for (const uint64_t part : sums) total += part;
  return total;
}

// Whole units of 32 channels: gate-up pairs hold 16 channels each, down pairs 32 outputs each.
PairGeometry gate_up_geometry(Format format, int64_t hidden, int64_t intermediate) {
  check_size("hidden_size", hidden);
  check_size("intermediate_size", intermediate);
  return pair_geometry(format, hidden, 2 * (round_up(intermediate, kUnitCols) / kUnitCols));
}
PairGeometry down_geometry(Format format, int64_t hidden, int64_t intermediate) {
  return pair_geometry(format, intermediate, round_up(hidden, kPairCols) / kPairCols);
}

}  // namespace

ExpertWeights::ExpertWeights(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                             Format format)
    : num_experts_((check_size("num_experts", num_experts, kMaxExperts), num_experts)),
      hidden_(hidden_size),
      intermediate_(intermediate_size),
      format_(format),
      gate_up_(gate_up_geometry(format, hidden_size, intermediate_size)),
      down_(down_geometry(format, hidden_size, intermediate_size)),
      expert_bytes_(
          round_up(gate_up_.num_pairs * gate_up_.pair_bytes + down_.num_pairs * down_.pair_bytes,
                   kExpertAlignment)),
      memory_(num_experts, expert_bytes_, "experts") {}

PanelLayout ExpertWeights::layout(int64_t expert, Projection projection) const {
  uint8_t* base = memory_.data() + expert * expert_bytes_;
  if (projection == Projection::kDown) return whole_pairs(base + down_offset(), format_, down_);
  return half_pairs(base, format_, gate_up_, projection == Projection::kGate ? 0 : 1);
}

void ExpertWeights::set_projection(int64_t expert, Projection projection,
                                   const SourceMatrix& source, const KernelTable& table,
                                   ThreadPool* pool) {
  pack_matrix(format_, source, layout(expert, projection), table, pool);
}

void ExpertWeights::dequantize(int64_t expert, Projection projection, float* out) const {
  unpack_matrix(format_, layout(expert, projection), rows(projection), cols(projection), out);
}

uint64_t ExpertWeights::checksum(ThreadPool* pool) const {
  constexpr int64_t kChunk = int64_t{1} << 20;
  std::atomic<uint64_t> total{0};
  for_each_index((bytes() + kChunk - 1) / kChunk, pool, [&](int64_t i) {
    const int64_t size = std::min(kChunk, bytes() - i * kChunk);  // whole 4096-byte units
    const uint64_t* words = reinterpret_cast<const uint64_t*>(memory_.data() + i * kChunk);
    total.fetch_add(sum_words(words, size / 8), std::memory_order_relaxed);
  });
  return total.load();
}

void ExpertWeights::fill_random(uint64_t seed, ThreadPool* pool) {
  const float gate_up_sigma = 1.f / std::sqrt(static_cast<float>(hidden_));
  const float down_sigma = 1.f / std::sqrt(static_cast<float>(intermediate_));
  const int64_t pairs = gate_up_.num_pairs + down_.num_pairs;
  for_each_index(num_experts_ * pairs, pool, [&](int64_t i) {
    const int64_t pair = i % pairs;
    const bool is_down = pair >= gate_up_.num_pairs;
    uint8_t* start = memory_.data() + i / pairs * expert_bytes_ +
                     (is_down ? down_offset() + (pair - gate_up_.num_pairs) * down_.pair_bytes
                              : pair * gate_up_.pair_bytes);
    fill_pair(format_, is_down ? down_ : gate_up_,
              seed * 0x2545f4914f6cdd1dull + static_cast<uint64_t>(i),
              is_down ? down_sigma : gate_up_sigma, start);
  });
}

}  // namespace moejet
