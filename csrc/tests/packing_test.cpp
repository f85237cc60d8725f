#include "../packing.h"

#include <limits>
#include <vector>

#include "../expert_weights.h"
#include "../linear.h"
#include "check.h"
#include "reference.h"

namespace moejet {
namespace {

using testing::formats;
using testing::gaussian;
using testing::quantising_formats;
using testing::usable_tables;

// Panels of 16 rows and blocks of up to 128 inputs, none of them full, and lonely values.
const std::vector<std::pair<int64_t, int64_t>> kShapes = {{1, 1}, {31, 33}, {80, 96}, {47, 259}};

std::vector<float> dequantized(const LinearWeights& weights) {
  std::vector<float> values(static_cast<size_t>(weights.rows() * weights.cols()));
  weights.dequantize(0, values.data());
  return values;
}

double error_limit(Format format) {
  if (format == Format::kFp32) return 1e-12;
  if (format == Format::kBf16) return 2e-3;
  if (format == Format::kFp8) return 0.03;
  return format == Format::kInt8 ? 7e-3 : 0.1;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  return testing::relative_error(a, std::vector<double>(b.begin(), b.end()));
}

}  // namespace

TEST(packed_weights_come_back_and_are_the_same_on_every_set) {
  ThreadPool pool({0, 1, 2}, false);
  for (const Format format : quantising_formats()) {
    for (const auto& [rows, cols] : kShapes) {
      const std::vector<float> source = gaussian(rows * cols, 1.f, 1);
      const SourceMatrix matrix{source.data(), DType::kF32, cols, rows, cols};
      LinearWeights first(1, rows, cols, format);
      first.set(0, matrix, scalar::table, nullptr);
      const std::vector<float> values = dequantized(first);
      CHECK_OP(distance(values, source), <, error_limit(format) * (cols < 32 ? 2 : 1));
      for (const KernelTable* table : usable_tables()) {
        LinearWeights other(1, rows, cols, format);
        other.set(0, matrix, *table, &pool);
        CHECK(std::memcmp(first.data(0), other.data(0), static_cast<size_t>(first.bytes())) == 0);
      }
    }
  }
}

TEST(sixteen_bit_sources_and_rows_apart) {
  const int64_t rows = 45, cols = 70, stride = 77;
  for (const Format format : quantising_formats()) {
    for (const KernelTable* table : usable_tables()) {
      std::vector<float> wide = gaussian(rows * cols, 1.f, 2);
      // The last row ends where the memory ends: a kernel that reads on is caught.
      std::vector<uint16_t> narrow(static_cast<size_t>((rows - 1) * stride + cols));
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
          const uint16_t bits = testing::to_bf16(wide[static_cast<size_t>(r * cols + c)]);
          narrow[static_cast<size_t>(r * stride + c)] = bits;
          wide[static_cast<size_t>(r * cols + c)] = testing::from_bf16(bits);
        }
      }
      LinearWeights from_wide(1, rows, cols, format), from_narrow(1, rows, cols, format);
      from_wide.set(0, {wide.data(), DType::kF32, cols, rows, cols}, *table, nullptr);
      from_narrow.set(0, {narrow.data(), DType::kBf16, stride, rows, cols}, *table, nullptr);
      CHECK(dequantized(from_wide) == dequantized(from_narrow));
      // The same bits as fp16: small integers and fractions are exact in both.
      for (uint16_t& bits : narrow) bits = static_cast<uint16_t>(bits & 0xbfff);
      from_narrow.set(0, {narrow.data(), DType::kF16, stride, rows, cols}, *table, nullptr);
      for (const float value : dequantized(from_narrow)) CHECK(std::isfinite(value));
    }
  }
}

