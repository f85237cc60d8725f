#include <limits>
#include <vector>

#include "../gguf_blocks.h"
#include "../linear.h"
#include "check.h"
#include "reference.h"

namespace moejet {
namespace {

using testing::usable_tables;

float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return half_value(bits);
}

// Weight i of a block as it lies in the file, written down from ggml's description.
float file_value(Format format, const uint8_t* p, int i) {
  if (format == Format::kQ4_0) {
    const int byte = p[2 + i % 16];
    return half_at(p) * static_cast<float>((i < 16 ? byte & 15 : byte >> 4) - 8);
  }
  if (format == Format::kQ8_0)
    return half_at(p) * static_cast<float>(static_cast<int8_t>(p[2 + i]));
  if (format == Format::kQ6K) {
    const int half = i / 128, part = i % 128 / 32, l = i % 32;
    const int low = p[64 * half + 32 * (part % 2) + l] >> (part < 2 ? 0 : 4) & 15;
    const int high = p[128 + 32 * half + l] >> (2 * part) & 3;
    const int8_t scale = static_cast<int8_t>(p[192 + i / 16]);
    return half_at(p + 208) * static_cast<float>(scale) *
           static_cast<float>((low | high << 4) - 32);
  }
  const uint8_t* q = p + 4;
  const int g = i / 32;
  const int scale = g < 4 ? q[g] & 63 : (q[g + 4] & 15) | (q[g - 4] >> 6 << 4);
  const int min = g < 4 ? q[g + 4] & 63 : q[g + 4] >> 4 | (q[g] >> 6 << 4);
  const uint8_t* codes = p + (format == Format::kQ5K ? 48 : 16);
  int code = codes[32 * (g / 2) + i % 32] >> (4 * (g % 2)) & 15;
  if (format == Format::kQ5K) code |= (p[16 + i % 32] >> g & 1) << 4;
  return half_at(p) * static_cast<float>(scale) * static_cast<float>(code) -
         half_at(p + 2) * static_cast<float>(min);
}

// A matrix of random blocks; its memory ends with its last row.
struct File {
  File(Format file_format, int64_t num_rows, int64_t num_cols, int64_t gap)
      : format(file_format),
        rows(num_rows),
        cols(num_cols),
        block(gguf_file_block(format)),
        stride(cols / block.k * block.bytes + gap),
        bytes(static_cast<size_t>(rows * stride - gap)) {
    std::mt19937_64 engine(static_cast<uint64_t>(rows + cols));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(engine());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t b = 0; b < cols / block.k; ++b) {
        uint8_t* p = bytes.data() + r * stride + b * block.bytes;
        // Any half that is a number, subnormal ones included.
        for (const int at : halves()) p[at + 1] = static_cast<uint8_t>(p[at + 1] & 0xbb);
      }
    }
  }
  std::vector<int> halves() const {
    if (format == Format::kQ6K) return {208};
    return gguf_has_mins(format) ? std::vector<int>{0, 2} : std::vector<int>{0};
  }
  SourceMatrix matrix() const {
    return {bytes.data(), DType::kGguf, stride, rows, cols, nullptr, nullptr, format};
  }

  Format format;
  int64_t rows, cols;
  BlockShape block;
  int64_t stride;
  std::vector<uint8_t> bytes;
};

std::vector<Format> gguf_formats() {
  std::vector<Format> some;
  for (const Format format : testing::formats()) {
    if (is_gguf(format)) some.push_back(format);
  }
  return some;
}

}  // namespace

TEST(gguf_blocks_keep_their_values) {
  ThreadPool pool({0, 1, 2}, false);
  for (const Format format : gguf_formats()) {
    for (const int64_t rows : {1, 16, 47}) {
      const File file(format, rows, gguf_file_block(format).k * 3, rows % 5);
      LinearWeights first(1, rows, file.cols, format);
      first.set(0, file.matrix(), scalar::table, nullptr);
      std::vector<float> values(static_cast<size_t>(rows * file.cols));
      first.dequantize(0, values.data());
      for (int64_t i = 0; i < rows * file.cols; ++i) {
        const int64_t k = i % file.cols;
        const uint8_t* p =
            file.bytes.data() + i / file.cols * file.stride + k / file.block.k * file.block.bytes;
        CHECK_OP(values[static_cast<size_t>(i)], ==,
                 file_value(format, p, static_cast<int>(k % file.block.k)));
      }
      for (const KernelTable* table : usable_tables()) {
        LinearWeights other(1, rows, file.cols, format);
        other.set(0, file.matrix(), *table, &pool);
        CHECK(std::memcmp(first.data(0), other.data(0), static_cast<size_t>(first.bytes())) == 0);
      }
    }
  }
}

TEST(gguf_sources_and_formats_go_together) {
  for (const Format format : gguf_formats()) {
    const std::vector<float> w(256 * 3, 1.f);
    LinearWeights weights(1, 3, 256, format);
    CHECK_THROWS(std::invalid_argument, "keeps the bits of a GGUF file",
                 weights.set(0, {w.data(), DType::kF32, 256, 3, 256}, scalar::table, nullptr));
    File file(format, 3, 256, 0);
    LinearWeights int8(1, 3, 256, Format::kInt8);
    CHECK_THROWS(std::invalid_argument, "does not fit format='int8'",
                 int8.set(0, file.matrix(), scalar::table, nullptr));
    for (const int at : file.halves()) {
      for (const uint8_t top : {0x7c, 0xfd, 0x7f}) {
        const size_t place = file.bytes.size() - static_cast<size_t>(file.block.bytes - at - 1);
        const uint8_t before = std::exchange(file.bytes[place], top);
        for (const KernelTable* table : usable_tables()) {
          CHECK_THROWS(std::invalid_argument, "scale that is NaN or infinity",
                       weights.set(0, file.matrix(), *table, nullptr));
        }
        file.bytes[place] = before;
      }
    }
  }
}

}  // namespace moejet
