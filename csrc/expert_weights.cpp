#include "expert_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

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

ExpertFormats checked(ExpertFormats formats) {
  if (takes_fp32(formats.gate_up) == takes_fp32(formats.down)) return formats;
  const std::string gate_up = format_name(formats.gate_up), down = format_name(formats.down);
  throw std::invalid_argument(
      "down_format='" + down + "' does not go with format='" + gate_up +
      "': one takes activations in int8 and the other in floating point; use two formats of bf16, "
      "fp8, fp32, or two of the others");
}

}  // namespace

ExpertWeights::ExpertWeights(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                             ExpertFormats formats, const std::vector<int>& memory_nodes,
                             Arithmetic arithmetic)
    : num_experts_((check_size("num_experts", num_experts, kMaxExperts), num_experts)),
      hidden_(hidden_size),
      intermediate_(intermediate_size),
      formats_(checked(formats)),
      arithmetic_(arithmetic),
      gate_up_(gate_up_geometry(formats.gate_up, hidden_size, intermediate_size)),
      down_(down_geometry(formats.down, hidden_size, intermediate_size)),
      gate_up_slices_(gate_up_.num_pairs, check_nodes(memory_nodes), 2),
      down_slices_(down_.num_pairs, check_nodes(memory_nodes)),
      memory_(memory_nodes, num_experts, slice_bytes(), "experts") {}

std::vector<int64_t> ExpertWeights::slice_bytes() const {
  std::vector<int64_t> bytes;
  for (int node = 0; node < gate_up_slices_.num_nodes(); ++node) {
    bytes.push_back(round_up(gate_up_slices_.size(node) * gate_up_.pair_bytes +
                                 down_slices_.size(node) * down_.pair_bytes,
                             kExpertAlignment));
  }
  return bytes;
}

PanelLayout ExpertWeights::layout(int64_t expert, Projection projection) const {
  const bool is_down = projection == Projection::kDown;
  std::vector<uint8_t*> origins;
  for (int node = 0; node < num_nodes(); ++node) {
    origins.push_back(origin(expert, node) + (is_down ? down_offset(node) : 0));
  }
  if (is_down) return whole_pairs(std::move(origins), formats_.down, down_);
  return half_pairs(std::move(origins), formats_.gate_up, gate_up_,
                    projection == Projection::kGate ? 0 : 1);
}

void ExpertWeights::set_projection(int64_t expert, Projection projection,
                                   const SourceMatrix& source, const KernelTable& table,
                                   ThreadPool* pool) {
  pack_matrix(format(projection), source, layout(expert, projection), table, pool);
}

void ExpertWeights::dequantize(int64_t expert, Projection projection, float* out) const {
  unpack_matrix(format(projection), layout(expert, projection), rows(projection), cols(projection),
                out);
}

uint64_t ExpertWeights::checksum(ThreadPool* pool) const {
  constexpr int64_t kChunk = int64_t{1} << 20;
  std::atomic<uint64_t> total{0};
  std::vector<int64_t> chunks;
  for (int node = 0; node < num_nodes(); ++node) {
    chunks.push_back((memory_.node_bytes(node) + kChunk - 1) / kChunk);
  }
  for_each_on_nodes(chunks, pool, [&](int node, int64_t i) {
    // Slices are whole 4096-byte units.
    const int64_t size = std::min(kChunk, memory_.node_bytes(node) - i * kChunk);
    const uint8_t* start = memory_.slice(0, node) + i * kChunk;
    total.fetch_add(sum_words(reinterpret_cast<const uint64_t*>(start), size / 8),
                    std::memory_order_relaxed);
  });
  return total.load();
}

void ExpertWeights::fill_random(uint64_t seed, ThreadPool* pool) {
  std::vector<int64_t> all(num_experts_);
  std::iota(all.begin(), all.end(), 0);
  fill_random(seed, pool, all);
}

void ExpertWeights::fill_random(uint64_t seed, ThreadPool* pool,
                                const std::vector<int64_t>& experts) {
  const float gate_up_sigma = 1.f / std::sqrt(static_cast<float>(hidden_));
  const float down_sigma = 1.f / std::sqrt(static_cast<float>(intermediate_));
  std::vector<int64_t> counts;
  for (int node = 0; node < num_nodes(); ++node) {
    counts.push_back(static_cast<int64_t>(experts.size()) *
                     (gate_up_slices_.size(node) + down_slices_.size(node)));
  }
  for_each_on_nodes(counts, pool, [&](int node, int64_t i) {
    const int64_t per_expert = gate_up_slices_.size(node) + down_slices_.size(node);
    const int64_t expert = experts[i / per_expert];
    int64_t pair = i % per_expert;
    const bool is_down = pair >= gate_up_slices_.size(node);
    uint8_t* base = origin(expert, node);
    if (is_down) {
      pair += down_slices_.begin(node) - gate_up_slices_.size(node);
      base += down_offset(node) + pair * down_.pair_bytes;
    } else {
      pair += gate_up_slices_.begin(node);
      base += pair * gate_up_.pair_bytes;
    }
    // The pair's number in its layer, whatever its node.
    const int64_t number =
        expert * (gate_up_.num_pairs + down_.num_pairs) + (is_down ? gate_up_.num_pairs : 0) + pair;
    fill_pair(is_down ? formats_.down : formats_.gate_up, is_down ? down_ : gate_up_,
              seed * 0x2545f4914f6cdd1dull + static_cast<uint64_t>(number),
              is_down ? down_sigma : gate_up_sigma, base);
  });
}

}  // namespace moejet
