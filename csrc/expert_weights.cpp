#include "expert_weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace moejet {
namespace {

constexpr int64_t kExpertAlignment = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
// Sizes beyond these are mistakes, and products of them stay far from overflowing 64 bits.
constexpr int64_t kMaxDim = int64_t{1} << 20;
constexpr int64_t kMaxExperts = int64_t{1} << 16;

void check_size(const char* name, int64_t value, int64_t limit) {
  if (value <= 0 || value > limit) {
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) +
                                " must be between 1 and " + std::to_string(limit));
  }
}

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t float_to_bf16_truncated(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

// SplitMix64: tiny, seekable by its seed, good enough for synthetic weights.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
};

template <class Body>
void for_each_index(int64_t count, ThreadPool* pool, const Body& body) {
  if (pool == nullptr) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  pool->acquire().run(1, [&](int, int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

// One random block of a panel; weights get a standard deviation of about `sigma`.
void fill_block(Format format, Random* random, float sigma, uint8_t* block) {
  const int weight_bytes = format == Format::kInt4G32 ? 512 : format == Format::kInt8 ? 2048 : 1024;
  uint64_t* words = reinterpret_cast<uint64_t*>(block);
  for (int i = 0; i < weight_bytes / 8; ++i) words[i] = random->next();
  if (format == Format::kBf16) {
    // Random sign and mantissa, exponent of sigma: magnitudes in [1, 2) * 2^floor(log2 sigma).
    const uint16_t exponent = float_to_bf16_truncated(sigma) & 0x7f80;
    uint16_t* values = reinterpret_cast<uint16_t*>(block);
    for (int i = 0; i < weight_bytes / 2; ++i) values[i] = (values[i] & 0x807f) | exponent;
    return;
  }
  uint8_t* scales = block + weight_bytes;
  for (int i = 0; i < 64; i += 2) {
    // Standard deviation of the uniform codes: 4.6 of -8..7, 74 of -128..127.
    const float spread = 0.75f + static_cast<float>(random->next() >> 40) * (0.5f / (1 << 24));
    if (format == Format::kInt4G32) {
      const uint16_t scale = float_to_bf16_truncated(sigma / 4.6f * spread);
      std::memcpy(scales + i, &scale, 2);
    } else if (i % 4 == 0) {
      const float scale = sigma / 74.f * spread;
      std::memcpy(scales + i, &scale, 4);
    }
  }
  if (format == Format::kInt8) {
    // -128 is no code of this format.
    int8_t* codes = reinterpret_cast<int8_t*>(block);
    for (int i = 0; i < weight_bytes; ++i) codes[i] = codes[i] == -128 ? -127 : codes[i];
  }
}

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

}  // namespace

ExpertWeights::ExpertWeights(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                             Format format)
    : num_experts_(num_experts),
      hidden_(hidden_size),
      intermediate_(intermediate_size),
      format_(format) {
  check_size("num_experts", num_experts, kMaxExperts);
  check_size("hidden_size", hidden_size, kMaxDim);
  check_size("intermediate_size", intermediate_size, kMaxDim);
  // Whole units of 32 channels: gate-up pairs hold 16 channels each, down pairs 32 outputs each.
  const int64_t units = round_up(intermediate_, kUnitCols) / kUnitCols;
  gate_up_ = pair_geometry(format, hidden_, 2 * units);
  down_ = pair_geometry(format, intermediate_, round_up(hidden_, kPairCols) / kPairCols);
  expert_bytes_ =
      round_up(gate_up_.num_pairs * gate_up_.pair_bytes + down_.num_pairs * down_.pair_bytes,
               kExpertAlignment);
  const double wanted = static_cast<double>(expert_bytes_) * static_cast<double>(num_experts_);
  const std::string size =
      std::to_string(wanted / 1e9) + " GB for " + std::to_string(num_experts_) + " experts";
  if (wanted > 1e15) throw OutOfMemory("cannot reserve " + size);
  mapping_bytes_ = static_cast<size_t>(bytes()) + kHugePage;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw OutOfMemory("cannot reserve " + size);
  }
  const uintptr_t start = reinterpret_cast<uintptr_t>(mapping_);
  data_ = reinterpret_cast<uint8_t*>((start + kHugePage - 1) / kHugePage * kHugePage);
#if defined(MADV_HUGEPAGE)
  madvise(data_, static_cast<size_t>(bytes()), MADV_HUGEPAGE);  // advice: without it, small pages
#endif
}

ExpertWeights::~ExpertWeights() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

uint8_t* ExpertWeights::panel(int64_t expert, Projection projection, int64_t index) const {
  uint8_t* base = data_ + expert * expert_bytes_;
  const int block_bytes = block_shape(format_).bytes;
  switch (projection) {
    case Projection::kGate:
      return base + index * gate_up_.pair_bytes;
    case Projection::kUp:
      return base + index * gate_up_.pair_bytes + block_bytes;
    default:
      return base + down_offset() + index / 2 * down_.pair_bytes + index % 2 * block_bytes;
  }
}

void ExpertWeights::set_projection(int64_t expert, Projection projection, const void* w,
                                   DType dtype, int64_t row_stride, const KernelTable& table,
                                   ThreadPool* pool) {
  const auto pack = table.formats[static_cast<int>(format_)].pack_panel;
  const int64_t num_rows = rows(projection);
  const int64_t num_panels =
      projection == Projection::kDown ? 2 * down_.num_pairs : gate_up_.num_pairs;
  const int64_t block_stride = 2 * block_shape(format_).bytes;
  const uint8_t* source = static_cast<const uint8_t*>(w);
  std::atomic<bool> representable{true};
  for_each_index(num_panels, pool, [&](int64_t p) {
    const int64_t first = p * kPanelRows;
    const int count =
        static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kPanelRows, num_rows - first)));
    // A panel of padding only: its source must not be pointed at beyond the matrix.
    const uint8_t* start = count > 0 ? source + first * row_stride * dtype_bytes(dtype) : source;
    if (!pack(start, dtype, row_stride, count, cols(projection), panel(expert, projection, p),
              block_stride)) {
      representable.store(false, std::memory_order_relaxed);
    }
  });
  if (!representable.load()) {
    throw std::invalid_argument(
        "w contains NaN or infinity, which integer formats cannot hold: check the checkpoint, or "
        "use "
        "format='bf16'");
  }
}

