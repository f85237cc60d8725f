#include "cuda_signals.h"

#include <chrono>
#include <thread>

namespace moejet {
namespace {

constexpr auto kTrialTimeout = std::chrono::seconds(2);

}  // namespace

CudaSignals::CudaSignals(ExpertBridge* bridge, const std::string& library, CuStream stream,
                         bool host_functions)
    : bridge_(bridge), driver_(library) {
  for (int layer = 0; layer < bridge->num_layers(); ++layer) calls_.push_back({bridge, layer});
  if (host_functions) return;
  if (driver_.has_memory_operations()) {
    flags_ = driver_.device_pointer(bridge->submitted_flag(0));
    reason_ = try_memory_operations(stream);
  } else {
    reason_ = "the driver has no cuStreamWriteValue32_v2";
  }
  if (reason_.empty()) mode_ = SignalMode::kMemoryOperations;
}

// Returns what went wrong. What is on the stream already may take any time (weights that are being
// copied), and says nothing about these operations: it is awaited first.
std::string CudaSignals::try_memory_operations(CuStream stream) const {
  driver_.synchronize(stream);
  uint32_t* const flag = bridge_->trial_flag();
  CuResult result = driver_.try_write_value(stream, address(flag), 1);
  if (result == 0) result = driver_.try_wait_value(stream, address(flag), 1);
  if (result != 0) return driver_.error_name(result);
  const auto start = std::chrono::steady_clock::now();
  while (!driver_.is_idle(stream)) {
    if (std::chrono::steady_clock::now() - start > kTrialTimeout) {
      // Lets the stream's wait through, should it be that which hangs.
      __atomic_store_n(flag, 1, __ATOMIC_RELEASE);
      return "the stream did not write to host memory within 2 s";
    }
    std::this_thread::yield();
  }
  if (__atomic_load_n(flag, __ATOMIC_ACQUIRE) != 1) return "the write did not arrive";
  result = driver_.try_capture(address(flag));
  return result == 0 ? "" : "in a graph: " + driver_.error_name(result);
}

CuDevicePtr CudaSignals::address(uint32_t* flag) const {
  return flags_ + static_cast<CuDevicePtr>(flag - bridge_->submitted_flag(0)) * sizeof(uint32_t);
}

// The call of this layer, as host functions get it.
void* CudaSignals::argument(int layer) const {
  return const_cast<Call*>(&calls_[static_cast<size_t>(layer)]);
}

void CudaSignals::submit(int layer, CuStream stream) const {
  bridge_->check_layer(layer);
  if (mode_ == SignalMode::kMemoryOperations) {
    driver_.check(driver_.try_write_value(stream, address(bridge_->submitted_flag(layer)), 1),
                  "cuStreamWriteValue32");
    return;
  }
  const auto submit = [](void* argument) {
    const Call* call = static_cast<const Call*>(argument);
    call->bridge->submit(call->layer);
  };
  driver_.launch_host_function(stream, submit, argument(layer));
}

void CudaSignals::wait(int layer, CuStream stream) const {
  bridge_->check_layer(layer);
  if (mode_ == SignalMode::kMemoryOperations) {
    const CuDevicePtr finished = address(bridge_->finished_flag(layer));
    driver_.check(driver_.try_wait_value(stream, finished, 1), "cuStreamWaitValue32");
    driver_.check(driver_.try_write_value(stream, finished, 0), "cuStreamWriteValue32");
    return;
  }
  const auto wait = [](void* argument) {
    const Call* call = static_cast<const Call*>(argument);
    call->bridge->wait(call->layer);
  };
  driver_.launch_host_function(stream, wait, argument(layer));
}

}  // namespace moejet
