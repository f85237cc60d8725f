#include <thread>
#include <vector>

#include "../linear.h"
#include "../moe.h"
#include "check.h"
#include "reference.h"

namespace moejet {
namespace {

using testing::formats;
using testing::gaussian;
using testing::multiply;
using testing::usable_tables;

// 64 and more rows of an expert run as tiles; 129 is one more than a vector kernel's row block.
const std::vector<int64_t> kTokens = {1, 2, 7, 17, 66, 131};

// A layer of random experts and the values that its kernels compute with.
struct Experts {
  Experts(ExpertFormats format, int64_t num, int64_t hidden, int64_t inter,
          Arithmetic arithmetic = Arithmetic::kBf16)
      : weights(num, hidden, inter, format, {kAnyNode}, arithmetic) {
    weights.fill_random(3, nullptr);
    for (int64_t e = 0; e < num; ++e) {
      for (const Projection p : {Projection::kGate, Projection::kUp, Projection::kDown}) {
        values.emplace_back(static_cast<size_t>(hidden * inter));
        weights.dequantize(e, p, values.back().data());
      }
    }
  }
  const std::vector<float>& of(int64_t expert, Projection p) const {
    return values[static_cast<size_t>(3 * expert + static_cast<int>(p))];
  }

  ExpertWeights weights;
  std::vector<std::vector<float>> values;
};

// Inputs of a call; rows of x are `stride` apart and its memory ends with the last row.
struct Inputs {
  Inputs(const Experts& experts, int64_t num_tokens, int64_t k, int64_t x_stride)
      : tokens(num_tokens),
        top_k(k),
        stride(x_stride),
        x(gaussian((tokens - 1) * stride + experts.weights.hidden_size(), 1.f, 11)),
        mix(gaussian(tokens * top_k, 1.f, 12)) {
    std::mt19937_64 engine(13);
    const uint64_t num_experts = static_cast<uint64_t>(experts.weights.num_experts());
    for (int64_t i = 0; i < tokens * top_k; ++i) {
      // Skipped entries, and now and then one expert twice for a token.
      ids.push_back(engine() % 11 == 0 ? -1 : static_cast<int32_t>(engine() % num_experts));
    }
    ids[0] = 0;  // never an empty answer, whose error would have no measure
  }

  std::vector<double> answer(const Experts& experts) const {
    const int64_t hidden = experts.weights.hidden_size();
    const int64_t inter = experts.weights.intermediate_size();
    std::vector<double> out(static_cast<size_t>(tokens * hidden));
    for (int64_t i = 0; i < tokens * top_k; ++i) {
      const int32_t e = ids[static_cast<size_t>(i)];
      if (e < 0) continue;
      const float* row = x.data() + i / top_k * stride;
      const std::vector<double> wide(row, row + hidden);
      const auto gate = multiply(experts.of(e, Projection::kGate), inter, hidden, wide.data());
      std::vector<double> h = multiply(experts.of(e, Projection::kUp), inter, hidden, wide.data());
      for (size_t c = 0; c < h.size(); ++c) h[c] *= gate[c] / (1 + std::exp(-gate[c]));
      const auto y = multiply(experts.of(e, Projection::kDown), hidden, inter, h.data());
      for (int64_t c = 0; c < hidden; ++c) {
        out[static_cast<size_t>(i / top_k * hidden + c)] +=
            static_cast<double>(mix[static_cast<size_t>(i)]) * y[static_cast<size_t>(c)];
      }
    }
    return out;
  }

  MoeCall call(const Experts& experts, float* out) const {
    const int64_t hidden = experts.weights.hidden_size();
    return {tokens,     top_k,      x.data(), DType::kF32, stride,
            ids.data(), mix.data(), out,      DType::kF32, hidden};
  }

