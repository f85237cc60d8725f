// The bridge's protocol with a thread as the stream. Buffers are plain memory: only the flags order
// what the stream and the CPU do with them, which ThreadSanitizer checks.
#include <atomic>
#include <chrono>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "../expert_bridge.h"
#include "check.h"
#include "reference.h"

namespace moejet {
namespace {

using testing::gaussian;

constexpr int64_t kHidden = 64, kInter = 40, kExperts = 4, kTopK = 2, kMaxTokens = 6;
constexpr int kLayers = 3;

struct Setup {
  explicit Setup(ThreadPool* pool)
      : pool(pool),
        x(kMaxTokens * kHidden),
        out(kMaxTokens * kHidden),
        mix(kMaxTokens * kTopK),
        ids(kMaxTokens * kTopK),
        flag_memory(static_cast<size_t>(num_flags(kLayers) + 1) * kFlagStride) {
    std::vector<const ExpertWeights*> layers;
    for (int layer = 0; layer < kLayers; ++layer) {
      weights.push_back(
          std::make_unique<ExpertWeights>(kExperts, kHidden, kInter, Format::kInt4G32));
      weights.back()->fill_random(static_cast<uint64_t>(layer), nullptr);
      layers.push_back(weights.back().get());
    }
    uint32_t* flags = flag_memory.data();
    while (reinterpret_cast<uintptr_t>(flags) % 64 != 0) ++flags;
    const BridgeBuffers buffers{kMaxTokens, kHidden,    kTopK,      x.data(),    DType::kF32,
                                ids.data(), mix.data(), out.data(), DType::kF32, flags};
    bridge = std::make_unique<ExpertBridge>(pool, layers, table, buffers);
  }

  // What the experts of a layer make of `input`, without the bridge.
  std::vector<float> direct(int layer, const std::vector<float>& input,
                            const std::vector<int32_t>& topk_ids,
                            const std::vector<float>& topk_weights) const {
    std::vector<float> result(input.size());
    MoeCall call{};
    call.num_tokens = static_cast<int64_t>(input.size()) / kHidden;
    call.top_k = kTopK;
    call.x = input.data();
    call.topk_ids = topk_ids.data();
    call.topk_weights = topk_weights.data();
    call.out = result.data();
    call.x_stride = call.out_stride = kHidden;
    moe_forward(*weights[static_cast<size_t>(layer)], call, pool, table);
    return result;
  }

  const KernelTable& table = *kernel_table(resolve_isa("auto", ""));
  ThreadPool* pool;
  std::vector<std::unique_ptr<ExpertWeights>> weights;
  std::vector<float> x, out, mix;
  std::vector<int32_t> ids;
  std::vector<uint32_t> flag_memory;
  std::unique_ptr<ExpertBridge> bridge;
};

// One step of a stream: every layer on the result of the one before.
struct StreamStep {
  std::vector<float> x, mix;
  std::vector<int32_t> ids;

  StreamStep(int64_t num_tokens, unsigned seed) : x(gaussian(num_tokens * kHidden, 1.f, seed)) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < num_tokens * kTopK; ++i) {
      ids.push_back(i % kTopK == 0 ? static_cast<int32_t>(random() % kExperts) : -1);
      mix.push_back(0.5f + static_cast<float>(random() % 100) * 0.01f);
    }
  }

  int64_t num_tokens() const { return static_cast<int64_t>(ids.size()) / kTopK; }

  std::vector<float> run(Setup* setup, const std::function<void()>& pause) const {
    std::vector<float> value = x;
    for (int layer = 0; layer < kLayers; ++layer) {
      std::copy(value.begin(), value.end(), setup->x.begin());
      std::copy(ids.begin(), ids.end(), setup->ids.begin());
      std::copy(mix.begin(), mix.end(), setup->mix.begin());
      pause();
      setup->bridge->submit(layer);
      pause();
      setup->bridge->wait(layer);
      pause();
      std::copy_n(setup->out.begin(), value.size(), value.begin());
    }
    return value;
  }

  std::vector<float> direct(const Setup& setup) const {
    std::vector<float> value = x;
    for (int layer = 0; layer < kLayers; ++layer) value = setup.direct(layer, value, ids, mix);
    return value;
  }
};

const std::vector<int> kAll = {0, 1, 2};

void nothing() {}

StreamState busy() { return StreamState::kBusy; }

}  // namespace

