#include "packing.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gguf_blocks.h"

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

void fill_words(Random* random, void* to, int64_t bytes) {
  uint64_t* words = static_cast<uint64_t*>(to);
  for (int64_t i = 0; i < bytes / 8; ++i) words[i] = random->next();
}

// In [0.75, 1.25): scales differ.
float random_spread(Random* random) {
  return 0.75f + static_cast<float>(random->next() >> 40) * (0.5f / (1 << 24));
}

void fill_int4(Random* random, float sigma, uint8_t* block) {
  fill_words(random, block, 512);
  for (int i = 512; i < 576; i += 2) {
    // 4.6 is the standard deviation of uniform codes from -8 to 7.
    const uint16_t scale = float_to_bf16_truncated(sigma / 4.6f * random_spread(random));
    std::memcpy(block + i, &scale, sizeof(scale));
  }
}

void fill_int8(Random* random, float sigma, uint8_t* block) {
  fill_words(random, block, 2048);
  int8_t* codes = reinterpret_cast<int8_t*>(block);
  // -128 is no code of this format.
  for (int i = 0; i < 2048; ++i) codes[i] = codes[i] == -128 ? -127 : codes[i];
  for (int i = 2048; i < 2112; i += 4) {
    const float scale = sigma / 74.f * random_spread(random);
    std::memcpy(block + i, &scale, sizeof(scale));
  }
}

void fill_bf16(Random* random, float sigma, uint8_t* block) {
  // Random sign and mantissa, exponent of sigma: magnitudes in [1, 2) * 2^floor(log2 sigma).
  fill_words(random, block, 1024);
  const uint16_t exponent = float_to_bf16_truncated(sigma) & 0x7f80;
  uint16_t* values = reinterpret_cast<uint16_t*>(block);
  for (int i = 0; i < 512; ++i) values[i] = (values[i] & 0x807f) | exponent;
}

void fill_fp8(Random* random, float sigma, uint8_t* block) {
  const Fp8Block<uint8_t> parts = fp8_block(block);
  Fp8BlockData data{};
  fill_words(random, parts.codes, 2048);
  // Random sign and mantissa, exponents 11 to 14: a root mean square of 108.
  for (int i = 0; i < 2048; ++i) parts.codes[i] = (parts.codes[i] & 0x9f) + 0x58;
  // Normally distributed weights whose largest has the largest code leave a zero or a subnormal
  // number in every fourth block.
  const uint64_t place = random->next();
  if (place % 4 == 0) {
    const int i = static_cast<int>(place / 4 % 2048);
    parts.codes[i] = static_cast<uint8_t>(place >> 56 & 0x87);
    data.small = uint32_t{1} << i / 64;
  }
  data.scale = sigma / 108.f * random_spread(random);
  std::memcpy(parts.data, &data, sizeof(data));
}

void fill_fp32(Random* random, float sigma, uint8_t* block) {
  fill_words(random, block, 2048);
  uint32_t exponent;
  std::memcpy(&exponent, &sigma, sizeof(exponent));
  uint32_t* values = reinterpret_cast<uint32_t*>(block);
  for (int i = 0; i < 512; ++i) values[i] = (values[i] & 0x807fffffu) | (exponent & 0x7f800000u);
}