  int64_t tokens, top_k, stride;
  std::vector<float> x, mix;
  std::vector<int32_t> ids;
};

std::vector<float> run(const Experts& experts, const Inputs& inputs, ThreadPool* pool,
                       const KernelTable& table) {
  std::vector<float> out(static_cast<size_t>(inputs.tokens * experts.weights.hidden_size()), NAN);
  moe_forward(experts.weights, inputs.call(experts, out.data()), pool, table);
  return out;
}

bool uses_tiles(const KernelTable& table, Format format) {
  return table.formats[static_cast<int>(format)].min_tile_rows > 0;
}

void test_experts(int64_t hidden, int64_t inter) {
  ThreadPool three({0, 1, 2}, false), one({0}, false);
  for (const Format format : formats()) {
    const Experts experts(format, 3, hidden, inter);
    for (const int64_t tokens : kTokens) {
      const Inputs inputs(experts, tokens, 2, hidden + 5);
      const std::vector<double> expected = inputs.answer(experts);
      for (const KernelTable* table : usable_tables()) {
        const std::vector<float> got = run(experts, inputs, &three, *table);
        CHECK_OP(testing::relative_error(got, expected), <,
                 testing::tolerance(format, uses_tiles(*table, format)));
        CHECK(got == run(experts, inputs, &one, *table));
      }
    }
  }
}

// [tokens, matrices, cols], or [tokens, cols] if shared, against float64.
void test_linear(int64_t matrices, int64_t rows, int64_t cols) {
  ThreadPool pool({0, 1, 2}, false);
  for (const Format format : formats()) {
    LinearWeights weights(matrices, rows, cols, format);
    weights.fill_random(5, &pool);
    std::vector<std::vector<float>> values;
    for (int64_t g = 0; g < matrices; ++g) {
      values.emplace_back(static_cast<size_t>(rows * cols));
      weights.dequantize(g, values.back().data());
    }
    for (const int64_t tokens : kTokens) {
      for (const bool shared : {true, false}) {
        const int64_t inputs = shared ? 1 : matrices, stride = inputs * cols;
        const std::vector<float> x = gaussian(tokens * stride, 1.f, 21);
        std::vector<double> expected;
        for (int64_t i = 0; i < tokens * matrices; ++i) {
          const int64_t g = i % matrices;
          const float* row = x.data() + i / matrices * stride + (shared ? 0 : g * cols);
          const std::vector<double> wide(row, row + cols);
          const auto y = multiply(values[static_cast<size_t>(g)], rows, cols, wide.data());
          expected.insert(expected.end(), y.begin(), y.end());
        }
        for (const KernelTable* table : usable_tables()) {
          std::vector<float> out(static_cast<size_t>(tokens * matrices * rows), NAN);
          const LinearCall call{tokens,     x.data(),    DType::kF32,     stride, shared ? 0 : cols,
                                out.data(), DType::kF32, matrices * rows, rows};
          linear_forward(weights, call, &pool, *table);
          CHECK_OP(testing::relative_error(out, expected), <,
                   testing::tolerance(format, uses_tiles(*table, format)));
        }
      }
    }
  }
}

}  // namespace

TEST(experts_match_float64) {
  test_experts(96, 80);
  test_experts(131, 33);
}

// Tiles unpack 2048 inputs at a time and keep sums in memory in between.
TEST(experts_with_long_rows_match_float64) {
  ThreadPool pool({0, 1, 2}, false);
  for (const Format format : formats()) {
    const Experts experts(format, 1, 2100, 34);
    for (const int64_t tokens : {1, 18}) {
      const Inputs inputs(experts, tokens, 1, 2100);
      const std::vector<double> expected = inputs.answer(experts);
      for (const KernelTable* table : usable_tables()) {
        CHECK_OP(testing::relative_error(run(experts, inputs, &pool, *table), expected), <,
                 testing::tolerance(format, uses_tiles(*table, format)));
      }
    }
  }
}

TEST(calls_of_many_tokens_run_in_chunks) {
  ThreadPool pool({0, 1, 2}, false);
  const Experts experts(Format::kInt4G32, 2, 33, 24);
  const Inputs inputs(experts, 1100, 2, 33);
  const std::vector<double> expected = inputs.answer(experts);
  for (const KernelTable* table : usable_tables()) {
    CHECK_OP(testing::relative_error(run(experts, inputs, &pool, *table), expected), <, 2e-2);
  }
}

TEST(bf16_activations_in_place) {
  ThreadPool pool({0, 1, 2}, false);
  for (const Format format : formats()) {
    const Experts experts(format, 3, 70, 45);
    Inputs inputs(experts, 19, 2, 70);
    std::vector<uint16_t> narrow;
    for (float& value : inputs.x) {
      narrow.push_back(testing::to_bf16(value));
      value = testing::from_bf16(narrow.back());
    }
    const std::vector<double> expected = inputs.answer(experts);
    for (const KernelTable* table : usable_tables()) {
      std::vector<uint16_t> both = narrow;
      MoeCall call = inputs.call(experts, nullptr);
      call.x = both.data();
      call.out = both.data();
      call.x_dtype = call.out_dtype = DType::kBf16;
      moe_forward(experts.weights, call, &pool, *table);
      std::vector<float> got;
      for (const uint16_t bits : both) got.push_back(testing::from_bf16(bits));
      CHECK_OP(testing::relative_error(got, expected), <, 2e-2);
    }
  }
}

TEST(projections_of_two_formats) {
  ThreadPool pool({0, 1, 2}, false);
  const std::vector<ExpertFormats> mixes = {{Format::kQ4K, Format::kQ6K},
                                            {Format::kInt4G32, Format::kQ8_0},
                                            {Format::kQ5K, Format::kInt8},
                                            {Format::kFp8, Format::kBf16},
                                            {Format::kBf16, Format::kFp32}};
  for (const ExpertFormats formats : mixes) {
    const Experts experts(formats, 2, 300, 45);
    for (const int64_t tokens : {1, 5, 40}) {
      const Inputs inputs(experts, tokens, 2, 300);
      const std::vector<double> expected = inputs.answer(experts);
      for (const KernelTable* table : usable_tables()) {
        CHECK_OP(testing::relative_error(run(experts, inputs, &pool, *table), expected), <,
                 testing::tolerance(formats.gate_up, uses_tiles(*table, formats.gate_up)));
      }
    }
  }
  CHECK_THROWS(std::invalid_argument, "down_format='bf16' does not go with format='q4_k'",
               ExpertWeights(1, 8, 8, {Format::kQ4K, Format::kBf16}));
}

TEST(no_tokens_and_no_experts) {
  ThreadPool pool({0, 1, 2}, false);
  const Experts experts(Format::kInt8, 2, 40, 40);
  for (const KernelTable* table : usable_tables()) {
    moe_forward(experts.weights, {}, &pool, *table);
    Inputs inputs(experts, 3, 2, 40);
    inputs.ids.assign(inputs.ids.size(), -1);
    for (const float value : run(experts, inputs, &pool, *table)) CHECK_OP(value, ==, 0.f);
  }
}

TEST(linear_matches_float64) {
  test_linear(1, 97, 130);
  test_linear(3, 33, 31);
}

// Odd sizes, channels in two groups of 128 (each written by several gate-up tasks), and more rows
// than a chunk of 512 inputs holds.
TEST(int8_arithmetic_on_tiles) {
  ThreadPool three({0, 1, 2}, false), one({0}, false);
  for (const Format format : {Format::kInt4G32, Format::kInt8}) {
    const Experts experts(format, 3, 579, 161, Arithmetic::kInt8);
    const Experts in_bf16(format, 3, 579, 161);
    for (const int64_t tokens : {1, 9, 66, 131}) {
      const Inputs inputs(experts, tokens, 2, 584);
      const std::vector<double> expected = inputs.answer(experts);
      for (const KernelTable* table : usable_tables()) {
        const FormatKernels& kernels = kernels_of(*table, format, Arithmetic::kInt8);
        const std::vector<float> got = run(experts, inputs, &three, *table);
        CHECK_OP(testing::relative_error(got, expected), <, 2.4e-2);
        CHECK(got == run(experts, inputs, &one, *table));
        const bool tiles = kernels.quantize_h != nullptr;
        CHECK(tiles == uses_tiles(*table, format));
        if (!tiles || tokens == 1) CHECK(got == run(in_bf16, inputs, &three, *table));
        if (tiles && tokens > 60) CHECK(got != run(in_bf16, inputs, &three, *table));
      }
    }
    LinearWeights weights(2, 70, 579, format, {kAnyNode}, Arithmetic::kInt8);
    weights.fill_random(5, &three);
    std::vector<float> values(70 * 579);
    weights.dequantize(1, values.data());
    const std::vector<float> x = gaussian(19 * 579, 1.f, 21);
    for (const KernelTable* table : usable_tables()) {
      std::vector<float> out(19 * 2 * 70, NAN);
      linear_forward(weights,
                     {19, x.data(), DType::kF32, 579, 0, out.data(), DType::kF32, 2 * 70, 70},
                     &three, *table);
      for (int64_t t = 0; t < 19; ++t) {
        const std::vector<double> row(x.begin() + t * 579, x.begin() + (t + 1) * 579);
        const std::vector<float> got(out.begin() + (2 * t + 1) * 70,
                                     out.begin() + (2 * t + 2) * 70);
        CHECK_OP(testing::relative_error(got, multiply(values, 70, 579, row.data())), <, 2e-2);
      }
    }
  }
}

// Two engines in one process: threads that share weights and pools.
TEST(concurrent_calls_give_the_same_answers) {
  ThreadPool first({0, 1, 2}, false), second({0, 1}, false);
  const Experts experts(Format::kInt4G32, 3, 96, 80);
  const KernelTable& table = *usable_tables().back();
  const Inputs few(experts, 2, 2, 96), many(experts, 70, 2, 96);
  const std::vector<float> expected_few = run(experts, few, &first, table);
  const std::vector<float> expected_many = run(experts, many, &first, table);
  std::vector<std::thread> callers;
  std::vector<int> wrong(4);
  for (size_t c = 0; c < wrong.size(); ++c) {
    callers.emplace_back([&, c] {
      for (size_t i = 0; i < 6; ++i) {
        ThreadPool* pool = (c + i) % 2 == 0 ? &first : &second;
        wrong[c] += run(experts, few, pool, table) != expected_few;
        wrong[c] += run(experts, many, pool, table) != expected_many;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == std::vector<int>({0, 0, 0, 0}));
}

}  // namespace moejet
