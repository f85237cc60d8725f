#include "../attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "reference.h"

namespace moejet {
namespace {

using testing::gaussian;
using testing::multiply;
using testing::usable_tables;

struct Shape {
  int64_t heads, nope, rope, rank, value, block_size;
};

// W_UK and W_UV with random bf16 values, in the three packed forms.
struct Projections {
  explicit Projections(const Shape& s)
      : w_uk_transposed(s.heads, s.rank, s.nope, Format::kBf16),
        w_uk(s.heads, s.nope, s.rank, Format::kBf16),
        w_uv(s.heads, s.value, s.rank, Format::kBf16) {
    for (int64_t h = 0; h < s.heads; ++h) {
      const float sigma = 1.f / std::sqrt(static_cast<float>(s.rank));
      keys.push_back(gaussian(s.nope * s.rank, sigma, static_cast<uint64_t>(2 * h)));
      values.push_back(gaussian(s.value * s.rank, sigma, static_cast<uint64_t>(2 * h + 1)));
      for (float& w : keys.back()) w = testing::from_bf16(testing::to_bf16(w));
      for (float& w : values.back()) w = testing::from_bf16(testing::to_bf16(w));
      std::vector<float> transposed(keys.back().size());
      for (int64_t n = 0; n < s.nope; ++n) {
        for (int64_t c = 0; c < s.rank; ++c) {
          transposed[static_cast<size_t>(c * s.nope + n)] =
              keys.back()[static_cast<size_t>(n * s.rank + c)];
        }
      }
      set(&w_uk_transposed, h, transposed);
      set(&w_uk, h, keys.back());
      set(&w_uv, h, values.back());
    }
  }
  static void set(LinearWeights* weights, int64_t h, const std::vector<float>& w) {
    const int64_t rows = weights->rows(), cols = weights->cols();
    weights->set(h, {w.data(), DType::kF32, cols, rows, cols}, scalar::table, nullptr);
  }

  LinearWeights w_uk_transposed, w_uk, w_uv;
  std::vector<std::vector<float>> keys, values;
};

// Requests over a paged cache whose blocks are dealt out backwards; one block, which none owns,
// holds NaN.
struct Case {
  Case(const Shape& s, std::vector<int64_t> queries, std::vector<int64_t> contexts)
      : shape(s), query_lens(std::move(queries)), context_lens(std::move(contexts)) {
    for (const int64_t len : query_lens) tokens += len;
    const int64_t longest = *std::max_element(context_lens.begin(), context_lens.end());
    table_width = (longest + s.block_size - 1) / s.block_size;
    const int64_t blocks = static_cast<int64_t>(context_lens.size()) * table_width;
    cache = gaussian((blocks + 1) * s.block_size * (s.rank + s.rope), 1.f, 31);
    for (float& value : cache) value = testing::from_bf16(testing::to_bf16(value));
    std::fill(cache.begin(), cache.begin() + s.block_size * (s.rank + s.rope), NAN);
    for (int64_t i = 0; i < blocks; ++i) tables.push_back(blocks - i);
    for (const float value : cache) narrow_cache.push_back(testing::to_bf16(value));
    const int64_t rows = (blocks + 1) * s.block_size;
    const LatentLayout layout = latent_layout(s.rank, s.rope, 1);
    fp8_cache.resize(static_cast<size_t>(rows * layout.bytes));
    for (int64_t r = 0; r < rows; ++r) {
      LatentRow row{};
      row.c_kv = cache.data() + r * (s.rank + s.rope);
      row.k_pe = row.c_kv + s.rank;
      row.rank = s.rank;
      row.rope_dim = s.rope;
      row.out = fp8_cache.data() + r * layout.bytes;
      row.out_dtype = DType::kFp8;
      scalar::table.ops.store_latent_row(row);
    }
    q = gaussian(tokens * s.heads * (s.nope + s.rope), 1.f, 32);
  }

  const float* latent(int64_t request, int64_t position) const {
    const int64_t block =
        tables[static_cast<size_t>(request * table_width + position / shape.block_size)];
    return cache.data() +
           (block * shape.block_size + position % shape.block_size) * (shape.rank + shape.rope);
  }

  // Softmax over keys rebuilt from the latents, one query and head at a time, in float64.
  std::vector<double> answer(const Projections& projections, float scale) const {
    std::vector<double> out;
    const float* row = q.data();
    for (size_t i = 0; i < query_lens.size(); ++i) {
      for (int64_t j = 0; j < query_lens[i]; ++j) {
        const int64_t visible = context_lens[i] - query_lens[i] + j + 1;
        for (int64_t h = 0; h < shape.heads; ++h, row += shape.nope + shape.rope) {
          const std::vector<double> y = attend(projections, scale, static_cast<int64_t>(i), visible,
                                               static_cast<size_t>(h), row);
          out.insert(out.end(), y.begin(), y.end());
        }
      }
    }
    return out;
  }

