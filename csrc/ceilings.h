// What this machine can do at most: reads of memory far larger than the caches, and multiply-adds
// on registers. Rates are sums over the workers of a pool; each call returns samples of about
// 10 ms.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "packed_memory.h"
#include "thread_pool.h"

namespace moejet {

struct ArithmeticCeiling {
  std::string name;                   // such as amx_bf16
  std::string reason;                 // why it cannot be measured here; empty: it can
  std::vector<std::string> variants;  // ways to reach it; the best one counts
};
std::vector<ArithmeticCeiling> arithmetic_ceilings();

// Operations per second (a multiply-add counts as two) of all workers together, at least three
// samples and as many as fit into `seconds`. Operands are random: with zeros, matrix units run
// faster than they ever do on data. Throws std::invalid_argument for an unknown name or variant,
// and if the machine lacks the instructions.
std::vector<double> measure_arithmetic(const std::string& name, const std::string& variant,
                                       double seconds, ThreadPool* pool);

// Memory whose only purpose is to be read. Each worker reads a part of its own, which it has
// written first, so that on a machine with several memory nodes the reads are local.
class ReadProbe {
 public:
  // At least `bytes` bytes, in huge pages where the system has them.
  ReadProbe(int64_t bytes, ThreadPool* pool);

  int64_t bytes() const { return memory_.bytes(); }

  // Bytes per second of all workers together. Successive samples go round the memory, each through
  // the next window of every worker's part: nothing is read again before all the rest was.
  // num_streams is 1, 2, 4 or 8; the pool has as many workers as the constructor's.
  std::vector<double> measure(const CeilingKernels& kernels, int num_streams,
                              int64_t prefetch_bytes, double seconds, ThreadPool* pool);

 private:
  int num_workers_;
  int64_t window_bytes_;  // that one worker reads in one sample
  int64_t num_windows_;   // of each worker
  PackedMemory memory_;   // [num_workers_][num_windows_][window_bytes_]
  int64_t next_window_ = 0;
};

}  // namespace moejet
