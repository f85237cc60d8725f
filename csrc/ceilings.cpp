#include "ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "isa.h"

namespace moejet {
namespace {

constexpr double kSampleSeconds = 0.01;
constexpr int kMinSamples = 3;
// 15 MiB for each of two streams, and so on: streams a power of two apart would meet in the same
// cache sets.
constexpr int64_t kWindowBytes = int64_t{30} << 20;
constexpr int64_t kWindowStep = 8 * 256;  // what the loops read at once, with most streams

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void check_seconds(double seconds) {
  if (seconds > 0 && seconds <= 600) return;
  throw std::invalid_argument("seconds=" + std::to_string(seconds) + " must be above 0, up to 600");
}

void check_bytes(int64_t bytes) {
  if (bytes > 0) return;
  throw std::invalid_argument("num_bytes=" + std::to_string(bytes) + " must be positive");
}

// Where digests go, so that no loop computes for nothing.
std::atomic<uint64_t> digest_sink{0};

uint64_t next_random(uint64_t* state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return *state >> 33;
}

enum class Operands { kF32, kBf16, kInt8 };

// Random operands, kCeilingOperandBytes. Floats have full mantissas and magnitudes from 1/4 to 2.
void fill_operands(Operands type, uint8_t* out) {
  uint64_t state = 0x6d6f656a6574;
  for (int i = 0; i < kCeilingOperandBytes / 4; ++i) {
    const uint64_t random = next_random(&state);
    const auto bits = static_cast<uint32_t>(random ^ (next_random(&state) << 16));
    // Any sign and mantissa, exponent 125 or 127.
    const auto as_f32 = [](uint32_t b) { return (b & 0x81ffffffu) | 0x3e800000u; };
    uint32_t word = bits;
    if (type == Operands::kF32) word = as_f32(bits);
    if (type == Operands::kBf16) {
      word = (as_f32(bits) & 0xffff0000u) | (as_f32(bits << 16) >> 16);
    }
    std::memcpy(out + 4 * i, &word, sizeof(word));
  }
}

struct Kind {
  const char* name;
  Isa isa;              // that must be usable
  const char* feature;  // that the processor must have as well; empty: none
  Operands operands;
  const ArithmeticLoop* loops;  // two
};

#if defined(__x86_64__)
const Kind kKinds[] = {
    {"amx_bf16", Isa::kAmx, "", Operands::kBf16, amx::ceilings.bf16},
    {"amx_int8", Isa::kAmx, "amx_int8", Operands::kInt8, amx::ceilings.int8},
    {"avx512_vnni_int8", Isa::kAvx512, "", Operands::kInt8, avx512::ceilings.int8},
    {"avx512_bf16_dot", Isa::kAvx512Bf16, "", Operands::kBf16, avx512_bf16::ceilings.bf16},
    {"avx512_fma_f32", Isa::kAvx512, "", Operands::kF32, avx512::ceilings.f32},
    {"avx2_int8", Isa::kAvx2, "", Operands::kInt8, avx2::ceilings.int8},
    {"avx2_fma_f32", Isa::kAvx2, "", Operands::kF32, avx2::ceilings.f32},
};
const Kind* const kKindsEnd = kKinds + sizeof(kKinds) / sizeof(kKinds[0]);

bool has_feature(const std::string& name) {
  const std::vector<std::string>& features = cpu_info().features;
  return std::find(features.begin(), features.end(), name) != features.end();
}
#else
const Kind* const kKinds = nullptr;
const Kind* const kKindsEnd = nullptr;
bool has_feature(const std::string&) { return false; }
#endif

std::string missing(const Kind& kind) {
  const std::string reason = cpu_info().isas[static_cast<int>(kind.isa)].reason;
  if (!reason.empty() || *kind.feature == '\0' || has_feature(kind.feature)) return reason;
  return std::string("needs ") + kind.feature;
}

const Kind& find_kind(const std::string& name) {
  std::string known;
  for (const Kind* kind = kKinds; kind != kKindsEnd; ++kind) {
    if (name == kind->name) return *kind;
    known += known.empty() ? kind->name : std::string(", ") + kind->name;
  }
  throw std::invalid_argument("name='" + name + "' is no ceiling: use one of " + known);
}

const ArithmeticLoop& find_loop(const Kind& kind, const std::string& variant) {
  for (int i = 0; i < 2; ++i) {
    const ArithmeticLoop& loop = kind.loops[i];
    if (loop.name != nullptr && variant == loop.name) return loop;
  }
  throw std::invalid_argument("variant='" + variant + "' is no way to measure " + kind.name);
}

// Calls sample() at least kMinSamples times, and until `seconds` have gone by.
template <class Sample>
std::vector<double> collect(double seconds, Sample&& sample) {
  std::vector<double> samples;
  const Clock::time_point start = Clock::now();
  while (static_cast<int>(samples.size()) < kMinSamples || seconds_since(start) < seconds) {
    samples.push_back(sample());
  }
  return samples;
}

}  // namespace

std::vector<ArithmeticCeiling> arithmetic_ceilings() {
  std::vector<ArithmeticCeiling> all;
  for (const Kind* kind = kKinds; kind != kKindsEnd; ++kind) {
    ArithmeticCeiling ceiling{kind->name, missing(*kind), {}};
    for (int i = 0; i < 2; ++i) {
      if (kind->loops[i].name != nullptr) ceiling.variants.push_back(kind->loops[i].name);
    }
    all.push_back(std::move(ceiling));
  }
  return all;
}

std::vector<double> measure_arithmetic(const std::string& name, const std::string& variant,
                                       double seconds, ThreadPool* pool) {
  check_seconds(seconds);
  const Kind& kind = find_kind(name);
  const ArithmeticLoop& loop = find_loop(kind, variant);
  const std::string reason = missing(kind);
  if (!reason.empty()) {
    throw std::invalid_argument("name='" + name + "' cannot be measured here (" + reason + ")");
  }
  alignas(64) uint8_t operands[kCeilingOperandBytes];
  fill_operands(kind.operands, operands);
  const auto run = [&](int64_t steps) {
    ThreadPool::Lease lease = pool->acquire();
    const Clock::time_point start = Clock::now();
    lease.run(1, [&](int, int) {
      digest_sink.fetch_xor(loop.run(steps, operands), std::memory_order_relaxed);
    });
    return seconds_since(start);
  };
  int64_t steps = 1;
  double elapsed = run(steps);  // wakes the workers
  while ((elapsed = run(steps)) < kSampleSeconds / 4) steps *= 2;
  steps = std::max<int64_t>(1, static_cast<int64_t>(steps * kSampleSeconds / elapsed));
  const double operations =
      static_cast<double>(steps) * static_cast<double>(loop.operations) * pool->num_threads();
  return collect(seconds, [&] { return operations / run(steps); });
}

ReadProbe::ReadProbe(int64_t bytes, ThreadPool* pool)
    : num_workers_((check_bytes(bytes), pool->num_threads())),
      window_bytes_(
          std::clamp(bytes / num_workers_ / kWindowStep * kWindowStep, kWindowStep, kWindowBytes)),
      num_windows_(std::max<int64_t>(
          1, (bytes + num_workers_ * window_bytes_ - 1) / (num_workers_ * window_bytes_))),
      memory_(num_workers_ * num_windows_, window_bytes_, "windows to read", kAnyNode) {
  const int64_t part = num_windows_ * window_bytes_;
  pool->acquire().run(1, [&](int, int worker) {
    uint8_t* data = memory_.data() + worker * part;
    // Anything but zeros, of which the system might keep one page for all.
    for (int64_t i = 0; i < part; i += 8) {
      const uint64_t word = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
      std::memcpy(data + i, &word, sizeof(word));
    }
  });
}

std::vector<double> ReadProbe::measure(const CeilingKernels& kernels, int num_streams,
                                       int64_t prefetch_bytes, double seconds, ThreadPool* pool) {
  check_seconds(seconds);
  if (num_streams < 1 || num_streams > 8 || (num_streams & (num_streams - 1)) != 0) {
    throw std::invalid_argument("num_streams=" + std::to_string(num_streams) +
                                " must be 1, 2, 4 or 8");
  }
  if (prefetch_bytes < 0 || prefetch_bytes > kWindowBytes) {
    throw std::invalid_argument("prefetch_bytes=" + std::to_string(prefetch_bytes) +
                                " must be between 0 and " + std::to_string(kWindowBytes));
  }
  if (pool->num_threads() != num_workers_) {
    throw std::invalid_argument("pool has " + std::to_string(pool->num_threads()) +
                                " threads, the memory was made for " +
                                std::to_string(num_workers_));
  }
  const int64_t part = num_windows_ * window_bytes_;
  return collect(seconds, [&] {
    // Small windows are read several at a time, so that a sample is long enough to be timed.
    const int64_t count = std::clamp<int64_t>(kWindowBytes / window_bytes_, 1, num_windows_);
    ThreadPool::Lease lease = pool->acquire();
    const Clock::time_point start = Clock::now();
    lease.run(1, [&](int, int worker) {
      uint64_t digest = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t window = (next_window_ + i) % num_windows_;
        digest ^= kernels.read(memory_.data() + worker * part + window * window_bytes_,
                               window_bytes_, num_streams, prefetch_bytes);
      }
      digest_sink.fetch_xor(digest, std::memory_order_relaxed);
    });
    const double elapsed = seconds_since(start);
    next_window_ = (next_window_ + count) % num_windows_;
    return static_cast<double>(count * window_bytes_ * num_workers_) / elapsed;
  });
}

}  // namespace moejet