TEST(bridge_replays_with_random_delays_equal_the_kernels) {
  for (const int workers : {1, 3}) {
    std::vector<int> cpus;
    for (int i = 0; i < workers; ++i) cpus.push_back(i);
    ThreadPool pool(cpus, false);
    Setup setup(&pool);
    std::vector<StreamStep> steps;
    std::vector<std::vector<float>> expected;
    for (unsigned seed = 0; seed < 5; ++seed) {
      steps.emplace_back(1 + seed, seed);
      expected.push_back(steps.back().direct(setup));
    }
    constexpr int kReplays = 400;
    int wrong = 0;
    std::thread stream([&] {
      std::mt19937 random(1);
      const auto pause = [&] {
        if (random() % 8 == 0) {
          std::this_thread::sleep_for(std::chrono::microseconds(random() % 30));
        }
      };
      for (int i = 0; i < kReplays; ++i) {
        const size_t which = static_cast<size_t>(i) % steps.size();
        wrong += steps[which].run(&setup, pause) != expected[which];
      }
    });
    std::mt19937 random(2);
    for (int i = 0; i < kReplays; ++i) {
      const size_t which = static_cast<size_t>(i) % steps.size();
      if (random() % 8 == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 100));
      }
      setup.bridge->run_step(steps[which].num_tokens(), kAll, 30.0, busy);
    }
    stream.join();
    CHECK_OP(wrong, ==, 0);
    const BridgeCounters counters = setup.bridge->counters();
    CHECK_OP(counters.steps, ==, kReplays);
    CHECK_OP(counters.layers, ==, kReplays * kLayers);
  }
}

TEST(bridge_lets_the_stream_through_when_a_worker_fails) {
  ThreadPool pool({0, 1, 2}, false);
  Setup setup(&pool);
  const StreamStep step(4, 9);
  const std::vector<float> expected = step.direct(setup);
  for (int round = 0; round < 30; ++round) {
    std::vector<float> got;
    std::atomic<bool> done{false};
    std::thread stream([&] {
      got = step.run(&setup, nothing);
      done = true;
    });
    const auto query = [&] { return done ? StreamState::kIdle : StreamState::kBusy; };
    const bool fails = round % 2 == 0;
    if (fails) {
      setup.bridge->fail_once(round % kLayers, round / 2 % 3);
      CHECK_THROWS(std::runtime_error, "failed as asked",
                   setup.bridge->run_step(4, kAll, 30.0, query));
      CHECK_THROWS(std::runtime_error, "call reset() first",
                   setup.bridge->run_step(4, kAll, 30.0, query));
      setup.bridge->reset(30.0, query);
    } else {
      setup.bridge->run_step(4, kAll, 30.0, query);
    }
    stream.join();
    CHECK(fails ? std::isnan(got[0]) : got == expected);
  }
}

TEST(bridge_gives_up_on_streams_that_do_not_submit) {
  ThreadPool pool({0, 1}, false);
  Setup setup(&pool);
  CHECK_THROWS(std::runtime_error, "layer 0: waiting for the GPU",
               setup.bridge->run_step(1, kAll, 0.02, busy));
  CHECK_THROWS(std::runtime_error, "still busy after 0.02 s", setup.bridge->reset(0.02, busy));
  setup.bridge->reset(1.0, {});
  CHECK_THROWS(std::runtime_error, "run out of work",
               setup.bridge->run_step(1, kAll, 30.0, [] { return StreamState::kIdle; }));
  setup.bridge->reset(1.0, {});
  const StreamStep step(2, 3);
  std::thread stream([&] { step.run(&setup, nothing); });
  setup.bridge->run_step(2, kAll, 30.0, {});
  stream.join();
}

TEST(bridge_answers_late_submissions_with_nan) {
  ThreadPool pool({0, 1}, false);
  Setup setup(&pool);
  const StreamStep step(2, 3);
  for (int round = 0; round < 10; ++round) {
    std::thread first([&] { step.run(&setup, nothing); });
    setup.bridge->run_step(2, kAll, 30.0, {});
    first.join();
    CHECK_THROWS(std::runtime_error, "nothing came", setup.bridge->run_step(2, kAll, 0.01, busy));
    std::vector<float> got;
    std::atomic<bool> done{false};
    std::thread late([&] {
      got = step.run(&setup, nothing);
      done = true;
    });
    setup.bridge->reset(30.0, [&] { return done ? StreamState::kIdle : StreamState::kBusy; });
    late.join();
    for (const float value : got) CHECK(std::isnan(value));
  }
}

}  // namespace moejet
