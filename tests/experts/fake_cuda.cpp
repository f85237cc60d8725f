// A CUDA driver without a GPU, for tests of the bridge: the driver's functions that it needs, on
// streams that are threads. Operations run in order, each after a random delay. Operations can be
// captured and replayed. Device addresses differ from host addresses, so that mixing them up fails.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kNotReady = 600, kIllegalAddress = 700,
              kNotSupported = 801, kCaptureUnsupported = 900, kCaptureInvalidated = 901;
constexpr unsigned long long kDeviceOffset = 1ull << 44;

std::atomic<bool> memory_operations{true}, writes_arrive{true}, graphs_take_them{true};
std::atomic<int> num_streams{0};

uint32_t* host(unsigned long long address) {
  return reinterpret_cast<uint32_t*>(address - kDeviceOffset);
}

// An operation polls until it returns true, so that a stream that is to be destroyed can give up.
using Operation = std::function<bool()>;
using Operations = std::vector<Operation>;

struct Stream {
  Stream(unsigned seed, int max_delay_us)
      : random(seed), max_delay_us(max_delay_us), thread([this] { work(); }) {}
  ~Stream() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    changed.notify_all();
    thread.join();
  }

  void add(Operation operation) {
    if (is_capturing) {
      captured.push_back(std::move(operation));
      return;
    }
    std::lock_guard<std::mutex> lock(mutex);
    operations.push_back(std::move(operation));
    changed.notify_all();
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return stop || (!operations.empty() && error == 0 && !hangs); });
      if (stop) return;
      const Operation operation = operations.front();
      operations.pop_front();
      is_running = true;
      lock.unlock();
      if (max_delay_us > 0 && random() % 2 == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(random() % max_delay_us));
      }
      while (!operation() && !stop && error == 0) std::this_thread::yield();
      lock.lock();
      is_running = false;
    }
  }

  // Whether a memory operation must not be enqueued now; it spoils what is being captured.
  bool refuses() {
    if (!is_capturing || graphs_take_them) return false;
    is_spoilt = true;
    return true;
  }

  int query() {
    std::lock_guard<std::mutex> lock(mutex);
    return error != 0 ? error.load() : operations.empty() && !is_running ? kSuccess : kNotReady;
  }

  std::mt19937 random;
  const int max_delay_us;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Operation> operations;
  bool is_capturing = false, is_running = false, is_spoilt = false;
  Operations captured;
  std::deque<Operations> graphs;
  std::atomic<bool> stop{false};
  bool hangs = false;
  std::atomic<int> error{0};
  std::thread thread;
};

Stream* stream_of(void* handle) { return static_cast<Stream*>(handle); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuStreamWriteValue32_v2(void* stream, unsigned long long address, uint32_t value,
                                   unsigned flags) {
  if (!memory_operations) return kNotSupported;
  if (flags != 0 || address < kDeviceOffset) return kInvalidValue;
  if (stream_of(stream)->refuses()) return kCaptureUnsupported;
  stream_of(stream)->add([=] {
    if (writes_arrive) __atomic_store_n(host(address), value, __ATOMIC_RELEASE);
    return true;
  });
  return kSuccess;
}

EXPORT int cuStreamWaitValue32_v2(void* stream, unsigned long long address, uint32_t value,
                                  unsigned flags) {
  if (!memory_operations) return kNotSupported;
  if (flags != 1 || address < kDeviceOffset) return kInvalidValue;
  if (stream_of(stream)->refuses()) return kCaptureUnsupported;
  stream_of(stream)->add([=] { return __atomic_load_n(host(address), __ATOMIC_ACQUIRE) == value; });
  return kSuccess;
}

EXPORT int cuLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  stream_of(stream)->add([=] {
    function(argument);
    return true;
  });
  return kSuccess;
}

EXPORT int cuStreamQuery(void* stream) { return stream_of(stream)->query(); }

