// Memory nodes (NUMA): how weights and work are divided among them.
//
// Output channels are cut into one contiguous slice per node, whose weights lie in that node's
// memory. A worker computes its own node's slice first and then helps with the others', so that a
// node with fewer or busier CPUs costs remote reads at the end of a phase, not a wait. No result
// depends on the division. With one node there is one slice and one queue.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace moejet {

// Instead of a node's number in the system: memory wherever the system puts it.
constexpr int kAnyNode = -1;

// [0, count) as num_nodes contiguous parts of nearly equal size, cut at multiples of `granule`,
// which divides count. Parts may be empty, the last one is not (unless count is 0).
class Slices {
 public:
  Slices() = default;
  Slices(int64_t count, int num_nodes, int64_t granule = 1)
      : grains_(count / granule), num_nodes_(num_nodes), granule_(granule) {}

  int num_nodes() const { return num_nodes_; }
  int64_t begin(int node) const { return grains_ * node / num_nodes_ * granule_; }
  int64_t end(int node) const { return begin(node + 1); }
  int64_t size(int node) const { return end(node) - begin(node); }
  // The node whose part index lies in: the largest one that begins at or before its grain.
  int node_of(int64_t index) const {
    return static_cast<int>(((index / granule_ + 1) * num_nodes_ - 1) / grains_);
  }

 private:
  int64_t grains_ = 0;
  int num_nodes_ = 1;
  int64_t granule_ = 1;
};

// The items of a phase, handed out one at a time.
class NodeItems {
 public:
  explicit NodeItems(int num_nodes) : queues_(static_cast<size_t>(num_nodes)) {}

  // Before a phase: items 0 .. count - 1 of this node.
  void set(int node, int64_t count) {
    queues_[static_cast<size_t>(node)].count = count;
    queues_[static_cast<size_t>(node)].next.store(0, std::memory_order_relaxed);
  }
  // The same for a phase whose items belong to no node.
  void set_all(int64_t count) {
    set(0, count);
    for (int node = 1; node < static_cast<int>(queues_.size()); ++node) set(node, 0);
  }

  // During a phase, by every worker: body(node, item) until none is left. Items of own_node first
  // (of the first node, if the pool has more nodes than the weights).
  template <class Body>
  void drain(int own_node, const Body& body) {
    const int num_nodes = static_cast<int>(queues_.size());
    int node = own_node < num_nodes ? own_node : 0;
    for (int visited = 0; visited < num_nodes; ++visited) {
      Queue& queue = queues_[static_cast<size_t>(node)];
      for (int64_t item;
           (item = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.count;) {
        body(node, item);
      }
      if (++node == num_nodes) node = 0;
    }
  }

 private:
  struct alignas(64) Queue {  // a cache line each: nodes do not disturb each other
    std::atomic<int64_t> next{0};
    int64_t count = 0;
  };
  std::vector<Queue> queues_;
};

}  // namespace moejet
