// Plain reads, and what the arithmetic loops of ceilings_*.cpp share.
#pragma once

#ifndef MOEJET_ISA_NS
#error "ceilings-inl.h belongs into a file of isa/"
#endif

#include <cstdint>
#include <cstring>

#include "../kernels.h"

namespace moejet {
namespace MOEJET_ISA_NS {
namespace {

// Steps start from zero, so that sums neither grow beyond the precision of their operands nor stop
// changing: both would switch fewer transistors than real data, and run faster.
[[maybe_unused]] constexpr int kRoundsPerStep = 1024;

using Line = uint64_t __attribute__((vector_size(64), may_alias));

inline uint64_t fold(Line v) {
  uint64_t all = 0;
  for (int i = 0; i < 8; ++i) all ^= v[i];
  return all;
}

template <int kStreams, bool kPrefetch>
uint64_t read_streams(const uint8_t* data, int64_t bytes, int64_t prefetch_bytes) {
  constexpr int kLinesAtOnce = 4;
  const int64_t stream_bytes = bytes / kStreams;
  Line sums[kLinesAtOnce] = {};
  for (int64_t i = 0; i < stream_bytes; i += 64 * kLinesAtOnce) {
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* p = data + s * stream_bytes + i;
      for (int line = 0; line < kLinesAtOnce; ++line) {
        if (kPrefetch) __builtin_prefetch(p + 64 * line + prefetch_bytes, 0, 3);
        sums[line] ^= *reinterpret_cast<const Line*>(p + 64 * line);
      }
    }
  }
  return fold(sums[0] ^ sums[1] ^ sums[2] ^ sums[3]);
}

template <bool kPrefetch>
uint64_t read_with(const uint8_t* data, int64_t bytes, int num_streams, int64_t prefetch_bytes) {
  switch (num_streams) {
    case 1:
      return read_streams<1, kPrefetch>(data, bytes, prefetch_bytes);
    case 2:
      return read_streams<2, kPrefetch>(data, bytes, prefetch_bytes);
    case 4:
      return read_streams<4, kPrefetch>(data, bytes, prefetch_bytes);
    default:
      return read_streams<8, kPrefetch>(data, bytes, prefetch_bytes);
  }
}

[[maybe_unused]] uint64_t read_memory(const uint8_t* data, int64_t bytes, int num_streams,
                                      int64_t prefetch_bytes) {
  return prefetch_bytes > 0 ? read_with<true>(data, bytes, num_streams, prefetch_bytes)
                            : read_with<false>(data, bytes, num_streams, prefetch_bytes);
}

// Multiply: `sum = sum + a b` on one vector: Operand (loaded from memory), Sum, zero(), load(),
// add(sum, a, b) and fold(sum); kOperations per add. kSums independent sums hide its latency.
template <class Multiply, int kSums>
uint64_t multiply_add(int64_t steps, const uint8_t* operands) {
  constexpr int kFactors = 3;
  typename Multiply::Operand a[kFactors], b = Multiply::load(operands);
  for (int i = 0; i < kFactors; ++i) a[i] = Multiply::load(operands + 64 * (i + 1));
  uint64_t digest = 0;
  for (int64_t step = 0; step < steps; ++step) {
    typename Multiply::Sum sums[kSums];
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sums[i] = Multiply::zero();
    for (int round = 0; round < kRoundsPerStep; ++round) {
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) sums[i] = Multiply::add(sums[i], a[i % kFactors], b);
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) Multiply::keep(&sums[i]);
    }
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) digest ^= Multiply::fold(sums[i]);
  }
  return digest;
}

template <class Multiply, int kSums>
constexpr ArithmeticLoop arithmetic_loop(const char* name) {
  return {name, int64_t{kRoundsPerStep} * kSums * Multiply::kOperations,
          &multiply_add<Multiply, kSums>};
}

[[maybe_unused]] constexpr ArithmeticLoop kNoLoop = {nullptr, 0, nullptr};

}  // namespace
}  // namespace MOEJET_ISA_NS
}  // namespace moejet