void ExpertWeights::dequantize(int64_t expert, Projection projection, float* out) const {
  const BlockShape shape = block_shape(format_);
  const int64_t num_cols = cols(projection);
  for (int64_t row = 0; row < rows(projection); ++row) {
    const uint8_t* base = panel(expert, projection, row / kPanelRows);
    const int r = static_cast<int>(row % kPanelRows);
    for (int64_t col = 0; col < num_cols; ++col) {
      const uint8_t* block = base + col / shape.k * 2 * shape.bytes;
      const int k = static_cast<int>(col % shape.k);
      float value;
      if (format_ == Format::kInt4G32) {
        const int group = k / 32;
        const uint8_t byte = block[(k % 32) / 4 * 64 + 4 * r + k % 4];
        const int code = group == 0 ? byte & 15 : byte >> 4;
        uint16_t scale;
        std::memcpy(&scale, block + 512 + 4 * r + 2 * group, sizeof(scale));
        value = static_cast<float>(code - 8) * bf16_to_float(scale);
      } else if (format_ == Format::kInt8) {
        float scale;
        std::memcpy(&scale, block + 2048 + 4 * r, sizeof(scale));
        value = static_cast<float>(static_cast<int8_t>(block[k / 4 * 64 + 4 * r + k % 4])) * scale;
      } else {
        uint16_t bits;
        std::memcpy(&bits, block + k / 2 * 64 + 4 * r + 2 * (k % 2), sizeof(bits));
        value = bf16_to_float(bits);
      }
      out[row * num_cols + col] = value;
    }
  }
}

uint64_t ExpertWeights::checksum(ThreadPool* pool) const {
  constexpr int64_t kChunk = int64_t{1} << 20;
  std::atomic<uint64_t> total{0};
  for_each_index((bytes() + kChunk - 1) / kChunk, pool, [&](int64_t i) {
    const int64_t size = std::min(kChunk, bytes() - i * kChunk);  // whole 4096-byte units
    const uint64_t* words = reinterpret_cast<const uint64_t*>(data_ + i * kChunk);
    total.fetch_add(sum_words(words, size / 8), std::memory_order_relaxed);
  });
  return total.load();
}

void ExpertWeights::fill_random(uint64_t seed, ThreadPool* pool) {
  const int block_bytes = block_shape(format_).bytes;
  const float gate_up_sigma = 1.f / std::sqrt(static_cast<float>(hidden_));
  const float down_sigma = 1.f / std::sqrt(static_cast<float>(intermediate_));
  const int64_t pairs = gate_up_.num_pairs + down_.num_pairs;
  for_each_index(num_experts_ * pairs, pool, [&](int64_t i) {
    const int64_t pair = i % pairs;
    const bool is_down = pair >= gate_up_.num_pairs;
    const PairGeometry& geometry = is_down ? down_ : gate_up_;
    uint8_t* block = data_ + i / pairs * expert_bytes_ +
                     (is_down ? down_offset() + (pair - gate_up_.num_pairs) * down_.pair_bytes
                              : pair * gate_up_.pair_bytes);
    Random random{seed * 0x2545f4914f6cdd1dull + static_cast<uint64_t>(i)};
    for (int64_t b = 0; b < 2 * geometry.num_blocks; ++b, block += block_bytes) {
      fill_block(format_, &random, is_down ? down_sigma : gate_up_sigma, block);
    }
  });
}

}  // namespace moejet
