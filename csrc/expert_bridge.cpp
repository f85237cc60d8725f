#include "expert_bridge.h"

#include <sched.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

#include "cpu_relax.h"

namespace moejet {
namespace {

using Clock = std::chrono::steady_clock;

// A wait for the stream first spins; other threads may need the CPU, so it then yields, with the
// pool's workers still awake: attention over a long context takes about so long. After that all
// sleep in short naps, which cost the step little against what it has waited already.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr auto kAwake = std::chrono::milliseconds(2);
constexpr auto kNap = std::chrono::microseconds(50);
constexpr auto kQueryInterval = std::chrono::milliseconds(5);
// How long a failed step's remaining layers are answered one by one. The GPU alone needs less.
constexpr double kAbandonSeconds = 2.0;
// Of one multiplication and addition at the slowest: scalar kernels take less, on one core.
constexpr double kMultiplicationSeconds = 2e-9;

uint32_t load(const uint32_t* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
void store(uint32_t* flag, uint32_t value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", seconds);
  return text;
}

std::string current_message() {
  try {
    throw;
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "unknown error";
  }
}

bool has_failed(const StreamQuery& query) {
  if (!query) return false;
  try {
    query();
  } catch (...) {
    return true;
  }
  return false;
}

class FailingTask final : public Task {
 public:
  FailingTask(int worker, double after_s) : worker_(worker), after_s_(after_s) {}
  bool next() override { return ++phase_ == 1; }
  void work(int worker) override {
    if (worker == worker_) {
      std::this_thread::sleep_for(std::chrono::duration<double>(after_s_));
      throw std::runtime_error("worker " + std::to_string(worker) + " failed as asked");
    }
  }

 private:
  const int worker_;
  const double after_s_;
  int phase_ = 0;
};

}  // namespace

ExpertBridge::ExpertBridge(ThreadPool* pool, const std::vector<const ExpertWeights*>& layers,
                           const KernelTable& table, const BridgeBuffers& buffers,
                           double worker_timeout_s)
    : pool_(pool), buffers_(buffers), worker_timeout_s_(worker_timeout_s), pid_(getpid()) {
  if (layers.empty()) throw std::invalid_argument("layers is empty: name at least one");
  if (reinterpret_cast<uintptr_t>(buffers.flags) % 64 != 0) {
    throw std::invalid_argument("flags must begin on a 64-byte boundary");
  }
  ThreadPool::Lease lease = pool->acquire();
  for (const ExpertWeights* weights : layers) {
    if (weights->hidden_size() != buffers.hidden_size) {
      throw std::invalid_argument("layers[" + std::to_string(layers_.size()) +
                                  "] has hidden size " + std::to_string(weights->hidden_size()) +
                                  ", x has " + std::to_string(buffers.hidden_size));
    }
    layers_.push_back(
        {weights,
         std::make_unique<MoeTask>(*weights, table, &lease.workspace(), lease.num_threads()),
         std::vector<int64_t>(static_cast<size_t>(weights->num_experts())), nullptr});
  }
  counters_.layer_s.resize(layers_.size());
  std::memset(buffers.flags, 0,
              static_cast<size_t>(num_flags(num_layers())) * kFlagStride * sizeof(uint32_t));
}

void ExpertBridge::check_layer(int layer) const {
  if (layer >= 0 && layer < num_layers()) return;
  throw std::invalid_argument("layer=" + std::to_string(layer) + " must be between 0 and " +
                              std::to_string(num_layers() - 1));
}

void ExpertBridge::check_process() const {
  if (getpid() == pid_) return;
  throw std::runtime_error(
      "this ExpertBridge belongs to the parent process: load the model after the fork, or start "
      "the process with 'spawn'");
}

std::unique_lock<std::mutex> ExpertBridge::only_caller() {
  std::unique_lock<std::mutex> lock(caller_mutex_, std::try_to_lock);
  if (!lock) throw std::runtime_error("another thread is serving this ExpertBridge");
  return lock;
}

void ExpertBridge::run_step(int64_t num_tokens, const std::vector<int>& layers, double timeout_s,
                            const StreamQuery& query) {
  check_process();
  for (const int layer : layers) check_layer(layer);
  if (num_tokens < 1 || num_tokens > buffers_.max_tokens) {
    throw std::invalid_argument("num_tokens=" + std::to_string(num_tokens) +
                                " must be between 1 and " + std::to_string(buffers_.max_tokens));
  }
  const std::unique_lock<std::mutex> lock = only_caller();
  if (!failure_.empty()) {
    throw std::runtime_error("an earlier step failed (" + failure_ + "): call reset() first");
  }
  size_t position = 0;
  bool was_submitted = false;
  wake_workers(layers);
  try {
    for (; position < layers.size(); ++position) {
      was_submitted = false;
      await_submission(layers[position], timeout_s, query);
      was_submitted = true;
      serve(layers[position], num_tokens);
    }
  } catch (...) {
    failure_ = current_message();
    abandon(layers, position, was_submitted, query);
    throw;
  }
}

// If the stream still has work before its first submission.
void ExpertBridge::wake_workers(const std::vector<int>& layers) {
  if (layers.empty() || load(submitted_flag(layers[0])) == 1) return;
  try {
    pool_->acquire().run(0, [](int, int) {}, worker_timeout_s_);
  } catch (const std::exception&) {  // a closed pool, or a missing worker, which the first layer
                                     // with work reports
  }
}

// Clears the flag and returns true if the stream sets it within a few looks.
bool ExpertBridge::take_submission(int layer) {
  uint32_t* const submitted = submitted_flag(layer);
  for (int i = 0; i < 64; ++i) {
    if (load(submitted) == 1) {
      store(submitted, 0);
      return true;
    }
    cpu_relax();
  }
  return false;
}

void ExpertBridge::await_submission(int layer, double timeout_s, const StreamQuery& query) {
  const Clock::time_point start = Clock::now();
  bool taken = false;
  {
    const ThreadPool::KeepAwake awake(pool_);
    while (!(taken = take_submission(layer)) && Clock::now() - start < kAwake) {
      if (Clock::now() - start >= kSpin) sched_yield();
    }
  }
  if (!taken) {
    try {
      await_slow_submission(layer, timeout_s, query);
    } catch (const std::exception& error) {
      throw std::runtime_error("layer " + std::to_string(layer) +
                               ": waiting for the GPU to submit its tokens: " + error.what());
    }
  }
  const std::lock_guard<std::mutex> counting(counters_mutex_);
  counters_.wait_s += seconds_since(start);
}

void ExpertBridge::await_slow_submission(int layer, double timeout_s, const StreamQuery& query) {
  const Clock::time_point start = Clock::now();
  Clock::time_point next_query = start;
  while (!take_submission(layer)) {
    const Clock::time_point now = Clock::now();
    if (now - start >= std::chrono::duration<double>(timeout_s)) {
      throw std::runtime_error("nothing came for " + seconds_text(timeout_s));
    }
    if (query && now >= next_query) {
      next_query = now + kQueryInterval;
      if (query() == StreamState::kIdle) {
        // What was submitted before the stream became idle can be seen now.
        if (take_submission(layer)) return;
        throw std::runtime_error(
            "the stream has run out of work: launch the step before run_step()");
      }
    }
    std::this_thread::sleep_for(kNap);
  }
}

void ExpertBridge::serve(int layer, int64_t num_tokens) {
  const Clock::time_point start = Clock::now();
  Layer& served = layers_[static_cast<size_t>(layer)];
  int64_t distinct = 0;
  try {
    if (computes_) distinct = count_experts(layer, num_tokens);
    if (distinct > 0 || served.is_failing) {
      compute(&served, num_tokens);
    } else {
      std::memset(
          buffers_.out, 0,
          static_cast<size_t>(num_tokens * buffers_.hidden_size * dtype_bytes(buffers_.out_dtype)));
    }
  } catch (const std::exception& error) {
    throw std::runtime_error("layer " + std::to_string(layer) + ": " + error.what());
  }
  store(finished_flag(layer), 1);
  if (!computes_) return;
  const std::lock_guard<std::mutex> counting(counters_mutex_);
  ++counters_.layers;
  counters_.steps += layer == num_layers() - 1;
  counters_.layer_s[static_cast<size_t>(layer)] += seconds_since(start);
  counters_.distinct_experts += distinct;
  counters_.weight_bytes += distinct * served.weights->expert_bytes();
}

// Ids come from the GPU, so this is where they are checked.
int64_t ExpertBridge::count_experts(int layer, int64_t num_tokens) {
  Layer& counted = layers_[static_cast<size_t>(layer)];
  const int64_t num_experts = counted.weights->num_experts();
  const int64_t call = ++num_calls_;
  int64_t distinct = 0;
  for (int64_t i = 0; i < num_tokens * buffers_.top_k; ++i) {
    const int64_t expert = buffers_.topk_ids[i];
    if (expert == -1) continue;
    if (expert < -1 || expert >= num_experts) {
      throw std::runtime_error("topk_ids[" + std::to_string(i / buffers_.top_k) + ", " +
                               std::to_string(i % buffers_.top_k) + "]=" + std::to_string(expert) +
                               " must be -1 (skip) or an expert from 0 to " +
                               std::to_string(num_experts - 1));
    }
    int64_t& last_use = counted.last_use[static_cast<size_t>(expert)];
    distinct += last_use != call;
    last_use = call;
  }
  return distinct;
}

void ExpertBridge::compute(Layer* layer, int64_t num_tokens) {
  ThreadPool::Lease lease = pool_->acquire();
  const double limit = limit_seconds(*layer, num_tokens);
  if (std::exchange(layer->is_failing, false)) lease.run(layer->failing.get(), limit);
  MoeCall call{};
  call.num_tokens = num_tokens;
  call.top_k = buffers_.top_k;
  call.x = buffers_.x;
  call.x_dtype = buffers_.x_dtype;
  call.topk_ids = buffers_.topk_ids;
  call.topk_weights = buffers_.topk_weights;
  call.out = buffers_.out;
  call.out_dtype = buffers_.out_dtype;
  call.x_stride = call.out_stride = buffers_.hidden_size;
  layer->task->begin(call);
  lease.run(layer->task.get(), limit);
}

double ExpertBridge::limit_seconds(const Layer& layer, int64_t num_tokens) const {
  const double expert = 3.0 * static_cast<double>(layer.weights->hidden_size()) *
                        static_cast<double>(layer.weights->intermediate_size());
  return worker_timeout_s_ +
         kMultiplicationSeconds * expert * static_cast<double>(num_tokens * buffers_.top_k);
}

// Answers layers[position] and those after it without computing, or, once the stream does not
// submit any more, lets it through all of them: out holds no numbers then that it could take away.
void ExpertBridge::abandon(const std::vector<int>& layers, size_t position, bool was_submitted,
                           const StreamQuery& query) {
  // Before its first submission, the stream may still be copying the result of the step before.
  if (!was_submitted && position == 0 && !has_failed(query)) return;
  spoil();
  if (was_submitted) {
    const Clock::time_point start = Clock::now();
    try {
      store(finished_flag(layers[position]), 1);
      while (++position < layers.size()) {
        await_submission(layers[position], kAbandonSeconds - seconds_since(start), query);
        store(finished_flag(layers[position]), 1);
      }
    } catch (...) {  // the first failure is the one to report
    }
  }
  for (; position < layers.size(); ++position) store(finished_flag(layers[position]), 1);
}

// All rows: the step on the stream may have more than run_step was told. All bits set is a NaN in
// fp32 and in bf16.
void ExpertBridge::spoil() {
  std::memset(buffers_.out, 0xff,
              static_cast<size_t>(buffers_.max_tokens * buffers_.hidden_size *
                                  dtype_bytes(buffers_.out_dtype)));
}

bool ExpertBridge::answer_all() {
  bool any = false;
  for (int layer = 0; layer < num_layers(); ++layer) {
    if (load(submitted_flag(layer)) == 0) continue;
    spoil();
    store(submitted_flag(layer), 0);
    store(finished_flag(layer), 1);
    any = true;
  }
  return any;
}

void ExpertBridge::reset(double timeout_s, const StreamQuery& query) {
  check_process();
  const std::unique_lock<std::mutex> lock = only_caller();
  if (query) {
    const Clock::time_point start = Clock::now();
    while (query() != StreamState::kIdle) {
      if (seconds_since(start) > timeout_s) {
        throw std::runtime_error("the stream is still busy after " + seconds_text(timeout_s) +
                                 ", although the CPU keeps nothing waiting");
      }
      while (answer_all()) {
      }
      std::this_thread::sleep_for(kNap);
    }
  }
  const std::string missing = pool_->missing_workers();
  if (!missing.empty()) {
    throw std::runtime_error(missing + " is not back from a step that failed (" + failure_ +
                             "): nothing can be computed before");
  }
  for (int i = 0; i < num_flags(num_layers()); ++i) store(flag(i), 0);
  failure_.clear();
}

void ExpertBridge::submit(int layer) { store(submitted_flag(layer), 1); }

void ExpertBridge::wait(int layer) {
  uint32_t* const finished = finished_flag(layer);
  const Clock::time_point start = Clock::now();
  while (load(finished) == 0) {
    cpu_relax();
    const auto waited = Clock::now() - start;
    if (waited > kAwake) {
      std::this_thread::sleep_for(kNap);
    } else if (waited > kSpin) {
      sched_yield();
    }
  }
  store(finished, 0);
}

BridgeCounters ExpertBridge::counters() const {
  const std::lock_guard<std::mutex> lock(counters_mutex_);
  return counters_;
}

void ExpertBridge::fail_once(int layer, int worker, double after_s) {
  check_layer(layer);
  if (worker < 0 || worker >= pool_->num_threads()) {
    throw std::invalid_argument("worker=" + std::to_string(worker) + " must be between 0 and " +
                                std::to_string(pool_->num_threads() - 1));
  }
  Layer& failing = layers_[static_cast<size_t>(layer)];
  failing.failing = std::make_unique<FailingTask>(worker, after_s);
  failing.is_failing = true;
}

}  // namespace moejet