TEST(projections_keep_their_places) {
  ThreadPool pool({0, 1, 2}, false);
  const int64_t hidden = 70, inter = 45;
  for (const KernelTable* table : usable_tables()) {
    ExpertWeights weights(3, hidden, inter, Format::kBf16);
    std::vector<std::vector<float>> sources;
    for (int64_t e = 0; e < 3; ++e) {
      for (const Projection p : {Projection::kGate, Projection::kUp, Projection::kDown}) {
        std::vector<float> source = gaussian(hidden * inter, 1.f, sources.size());
        for (float& value : source) value = testing::from_bf16(testing::to_bf16(value));
        weights.set_projection(
            e, p, {source.data(), DType::kF32, weights.cols(p), weights.rows(p), weights.cols(p)},
            *table, &pool);
        sources.push_back(std::move(source));
      }
    }
    std::vector<float> values(static_cast<size_t>(hidden * inter));
    size_t i = 0;
    for (int64_t e = 0; e < 3; ++e) {
      for (const Projection p : {Projection::kGate, Projection::kUp, Projection::kDown}) {
        weights.dequantize(e, p, values.data());
        CHECK(values == sources[i++]);
      }
    }
  }
}

TEST(formats_refuse_what_they_cannot_hold) {
  std::vector<float> source(40 * 50, 1.f);
  source.back() = std::numeric_limits<float>::quiet_NaN();
  ThreadPool pool({0, 1, 2}, false);
  for (const KernelTable* table : usable_tables()) {
    for (const Format format : {Format::kInt4G32, Format::kInt8, Format::kFp8}) {
      LinearWeights weights(1, 40, 50, format);
      CHECK_THROWS(std::invalid_argument, "NaN or infinity",
                   weights.set(0, {source.data(), DType::kF32, 50, 40, 50}, *table, &pool));
    }
  }
}

TEST(fp8_sources_keep_their_codes) {
  const int64_t rows = 150, cols = 270, stride = 280;
  // The last row ends where the memory ends, and so do the scales.
  std::vector<uint8_t> codes(static_cast<size_t>((rows - 1) * stride + cols));
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(i * 37 + i / 256);
    if ((codes[i] & 0x7f) == 0x7f) codes[i] = 0;
  }
  const std::vector<float> scales = {1.f, 0.5f, 3e-4f, 0.f, 7.f, 1e-6f};
  const SourceMatrix source{codes.data(), DType::kFp8, stride, rows, cols, scales.data()};
  ThreadPool pool({0, 1, 2}, false);
  for (const KernelTable* table : usable_tables()) {
    for (const Format format : {Format::kFp8, Format::kFp32}) {
      LinearWeights weights(1, rows, cols, format);
      weights.set(0, source, *table, &pool);
      const std::vector<float> values = dequantized(weights);
      bool equal = true;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
          const float scale = scales[static_cast<size_t>(r / 128 * 3 + c / 128)];
          const float value = fp8_value(codes[static_cast<size_t>(r * stride + c)]) * scale;
          equal = equal && values[static_cast<size_t>(r * cols + c)] == value;
        }
      }
      CHECK(equal);
    }
  }
}

TEST(random_weights_depend_on_the_seed_only) {
  ThreadPool pool({0, 1, 2}, false);
  for (const Format format : formats()) {
    ExpertWeights alone(3, 100, 70, format), together(3, 100, 70, format);
    alone.fill_random(7, nullptr);
    together.fill_random(7, &pool);
    CHECK_OP(alone.checksum(nullptr), ==, together.checksum(&pool));
    together.fill_random(8, &pool);
    CHECK_OP(alone.checksum(nullptr), !=, together.checksum(&pool));
  }
}

TEST(impossible_sizes_are_refused) {
  CHECK_THROWS(std::invalid_argument, "num_experts=0", ExpertWeights(0, 8, 8, Format::kInt8));
  CHECK_THROWS(std::invalid_argument, "rows=-1", LinearWeights(1, -1, 8, Format::kInt8));
  CHECK_THROWS(OutOfMemory, "cannot reserve",
               ExpertWeights(65536, 1 << 20, 1 << 20, Format::kBf16));
}

}  // namespace moejet