// A positive number as fp16, rounded to nearest, but neither to zero nor to infinity.
uint16_t float_to_half(float value) {
  if (value < 0x1p-14f) {
    return static_cast<uint16_t>(std::max(value * 0x1p24f + 0.5f, 1.f));
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(std::min((bits + 0x1000 - (112u << 23)) >> 13, 0x7bffu));
}

// The 12 bytes of sc and m of each row: m is about sc, so that with dmin about d times the mean
// code a group's mean is near zero, as in weights of a model.
void fill_scale_mins(Random* random, uint8_t* block) {
  for (int at = kGgufScalesAt; at < kGgufScalesAt + 64; ++at) {
    const uint64_t bits = random->next();
    const uint8_t scale = static_cast<uint8_t>(bits), upper = static_cast<uint8_t>(bits >> 8 & 15);
    block[at] = scale;
    block[at + 64] = static_cast<uint8_t>(scale ^ (bits >> 16 & 3));
    block[at + 128] = static_cast<uint8_t>(upper | (upper ^ (bits >> 18 & 3)) << 4);
  }
}

// Random bits, with d and dmin that give the values their size and a mean of zero.
void fill_gguf(Format format, Random* random, float sigma, uint8_t* block) {
  fill_words(random, block, block_shape(format).bytes);
  // What divides sigma to give d: the standard deviation of the values for d = 1.
  const float deviation = format == Format::kQ4_0   ? 4.6f
                          : format == Format::kQ8_0 ? 74.f
                          : format == Format::kQ4K  ? 169.f
                          : format == Format::kQ5K  ? 338.f
                                                    : 1366.f;
  if (gguf_has_mins(format)) fill_scale_mins(random, block);
  uint16_t halves[2][kPanelRows] = {};
  for (int r = 0; r < kPanelRows; ++r) {
    const float d = sigma / deviation * random_spread(random);
    halves[0][r] = float_to_half(d);
    if (gguf_has_mins(format)) {
      halves[1][r] = float_to_half(d * (format == Format::kQ4K ? 7.5f : 15.5f));
    } else if (format != Format::kQ6K) {
      halves[1][r] = float_to_half(sigma / deviation * random_spread(random));
    }
  }
  std::memcpy(block + gguf_halves_at(format), halves, sizeof(halves));
}

void fill_block(Format format, Random* random, float sigma, uint8_t* block) {
  switch (format) {
    case Format::kInt4G32:
      return fill_int4(random, sigma, block);
    case Format::kInt8:
      return fill_int8(random, sigma, block);
    case Format::kBf16:
      return fill_bf16(random, sigma, block);
    case Format::kFp8:
      return fill_fp8(random, sigma, block);
    case Format::kFp32:
      return fill_fp32(random, sigma, block);
    default:
      return fill_gguf(format, random, sigma, block);
  }
}

[[noreturn]] void throw_not_representable(Format format, DType source) {
  if (source == DType::kFp8) {
    throw std::invalid_argument(
        "w contains the codes 0x7f or 0xff, which are NaN in float8_e4m3fn: check that the file "
        "holds e4m3fn values (not e4m3fnuz or e5m2), or download it again");
  }
  if (source == DType::kGguf) {
    throw std::invalid_argument(std::string("w contains a ") + format_name(format) +
                                " scale that is NaN or infinity: the GGUF file is damaged, "
                                "download it again");
  }
  throw std::invalid_argument(std::string("w contains NaN or infinity, which ") +
                              (format == Format::kFp8 ? "fp8 weights" : "integer formats") +
                              " cannot hold: check the checkpoint, or use format='bf16'");
}

// GGUF formats and sources go together only.
void check_kind(Format format, const SourceMatrix& source) {
  const bool from_gguf = source.dtype == DType::kGguf;
  const std::string name = format_name(format);
  if (!from_gguf && is_gguf(format)) {
    throw std::invalid_argument("format='" + name +
                                "' keeps the bits of a GGUF file and quantises nothing: pass their "
                                "bytes and source_format='" +
                                name + "', or use another format");
  }
  if (from_gguf && format != source.gguf_format) {
    const std::string source_name = format_name(source.gguf_format);
    throw std::invalid_argument("source_format='" + source_name + "' does not fit format='" + name +
                                "': use format='" + source_name +
                                "', or dequantise the weights first");
  }
}

// Up to `count` rows from `first` on, without scales.
PanelSource rows_of(const SourceMatrix& source, int64_t first, int64_t count) {
  PanelSource part{};
  part.rows = static_cast<int>(std::min(count, source.rows - first));
  part.data = static_cast<const uint8_t*>(source.data);
  if (part.rows > 0) {
    part.data = static_cast<const uint8_t*>(source.data) +
                first * source.row_stride * dtype_bytes(source.dtype);
  }
  part.dtype = source.dtype;
  part.row_stride = source.row_stride;
  part.k = source.cols;
  if (source.group_scales != nullptr) {
    part.group_stride = source.cols / kActGroup;
    part.group_scales = source.group_scales + std::min(first, source.rows) * part.group_stride;
  }
  return part;
}

// The part from input `col` on, a multiple of 128, of up to `most` inputs.
void take_columns(PanelSource* part, int64_t col, int64_t most) {
  const int64_t elements_per_byte_group = part->dtype == DType::kInt4 ? 2 : 1;
  part->data = static_cast<const uint8_t*>(part->data) +
               col / elements_per_byte_group * dtype_bytes(part->dtype);
  part->k = std::min(most, part->k - col);
  if (part->group_scales != nullptr) part->group_scales += col / kActGroup;
}

// The scales of all 128 x 128 blocks, row by row.
std::vector<float> block_scales(const SourceMatrix& source, const FormatKernels& kernels,
                                ThreadPool* pool) {
  // A part is short enough for many workers and long enough for the memory's prefetch.
  constexpr int64_t kPartCols = 8 * kFp8ScaleBlock;
  const int64_t bands = ceil_div(source.rows, kFp8ScaleBlock);
  const int64_t scales_per_row = ceil_div(source.cols, kFp8ScaleBlock);
  const int64_t parts = ceil_div(source.cols, kPartCols);
  std::vector<float> scales(static_cast<size_t>(bands * scales_per_row));
  std::atomic<bool> finite{true};
  for_each_index(bands * parts, pool, [&](int64_t i) {
    const int64_t band = i / parts, col = i % parts * kPartCols;
    PanelSource part = rows_of(source, band * kFp8ScaleBlock, kFp8ScaleBlock);
    take_columns(&part, col, kPartCols);
    float* first = scales.data() + band * scales_per_row + col / kFp8ScaleBlock;
    if (!kernels.block_scales(part, first)) finite.store(false, std::memory_order_relaxed);
  });
  if (!finite.load()) throw_not_representable(Format::kFp8, source.dtype);
  return scales;
}

float int4_value(const uint8_t* block, int k, int r) {
  const int group = k / 32;
  const uint8_t byte = block[(k % 32) / 4 * 64 + 4 * r + k % 4];
  const int code = group == 0 ? byte & 15 : byte >> 4;
  uint16_t scale;
  std::memcpy(&scale, block + 512 + 4 * r + 2 * group, sizeof(scale));
  return static_cast<float>(code - 8) * bf16_to_float(scale);
}

float fp8_block_value(const uint8_t* block, int k, int r) {
  const Fp8Block<const uint8_t> parts = fp8_block(block);
  Fp8BlockData data;
  std::memcpy(&data, parts.data, sizeof(data));
  return fp8_value(parts.codes[k / 4 * 64 + 4 * r + fp8_byte(k)]) * data.scale;
}

// Input k of row r of a panel block.
float block_value(Format format, const uint8_t* block, int k, int r) {
  float value = 0.f;
  uint16_t bits;
  switch (format) {
    case Format::kInt4G32:
      return int4_value(block, k, r);
    case Format::kInt8:
      std::memcpy(&value, block + 2048 + 4 * r, sizeof(value));
      return static_cast<float>(static_cast<int8_t>(block[k / 4 * 64 + 4 * r + k % 4])) * value;
    case Format::kBf16:
      std::memcpy(&bits, block + k / 2 * 64 + 4 * r + 2 * (k % 2), sizeof(bits));
      return bf16_to_float(bits);
    case Format::kFp8:
      return fp8_block_value(block, k, r);
    case Format::kFp32:
      std::memcpy(&value, block + k * 64 + 4 * r, sizeof(value));
      return value;
    case Format::kQ4_0:
      return gguf_value<Format::kQ4_0>(block, k, r);
    case Format::kQ8_0:
      return gguf_value<Format::kQ8_0>(block, k, r);
    case Format::kQ4K:
      return gguf_value<Format::kQ4K>(block, k, r);
    case Format::kQ5K:
      return gguf_value<Format::kQ5K>(block, k, r);
    case Format::kQ6K:
      return gguf_value<Format::kQ6K>(block, k, r);
  }
  return value;
}

}  // namespace

