#include "../program.h"

#include <thread>
#include <vector>

#include "check.h"
#include "reference.h"

namespace moejet {
namespace {

using testing::gaussian;
using testing::usable_tables;

constexpr int64_t kVocab = 50, kHidden = 70, kInter = 33, kExperts = 5, kTopK = 2, kMaxTokens = 80;

// A model without attention: embedding, norm, experts beside a dense projection, norm, lm_head.
struct Model {
  Model()
      : embedding(gaussian(kVocab * kHidden, 1.f, 1)),
        norm_weight(static_cast<size_t>(kHidden), 1.5f),
        router_weight(gaussian(kExperts * kHidden, 0.2f, 2)),
        experts(kExperts, kHidden, kInter, Format::kInt4G32),
        dense(1, kHidden, kHidden, Format::kInt8),
        head(1, kVocab, kHidden, Format::kBf16) {
    experts.fill_random(3, nullptr);
    dense.fill_random(4, nullptr);
    head.fill_random(5, nullptr);
  }
  std::vector<float> embedding, norm_weight, router_weight;
  ExpertWeights experts;
  LinearWeights dense, head;
};

// The program and the buffers that it is bound to.
struct Recording {
  Recording(const Model& model, ThreadPool* pool, const KernelTable& table)
      : program(pool, table),
        h(kMaxTokens * kHidden),
        x(kMaxTokens * kHidden),
        routed(kMaxTokens * kHidden),
        projected(kMaxTokens * kHidden),
        router_logits(kMaxTokens * kExperts),
        ids(kMaxTokens * kTopK),
        mix(kMaxTokens * kTopK) {
    const RmsNorm norm{model.norm_weight.data(), kHidden, 1e-6f};
    const auto rows = [](std::vector<float>* of) { return Rows{of->data(), kHidden, kHidden}; };
    program.embed({model.embedding.data(), DType::kF32, kVocab, kHidden, kHidden}, rows(&h));
    program.rms_norm(rows(&h), {}, norm, rows(&x), false);
    RouterMatrix matrix{};
    matrix.weight = model.router_weight.data();
    matrix.weight_dtype = DType::kF32;
    matrix.weight_stride = matrix.hidden_size = matrix.x_stride = kHidden;
    matrix.x = x.data();
    matrix.logits = router_logits.data();
    matrix.logits_stride = kExperts;
    RouterChoice choice{};
    choice.num_experts = kExperts;
    choice.top_k = kTopK;
    choice.num_groups = choice.top_groups = 1;
    choice.scaling_factor = 1.f;
    program.router(matrix, choice, ids.data(), mix.data());
    program.experts({{&model.experts, kTopK, ids.data(), mix.data(), rows(&x), rows(&routed)}});
    program.linear({{&model.dense, nullptr, rows(&x), rows(&projected)}});
    program.rms_norm(rows(&h), {rows(&routed), rows(&projected)}, norm, rows(&x), true);
    program.lm_head(model.head, rows(&x));
  }

  // Logits of the last token of a step.
  std::vector<float> step(int64_t num_tokens) {
    std::vector<int64_t> tokens;
    for (int64_t t = 0; t < num_tokens; ++t) tokens.push_back(t * 7 % kVocab);
    const int64_t last = num_tokens - 1;
    Step step{};
    step.num_tokens = num_tokens;
    step.token_ids = tokens.data();
    step.num_logits = 1;
    step.logits_indices = &last;
    std::vector<float> logits(static_cast<size_t>(kVocab), NAN);
    program.run(step, logits.data());
    return logits;
  }

  Program program;
  std::vector<float> h, x, routed, projected, router_logits;
  std::vector<int32_t> ids;
  std::vector<float> mix;
};

}  // namespace

TEST(recorded_programs_share_a_pool_and_do_not_depend_on_threads) {
  const Model model;
  ThreadPool three({0, 1, 2}, false), one({0}, false);
  for (const KernelTable* table : usable_tables()) {
    Recording alone(model, &one, *table);
    std::vector<std::vector<float>> expected;
    for (const int64_t tokens : {int64_t{1}, int64_t{2}, kMaxTokens}) {
      expected.push_back(alone.step(tokens));
      for (const float logit : expected.back()) CHECK(std::isfinite(logit));
    }
    CHECK(expected[0] != expected[1]);
    std::vector<std::thread> callers;
    std::vector<int> wrong(2);
    for (int& errors : wrong) {
      callers.emplace_back([&, mine = &errors] {
        Recording recording(model, &three, *table);
        for (int i = 0; i < 6; ++i) {
          const size_t which = static_cast<size_t>(i % 3);
          *mine += recording.step(which == 2 ? kMaxTokens : i % 3 + 1) != expected[which];
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK(wrong == std::vector<int>({0, 0}));
  }
}

}  // namespace moejet
