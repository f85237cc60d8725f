#include "packing.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace moejet {
namespace {

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

}  // namespace

void check_size(const char* name, int64_t value, int64_t limit) {
  if (value <= 0 || value > limit) {
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) +
                                " must be between 1 and " + std::to_string(limit));
  }
}

PanelLayout whole_pairs(uint8_t* base, Format format, const PairGeometry& geometry) {
  return {base, 2 * geometry.num_pairs, 2, geometry.pair_bytes, block_shape(format).bytes};
}

PanelLayout half_pairs(uint8_t* base, Format format, const PairGeometry& geometry, int which) {
  return {base + which * block_shape(format).bytes, geometry.num_pairs, 1, geometry.pair_bytes, 0};
}

void pack_matrix(Format format, const SourceMatrix& source, const PanelLayout& layout,
                 const KernelTable& table, ThreadPool* pool) {
  const auto pack = table.formats[static_cast<int>(format)].pack_panel;
  const int64_t block_stride = 2 * block_shape(format).bytes;
  const uint8_t* data = static_cast<const uint8_t*>(source.data);
  std::atomic<bool> representable{true};
  for_each_index(layout.num_panels, pool, [&](int64_t p) {
    const int64_t first = p * kPanelRows;
    const int count =
        static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kPanelRows, source.rows - first)));
    // A panel of padding only: its source must not be pointed at beyond the matrix.
    const uint8_t* start =
        count > 0 ? data + first * source.row_stride * dtype_bytes(source.dtype) : data;
    if (!pack(start, source.dtype, source.row_stride, count, source.cols, layout.panel(p),
              block_stride)) {
      representable.store(false, std::memory_order_relaxed);
    }
  });
  if (!representable.load()) {
    throw std::invalid_argument(
        "w contains NaN or infinity, which integer formats cannot hold: check the checkpoint, or "
        "use format='bf16'");
  }
}

void unpack_matrix(Format format, const PanelLayout& layout, int64_t rows, int64_t cols,
                   float* out) {
  const BlockShape shape = block_shape(format);
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* base = layout.panel(row / kPanelRows);
    const int r = static_cast<int>(row % kPanelRows);
    for (int64_t col = 0; col < cols; ++col) {
      const uint8_t* block = base + col / shape.k * 2 * shape.bytes;
      const int k = static_cast<int>(col % shape.k);
      float value;
      if (format == Format::kInt4G32) {
        const int group = k / 32;
        const uint8_t byte = block[(k % 32) / 4 * 64 + 4 * r + k % 4];
        const int code = group == 0 ? byte & 15 : byte >> 4;
        uint16_t scale;
        std::memcpy(&scale, block + 512 + 4 * r + 2 * group, sizeof(scale));
        value = static_cast<float>(code - 8) * bf16_to_float(scale);
      } else if (format == Format::kInt8) {
        float scale;
        std::memcpy(&scale, block + 2048 + 4 * r, sizeof(scale));
        value = static_cast<float>(static_cast<int8_t>(block[k / 4 * 64 + 4 * r + k % 4])) * scale;
      } else {
        uint16_t bits;
        std::memcpy(&bits, block + k / 2 * 64 + 4 * r + 2 * (k % 2), sizeof(bits));
        value = bf16_to_float(bits);
      }
      out[row * cols + col] = value;
    }
  }
}

void fill_pair(Format format, const PairGeometry& geometry, uint64_t seed, float sigma,
               uint8_t* pair) {
  Random random{seed};
  const int block_bytes = block_shape(format).bytes;
  for (int64_t b = 0; b < 2 * geometry.num_blocks; ++b, pair += block_bytes) {
    fill_block(format, &random, sigma, pair);
  }
}

}  // namespace moejet
