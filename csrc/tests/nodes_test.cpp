#include "../nodes.h"

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
using testing::usable_tables;

// More nodes than an expert of 45 channels has units, and nodes without workers.
const std::vector<std::vector<int>> kDivisions = {
    {kAnyNode, kAnyNode}, {kAnyNode, kAnyNode, kAnyNode}, {-1, -1, -1, -1, -1}};

struct Layer {
  Layer(Format format, const std::vector<int>& nodes, ThreadPool* pool)
      : experts(3, 200, 45, format, nodes), dense(2, 150, 70, format, nodes) {
    const KernelTable& table = *usable_tables().back();
    experts.fill_random(9, pool);
    dense.fill_random(4, pool);
    if (is_gguf(format)) return;
    for (int64_t e = 0; e < 2; ++e) {  // the third one stays random
      for (const Projection p : {Projection::kGate, Projection::kUp, Projection::kDown}) {
        const int64_t rows = experts.rows(p), cols = experts.cols(p);
        const std::vector<float> w = gaussian(rows * cols, 0.1f, static_cast<uint64_t>(e));
        experts.set_projection(e, p, {w.data(), DType::kF32, cols, rows, cols}, table, pool);
      }
    }
    const std::vector<float> w = gaussian(150 * 70, 0.1f, 8);
    dense.set(1, {w.data(), DType::kF32, 70, 150, 70}, table, pool);
  }

  // Everything that the layer can say about itself, for one set of inputs.
  std::vector<float> answers(ThreadPool* pool, const KernelTable& table) const {
    std::vector<float> all;
    for (const int64_t tokens : {1, 35}) {
      const std::vector<float> x = gaussian(tokens * 200, 1.f, 5), mix(tokens * 2, 0.5f);
      std::vector<int32_t> ids;
      for (int64_t i = 0; i < 2 * tokens; ++i) ids.push_back(static_cast<int32_t>(i * i % 3));
      std::vector<float> out(static_cast<size_t>(tokens * 200)), wide(tokens * 300);
      moe_forward(experts,
                  {tokens, 2, x.data(), DType::kF32, 200, ids.data(), mix.data(), out.data(),
                   DType::kF32, 200},
                  pool, table);
      linear_forward(dense,
                     {tokens, x.data(), DType::kF32, 200, 0, wide.data(), DType::kF32, 300, 150},
                     pool, table);
      all.insert(all.end(), out.begin(), out.end());
      all.insert(all.end(), wide.begin(), wide.end());
    }
    return all;
  }

  std::vector<float> values() const {
    std::vector<float> all(9 * 200 * 45 + 2 * 150 * 70);
    float* next = all.data();
    for (int64_t e = 0; e < 3; ++e) {
      for (const Projection p : {Projection::kGate, Projection::kUp, Projection::kDown}) {
        experts.dequantize(e, p, next);
        next += 200 * 45;
      }
    }
    for (int64_t g = 0; g < 2; ++g) dense.dequantize(g, next + g * 150 * 70);
    return all;
  }

  ExpertWeights experts;
  LinearWeights dense;
};

}  // namespace

TEST(slices_are_a_partition) {
  for (const int64_t granule : {1, 2, 6}) {
    for (int64_t grains = 1; grains < 40; ++grains) {
      for (int nodes = 1; nodes < 9; ++nodes) {
        const Slices slices(grains * granule, nodes, granule);
        int64_t next = 0;
        for (int node = 0; node < nodes; ++node) {
          CHECK_OP(slices.begin(node), ==, next);
          CHECK_OP(slices.begin(node) % granule, ==, 0);
          CHECK(slices.size(node) / granule >= grains / nodes);
          CHECK(slices.size(node) / granule <= grains / nodes + 1);
          for (; next < slices.end(node); ++next) CHECK_OP(slices.node_of(next), ==, node);
        }
        CHECK_OP(next, ==, grains * granule);
        CHECK(slices.size(nodes - 1) > 0);
      }
    }
  }
}

