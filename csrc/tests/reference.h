// What the tests of packing and layers share: random data, the sets to test, float64 loops.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "../isa.h"
#include "../kernels.h"
#include "../pack.h"

namespace moejet::testing {

inline std::vector<float> gaussian(int64_t count, float sigma, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> normal(0.f, sigma);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

inline std::vector<Format> formats() {
  std::vector<Format> all;
  for (int f = 0; f < kNumFormats; ++f) all.push_back(static_cast<Format>(f));
  return all;
}

// Those that weights are quantised to.
inline std::vector<Format> quantising_formats() {
  std::vector<Format> some;
  for (const Format format : formats()) {
    if (!is_gguf(format)) some.push_back(format);
  }
  return some;
}

// Every instruction set that this machine can run, amx_emulated included.
inline std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables;
  for (int i = 0; i < kNumIsas; ++i) {
    if (cpu_info().isas[i].usable) tables.push_back(kernel_table(static_cast<Isa>(i)));
  }
  return tables;
}

inline uint16_t to_bf16(float value) {  // towards zero: tests feed values, not roundings
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}
inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// y[0..rows) = W x, W [rows, cols] row-major.
inline std::vector<double> multiply(const std::vector<float>& w, int64_t rows, int64_t cols,
                                    const double* x) {
  std::vector<double> y(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < cols; ++c) sum += static_cast<double>(w[r * cols + c]) * x[c];
    y[static_cast<size_t>(r)] = sum;
  }
  return y;
}

// |got - expected| / |expected| over all values.
inline double relative_error(const std::vector<float>& got, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

// What the arithmetic of a vector or tile kernel may cost on Gaussian inputs; see
// moejet.testing.moe_layers. Float weights on vector kernels: fp32 throughout.
inline double tolerance(Format format, bool any_tiles) {
  if (takes_fp32(format)) return any_tiles ? 5e-3 : 3e-6;
  return 2e-2;
}

}  // namespace moejet::testing