  std::vector<double> attend(const Projections& projections, float scale, int64_t request,
                             int64_t visible, size_t head, const float* query) const {
    std::vector<double> scores, mixed(static_cast<size_t>(shape.rank));
    double largest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t p = 0; p < visible; ++p) {
      const float* row = latent(request, p);
      const std::vector<double> wide(row, row + shape.rank);
      const auto key = multiply(projections.keys[head], shape.nope, shape.rank, wide.data());
      double score = 0;
      for (int64_t n = 0; n < shape.nope; ++n) score += key[static_cast<size_t>(n)] * query[n];
      for (int64_t r = 0; r < shape.rope; ++r) {
        score += static_cast<double>(row[shape.rank + r]) * query[shape.nope + r];
      }
      scores.push_back(score * scale);
      largest = std::max(largest, scores.back());
    }
    for (double& score : scores) total += score = std::exp(score - largest);
    for (int64_t p = 0; p < visible; ++p) {
      const float* row = latent(request, p);
      for (size_t c = 0; c < mixed.size(); ++c) {
        mixed[c] += scores[static_cast<size_t>(p)] / total * row[c];
      }
    }
    return multiply(projections.values[head], shape.value, shape.rank, mixed.data());
  }

  std::vector<float> run(const Projections& projections, float scale, AttentionForm form,
                         DType cache_dtype, ThreadPool* pool, const KernelTable& table) const {
    std::vector<float> out(static_cast<size_t>(tokens * shape.heads * shape.value), NAN);
    const AttentionWeights weights{&projections.w_uk_transposed, &projections.w_uk,
                                   &projections.w_uv, shape.rope, scale};
    AttentionCall call{};
    call.num_requests = static_cast<int64_t>(query_lens.size());
    call.query_lens = query_lens.data();
    call.context_lens = context_lens.data();
    call.block_tables = tables.data();
    call.table_width = table_width;
    call.q = q.data();
    call.q_head_stride = shape.nope + shape.rope;
    call.q_stride = shape.heads * call.q_head_stride;
    call.cache = cache_dtype == DType::kF32    ? static_cast<const void*>(cache.data())
                 : cache_dtype == DType::kBf16 ? static_cast<const void*>(narrow_cache.data())
                                               : static_cast<const void*>(fp8_cache.data());
    call.cache_dtype = cache_dtype;
    call.block_size = shape.block_size;
    call.out = out.data();
    call.out_head_stride = shape.value;
    call.out_stride = shape.heads * shape.value;
    call.form = form;
    mla_attention(weights, call, pool, table);
    return out;
  }

  const Shape shape;
  std::vector<int64_t> query_lens, context_lens, tables;
  int64_t tokens = 0, table_width = 0;
  std::vector<float> q, cache;
  std::vector<uint16_t> narrow_cache;
  std::vector<uint8_t> fp8_cache;
};

void test_attention(const Shape& shape, const std::vector<Case>& cases) {
  ThreadPool three({0, 1, 2}, false), one({0}, false);
  const float scale = 1.f / std::sqrt(static_cast<float>(shape.nope + shape.rope));
  const Projections projections(shape);
  for (const Case& c : cases) {
    const std::vector<double> expected = c.answer(projections, scale);
    for (const KernelTable* table : usable_tables()) {
      for (const AttentionForm form :
           {AttentionForm::kAuto, AttentionForm::kAbsorbed, AttentionForm::kExpanded}) {
        for (const DType dtype : {DType::kF32, DType::kBf16, DType::kFp8}) {
          const std::vector<float> got = c.run(projections, scale, form, dtype, &three, *table);
          CHECK_OP(testing::relative_error(got, expected), <, dtype == DType::kFp8 ? 6e-2 : 1e-2);
          CHECK(got == c.run(projections, scale, form, dtype, &one, *table));
        }
      }
    }
  }
}

}  // namespace

TEST(attention_matches_float64) {
  const Shape shape{3, 10, 6, 12, 14, 4};
  test_attention(shape, {Case(shape, {1}, {1}), Case(shape, {1, 3, 1}, {9, 3, 30}),
                         Case(shape, {40, 1}, {41, 17})});
}

// A head count beyond a tile, and a context that is split among workers.
TEST(attention_over_a_long_context_matches_float64) {
  const Shape shape{17, 16, 8, 33, 15, 16};
  test_attention(shape, {Case(shape, {1, 2}, {400, 90})});
}

}  // namespace moejet
