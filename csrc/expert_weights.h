// The packed routed experts of one MoE layer, in huge-page backed memory of their own.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "pack.h"
#include "packed_memory.h"
#include "packing.h"
#include "thread_pool.h"

namespace moejet {

enum class Projection { kGate, kUp, kDown };

class ExpertWeights {
 public:
  // Memory is reserved now and becomes resident when written. Unwritten weights are zero (bf16) or
  // have zero scales, so unset experts contribute zero. Throws std::invalid_argument for sizes out
  // of range and OutOfMemory if the address space cannot be had.
  ExpertWeights(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, Format format);

  // Packs a [rows(projection), cols(projection)] matrix; see pack_matrix.
  void set_projection(int64_t expert, Projection projection, const SourceMatrix& source,
                      const KernelTable& table, ThreadPool* pool);
  // The values that the kernels compute with, fp32 [rows, cols].
  void dequantize(int64_t expert, Projection projection, float* out) const;
  // Random weights of a size that keeps outputs near the inputs' size.
  void fill_random(uint64_t seed, ThreadPool* pool);

  // Sum of all 64-bit words of the packed weights, modulo 2^64: reads every byte once, in order, as
  // fast as the memory delivers. The yardstick for decode.
  uint64_t checksum(ThreadPool* pool) const;

  int64_t rows(Projection p) const { return p == Projection::kDown ? hidden_ : intermediate_; }
  int64_t cols(Projection p) const { return p == Projection::kDown ? intermediate_ : hidden_; }
  int64_t num_experts() const { return num_experts_; }
  int64_t hidden_size() const { return hidden_; }
  int64_t intermediate_size() const { return intermediate_; }
  Format format() const { return format_; }
  const PairGeometry& gate_up() const { return gate_up_; }
  const PairGeometry& down() const { return down_; }
  int64_t down_offset() const { return gate_up_.num_pairs * gate_up_.pair_bytes; }
  int64_t expert_bytes() const { return expert_bytes_; }
  int64_t bytes() const { return num_experts_ * expert_bytes_; }
  const uint8_t* expert(int64_t e) const { return memory_.data() + e * expert_bytes_; }

 private:
  PanelLayout layout(int64_t expert, Projection projection) const;

  const int64_t num_experts_, hidden_, intermediate_;
  const Format format_;
  const PairGeometry gate_up_, down_;
  const int64_t expert_bytes_;
  PackedMemory memory_;
};

}  // namespace moejet