EXPORT int cuStreamSynchronize(void* stream) {
  int result;
  while ((result = stream_of(stream)->query()) == kNotReady) std::this_thread::yield();
  return result;
}

EXPORT int cuMemHostGetDevicePointer_v2(unsigned long long* device, void* pointer, unsigned) {
  *device = reinterpret_cast<unsigned long long>(pointer) + kDeviceOffset;
  return kSuccess;
}

EXPORT int cuGetErrorName(int error, const char** name) {
  *name = error == kIllegalAddress       ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : error == kNotSupported       ? "CUDA_ERROR_NOT_SUPPORTED"
          : error == kCaptureUnsupported ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                         : nullptr;
  return *name ? kSuccess : kInvalidValue;
}

EXPORT int cuStreamCreate(void** stream, unsigned flags) {
  if (flags != 1) return kInvalidValue;
  ++num_streams;
  *stream = new Stream(0, 0);
  return kSuccess;
}

EXPORT int cuStreamDestroy_v2(void* stream) {
  --num_streams;
  delete stream_of(stream);
  return kSuccess;
}

EXPORT int cuStreamBeginCapture_v2(void* stream, unsigned mode) {
  if (mode != 1) return kInvalidValue;
  stream_of(stream)->is_capturing = true;
  return kSuccess;
}

EXPORT int cuStreamEndCapture(void* stream, void** graph) {
  Stream* capturing = stream_of(stream);
  capturing->is_capturing = false;
  if (capturing->is_spoilt) return kCaptureInvalidated;
  capturing->graphs.push_back(std::exchange(capturing->captured, {}));
  *graph = &capturing->graphs.back();
  return kSuccess;
}

EXPORT int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long flags) {
  if (flags != 0) return kInvalidValue;
  *exec = graph;
  return kSuccess;
}

EXPORT int cuGraphDestroy(void*) { return kSuccess; }
EXPORT int cuGraphExecDestroy(void*) { return kSuccess; }

// What the tests call.

EXPORT void fake_support_memory_operations_in_graphs(bool support) { graphs_take_them = support; }
// Streams that were created by the driver's own function and not destroyed.
EXPORT int fake_num_streams() { return num_streams; }

EXPORT void fake_support_memory_operations(bool support) { memory_operations = support; }
EXPORT void fake_let_writes_arrive(bool arrive) { writes_arrive = arrive; }
EXPORT void* fake_create(unsigned seed, int max_delay_us) { return new Stream(seed, max_delay_us); }
EXPORT void fake_destroy(void* stream) { delete stream_of(stream); }

EXPORT void fake_copy(void* stream, void* target, const void* source, size_t bytes) {
  stream_of(stream)->add([=] {
    std::memcpy(target, source, bytes);
    return true;
  });
}

EXPORT void fake_begin_capture(void* stream) { stream_of(stream)->is_capturing = true; }

// Returns the graph, which the stream owns.
EXPORT const void* fake_end_capture(void* stream) {
  Stream* capturing = stream_of(stream);
  capturing->is_capturing = false;
  capturing->graphs.push_back(std::exchange(capturing->captured, {}));
  return &capturing->graphs.back();
}

EXPORT void fake_replay(void* stream, const void* graph) {
  for (const Operation& operation : *static_cast<const Operations*>(graph)) {
    stream_of(stream)->add(operation);
  }
}

// The error of everything from now on; 0: all is well again, with nothing left to do.
EXPORT void fake_fail(void* stream, int error) {
  Stream* failing = stream_of(stream);
  std::lock_guard<std::mutex> lock(failing->mutex);
  failing->operations.clear();
  failing->error = error;
}

EXPORT void fake_hang(void* stream, bool hangs) {
  Stream* hanging = stream_of(stream);
  std::lock_guard<std::mutex> lock(hanging->mutex);
  hanging->hangs = hangs;
  hanging->changed.notify_all();
}
