// The packed routed experts of one MoE layer, in huge-page backed memory of their own, sliced among
// the machine's memory nodes (nodes.h): intermediate channels of gate and up, outputs of down.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "nodes.h"
#include "pack.h"
#include "packed_memory.h"
#include "packing.h"
#include "thread_pool.h"

namespace moejet {

enum class Projection { kGate, kUp, kDown };

// Of the projections; both take the same kind of activations (takes_fp32).
struct ExpertFormats {
  ExpertFormats(Format all) : gate_up(all), down(all) {}
  ExpertFormats(Format gate_up_format, Format down_format)
      : gate_up(gate_up_format), down(down_format) {}
  Format gate_up, down;
};

class ExpertWeights {
 public:
  // Memory is reserved now and becomes resident when written. Unwritten weights are zero (bf16) or
  // have zero scales, so unset experts contribute zero. Throws std::invalid_argument for sizes out
  // of range or formats that do not go together, and OutOfMemory if the address space cannot be
  // had. memory_nodes: the system's numbers of the nodes to divide every expert among, kAnyNode for
  // memory wherever it comes. arithmetic: how tile kernels compute with them, if those of both
  // formats can; the packed bytes are the same.
  ExpertWeights(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                ExpertFormats formats, const std::vector<int>& memory_nodes = {kAnyNode},
                Arithmetic arithmetic = Arithmetic::kBf16);

  // Packs a [rows(projection), cols(projection)] matrix; see pack_matrix.
  void set_projection(int64_t expert, Projection projection, const SourceMatrix& source,
                      const KernelTable& table, ThreadPool* pool);
  // The values that the kernels compute with, fp32 [rows, cols].
  void dequantize(int64_t expert, Projection projection, float* out) const;
  // Random weights of a size that keeps outputs near the inputs' size, for all or for these
  // experts.
  void fill_random(uint64_t seed, ThreadPool* pool);
  void fill_random(uint64_t seed, ThreadPool* pool, const std::vector<int64_t>& experts);

  // Sum of all 64-bit words of the packed weights, modulo 2^64: reads every byte once, in order, as
  // fast as the memory delivers. The yardstick for decode.
  uint64_t checksum(ThreadPool* pool) const;

  int64_t rows(Projection p) const { return p == Projection::kDown ? hidden_ : intermediate_; }
  int64_t cols(Projection p) const { return p == Projection::kDown ? intermediate_ : hidden_; }
  int64_t num_experts() const { return num_experts_; }
  int64_t hidden_size() const { return hidden_; }
  int64_t intermediate_size() const { return intermediate_; }
  Format format() const { return formats_.gate_up; }
  Format down_format() const { return formats_.down; }
  Format format(Projection p) const { return p == Projection::kDown ? down_format() : format(); }
  Arithmetic arithmetic() const { return arithmetic_; }
  const PairGeometry& gate_up() const { return gate_up_; }
  const PairGeometry& down() const { return down_; }
  int num_nodes() const { return memory_.num_nodes(); }
  // The pairs that lie with each node.
  const Slices& gate_up_slices() const { return gate_up_slices_; }
  const Slices& down_slices() const { return down_slices_; }
  // Pair p of the node's slice lies at expert(e, node) + p * pair_bytes, for the down projection at
  // expert(e, node) + down_offset(node) + p * pair_bytes.
  const uint8_t* expert(int64_t e, int node) const { return origin(e, node); }
  int64_t down_offset(int node) const {
    return gate_up_slices_.end(node) * gate_up_.pair_bytes -
           down_slices_.begin(node) * down_.pair_bytes;
  }
  int64_t expert_bytes() const { return bytes() / num_experts_; }
  int64_t bytes() const { return memory_.bytes(); }
  // Why the system would not place the memory on its nodes, or empty.
  std::string bind_error() const { return memory_.bind_error(); }
  const NodeMemory& memory() const { return memory_; }

 private:
  PanelLayout layout(int64_t expert, Projection projection) const;
  std::vector<int64_t> slice_bytes() const;
  uint8_t* origin(int64_t expert, int node) const {
    return memory_.slice(expert, node) - gate_up_slices_.begin(node) * gate_up_.pair_bytes;
  }

  const int64_t num_experts_, hidden_, intermediate_;
  const ExpertFormats formats_;
  const Arithmetic arithmetic_;
  const PairGeometry gate_up_, down_;
  const Slices gate_up_slices_, down_slices_;
  const NodeMemory memory_;
};

}  // namespace moejet