TEST(every_item_is_taken_once_and_own_ones_first) {
  for (const int num_nodes : {1, 2, 3}) {
    NodeItems items(num_nodes);
    for (const int64_t count : {0, 1, 50}) {
      std::vector<std::vector<int>> taken(static_cast<size_t>(num_nodes));
      for (int node = 0; node < num_nodes; ++node) {
        taken[static_cast<size_t>(node)].resize(static_cast<size_t>(count + node));
        items.set(node, count + node);
      }
      std::vector<std::thread> workers;
      for (int own = 0; own < 4; ++own) {  // one worker's node is unknown to the items
        workers.emplace_back([&, own] {
          items.drain(own, [&](int node, int64_t i) {
            ++taken[static_cast<size_t>(node)][static_cast<size_t>(i)];
          });
        });
      }
      for (std::thread& worker : workers) worker.join();
      for (const auto& of_node : taken) {
        for (const int times : of_node) CHECK_OP(times, ==, 1);
      }
      items.set_all(3);
      std::vector<int> order;
      items.drain(num_nodes - 1, [&](int node, int64_t) { order.push_back(node); });
      CHECK(order == std::vector<int>({0, 0, 0}));
      for (int node = 0; node < num_nodes; ++node) items.set(node, 1);
      order.clear();
      items.drain(num_nodes - 1, [&](int node, int64_t) { order.push_back(node); });
      CHECK_OP(order[0], ==, num_nodes - 1);
      CHECK_OP(static_cast<int>(order.size()), ==, num_nodes);
    }
  }
}

TEST(workers_know_their_node) {
  ThreadPool pool({0, 1, 2}, false, {1, 0, 1}, {kAnyNode, kAnyNode});
  CHECK_OP(ThreadPool::current_node(), ==, 0);
  std::vector<int> nodes(3);
  for (int i = 0; i < 3; ++i) {
    pool.acquire().run(1, [&](int, int worker) {
      nodes[static_cast<size_t>(worker)] = ThreadPool::current_node();
    });
    CHECK(nodes == std::vector<int>({1, 0, 1}));
    CHECK_OP(ThreadPool::current_node(), ==, 0);
  }
  CHECK_THROWS(std::invalid_argument, "2 entries for 1 cpus", ThreadPool({0}, false, {0, 0}));
  CHECK_THROWS(std::invalid_argument, "no index of the 1", ThreadPool({0}, false, {1}));
  CHECK_THROWS(std::invalid_argument, "memory_nodes is empty", ThreadPool({0}, false, {}, {}));
  CHECK_THROWS(std::invalid_argument, "-2 is no node", ThreadPool({0}, false, {}, {-2}));
}

TEST(divided_weights_give_the_same_bits) {
  ThreadPool one({0, 1, 2}, false), two({0, 1, 2}, false, {0, 1, 1}, {kAnyNode, kAnyNode});
  for (const Format format : formats()) {
    const Layer whole(format, {kAnyNode}, &one);
    const std::vector<float> values = whole.values();
    const uint64_t checksum = whole.experts.checksum(nullptr);
    std::vector<std::vector<float>> expected;
    for (const KernelTable* table : usable_tables()) {
      expected.push_back(whole.answers(&one, *table));
      CHECK(whole.answers(&two, *table) == expected.back());
    }
    for (const std::vector<int>& nodes : kDivisions) {
      const Layer divided(format, nodes, &two);
      CHECK_OP(divided.experts.num_nodes(), ==, static_cast<int>(nodes.size()));
      CHECK(divided.values() == values);
      CHECK_OP(divided.experts.checksum(&two), ==, checksum);
      for (size_t i = 0; i < expected.size(); ++i) {
        const KernelTable& table = *usable_tables()[i];
        CHECK(divided.answers(nodes.size() == 2 ? &two : &one, table) == expected[i]);
      }
    }
  }
}

// Node 0 exists everywhere, node 1000 nowhere: placing fails and changes no result. Where the
// system forbids mbind, both fail.
TEST(memory_is_placed_or_the_reason_is_kept) {
  ThreadPool pool({0, 1, 2}, false, {0, 1, 1}, {0, 0});
  const KernelTable& table = *usable_tables().back();
  const Layer anywhere(Format::kInt8, {kAnyNode}, &pool);
  const Layer placed(Format::kInt8, {0, 0}, &pool);
  const Layer refused(Format::kInt8, {0, 1000}, &pool);
  CHECK(anywhere.experts.bind_error().empty());
  CHECK(anywhere.dense.bind_error().empty());
  CHECK(refused.experts.bind_error().find("failed") != std::string::npos);
  CHECK(refused.dense.bind_error().find("failed") != std::string::npos);
  const std::vector<float> expected = anywhere.answers(&pool, table);
  CHECK(placed.answers(&pool, table) == expected);
  CHECK(refused.answers(&pool, table) == expected);
}

}  // namespace moejet