const char* format_name(Format format) {
  constexpr const char* kNames[kNumFormats] = {"int4_g32", "int8", "bf16", "fp8",  "fp32",
                                               "q4_0",     "q8_0", "q4_k", "q5_k", "q6_k"};
  return kNames[static_cast<int>(format)];
}

void check_size(const char* name, int64_t value, int64_t limit) {
  if (value <= 0 || value > limit) {
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) +
                                " must be between 1 and " + std::to_string(limit));
  }
}

PanelLayout whole_pairs(std::vector<uint8_t*> origins, Format format,
                        const PairGeometry& geometry) {
  const int64_t panels = 2 * geometry.num_pairs;
  const Slices slices(panels, static_cast<int>(origins.size()), 2);
  return {std::move(origins), slices, panels, 2, geometry.pair_bytes, block_shape(format).bytes};
}

PanelLayout half_pairs(std::vector<uint8_t*> origins, Format format, const PairGeometry& geometry,
                       int which) {
  for (uint8_t*& origin : origins) origin += which * block_shape(format).bytes;
  const Slices slices(geometry.num_pairs, static_cast<int>(origins.size()), 2);
  return {std::move(origins), slices, geometry.num_pairs, 1, geometry.pair_bytes, 0};
}

void pack_matrix(Format format, const SourceMatrix& source, const PanelLayout& layout,
                 const KernelTable& table, ThreadPool* pool) {
  check_kind(format, source);
  const FormatKernels& kernels = table.formats[static_cast<int>(format)];
  const int64_t block_stride = 2 * block_shape(format).bytes;
  std::vector<float> own_scales;
  const float* scales = source.scale_inv;
  if (kernels.block_scales != nullptr && source.dtype != DType::kFp8) {
    own_scales = block_scales(source, kernels, pool);
    scales = own_scales.data();
  }
  const int64_t scales_per_row = ceil_div(source.cols, kFp8ScaleBlock);
  std::atomic<bool> representable{true};
  std::vector<int64_t> counts;
  for (size_t n = 0; n < layout.origins.size(); ++n) {
    counts.push_back(layout.slices.size(static_cast<int>(n)));
  }
  for_each_on_nodes(counts, pool, [&](int node, int64_t i) {
    const int64_t p = layout.slices.begin(node) + i;
    // A panel of padding only: its source must not be pointed at beyond the matrix.
    const int64_t first = std::min(p * kPanelRows, source.rows);
    PanelSource panel = rows_of(source, first, kPanelRows);
    if (scales != nullptr && panel.rows > 0) {
      panel.scales = scales + first / kFp8ScaleBlock * scales_per_row;
    }
    if (!kernels.pack_panel(panel, layout.panel(p), block_stride)) {
      representable.store(false, std::memory_order_relaxed);
    }
  });
  if (!representable.load()) throw_not_representable(format, source.dtype);
}

void unpack_matrix(Format format, const PanelLayout& layout, int64_t rows, int64_t cols,
                   float* out) {
  const BlockShape shape = block_shape(format);
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* base = layout.panel(row / kPanelRows);
    const int r = static_cast<int>(row % kPanelRows);
    for (int64_t col = 0; col < cols; ++col) {
      const uint8_t* block = base + col / shape.k * 2 * shape.bytes;
      out[row * cols + col] = block_value(format, block, static_cast<int>(col % shape.k), r);
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
