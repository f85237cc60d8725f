// The stream's side of an ExpertBridge, enqueued on CUDA streams.
#pragma once

#include <string>
#include <vector>

#include "cuda_driver.h"
#include "expert_bridge.h"

namespace moejet {

// How a stream sets a flag and waits for one. Memory operations take neither a multiprocessor nor a
// thread, about a microsecond each. Host functions work everywhere, at several times that; one that
// waits keeps a thread of the driver busy.
enum class SignalMode { kMemoryOperations, kHostFunctions };

// Enqueues the stream's side of a bridge on CUDA streams, also while they are being captured.
class CudaSignals {
 public:
  // The bridge and this object outlive every captured graph: the graph's operations hold addresses
  // of the bridge's flags or, as host functions, of this object's calls_. Memory operations are
  // tried out on `stream`: whether they work depends on driver, card and operating system. It must
  // not be capturing nor wait for the calling thread, which waits for all that it has to do. With
  // host_functions they are not used at all.
  CudaSignals(ExpertBridge* bridge, const std::string& library, CuStream stream,
              bool host_functions);

  SignalMode mode() const { return mode_; }
  // Why memory operations are not used; empty if they are, or were not wanted.
  const std::string& reason() const { return reason_; }

  void submit(int layer, CuStream stream) const;
  void wait(int layer, CuStream stream) const;
  StreamState query(CuStream stream) const {
    return driver_.is_idle(stream) ? StreamState::kIdle : StreamState::kBusy;
  }

 private:
  // Of a layer, as the argument of a host function.
  struct Call {
    ExpertBridge* bridge;
    int layer;
  };
  std::string try_memory_operations(CuStream stream) const;
  CuDevicePtr address(uint32_t* flag) const;
  void* argument(int layer) const;

  ExpertBridge* const bridge_;
  const CudaDriver driver_;
  std::vector<Call> calls_;
  SignalMode mode_ = SignalMode::kHostFunctions;
  std::string reason_;
  CuDevicePtr flags_ = 0;  // of the bridge's first flag
};

}  // namespace moejet
