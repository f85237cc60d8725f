#include "cuda_driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace moejet {
namespace {

// Values of cuda.h.
constexpr CuResult kSuccess = 0;
constexpr CuResult kNotReady = 600;
constexpr unsigned kWaitEqual = 1;
constexpr unsigned kWriteWithFence = 0;
constexpr unsigned kNonBlocking = 1;
constexpr unsigned kThreadLocalCapture = 1;

}  // namespace

CudaDriver::CudaDriver(const std::string& library)
    : library_(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (library_ == nullptr) {
    const char* reason = dlerror();
    throw std::runtime_error("the CUDA driver cannot be loaded (" +
                             std::string(reason ? reason : library) +
                             "): install the NVIDIA driver, or use the CPU alone");
  }
  find("cuStreamWriteValue32_v2", &write_value_);
  find("cuStreamWaitValue32_v2", &wait_value_);
  require(library, "cuLaunchHostFunc", &launch_host_function_);
  require(library, "cuStreamQuery", &query_);
  require(library, "cuStreamSynchronize", &synchronize_);
  require(library, "cuMemHostGetDevicePointer_v2", &device_pointer_);
  require(library, "cuGetErrorName", &error_name_);
  const bool found[] = {find("cuStreamCreate", &create_stream_),
                        find("cuStreamDestroy_v2", &destroy_stream_),
                        find("cuStreamBeginCapture_v2", &begin_capture_),
                        find("cuStreamEndCapture", &end_capture_),
                        find("cuGraphInstantiateWithFlags", &instantiate_),
                        find("cuGraphDestroy", &destroy_graph_),
                        find("cuGraphExecDestroy", &destroy_exec_)};
  can_capture_ = std::all_of(std::begin(found), std::end(found), [](bool f) { return f; });
}

template <class Function>
bool CudaDriver::find(const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library_, name));
  return *function != nullptr;
}

template <class Function>
void CudaDriver::require(const std::string& library, const char* name, Function* function) {
  if (find(name, function)) return;
  throw std::runtime_error("the CUDA driver " + library + " has no " + name +
                           ": install a newer NVIDIA driver");
}

std::string CudaDriver::error_name(CuResult result) const {
  const char* name = nullptr;
  const bool known = error_name_(result, &name) == kSuccess && name != nullptr;
  return std::string(known ? name : "unknown error") + " (" + std::to_string(result) + ")";
}

void CudaDriver::check(CuResult result, const char* what) const {
  if (result != kSuccess) throw std::runtime_error(what + (": " + error_name(result)));
}

CuResult CudaDriver::try_write_value(CuStream stream, CuDevicePtr address, uint32_t value) const {
  return write_value_(stream, address, value, kWriteWithFence);
}

CuResult CudaDriver::try_wait_value(CuStream stream, CuDevicePtr address, uint32_t value) const {
  return wait_value_(stream, address, value, kWaitEqual);
}

CuResult CudaDriver::try_capture(CuDevicePtr address) const {
  if (!can_capture_) return kSuccess;
  CuStream stream = nullptr;
  CuResult result = create_stream_(&stream, kNonBlocking);
  if (result != kSuccess) return result;
  result = begin_capture_(stream, kThreadLocalCapture);
  if (result == kSuccess) {
    CuGraph graph = nullptr;
    result = try_write_value(stream, address, 1);
    if (result == kSuccess) result = try_wait_value(stream, address, 1);
    const CuResult ended = end_capture_(stream, &graph);
    if (result == kSuccess) result = ended;
    if (result == kSuccess) {
      CuGraphExec exec = nullptr;
      result = instantiate_(&exec, graph, 0);
      if (result == kSuccess) destroy_exec_(exec);
    }
    if (graph != nullptr) destroy_graph_(graph);
  }
  destroy_stream_(stream);
  return result;
}

void CudaDriver::launch_host_function(CuStream stream, void (*function)(void*),
                                      void* argument) const {
  check(launch_host_function_(stream, function, argument), "cuLaunchHostFunc");
}

bool CudaDriver::is_idle(CuStream stream) const {
  const CuResult result = query_(stream);
  if (result == kNotReady) return false;
  check(result, "the CUDA stream failed");
  return true;
}

void CudaDriver::synchronize(CuStream stream) const {
  check(synchronize_(stream), "the CUDA stream failed");
}

CuDevicePtr CudaDriver::device_pointer(void* host) const {
  CuDevicePtr pointer = 0;
  check(device_pointer_(&pointer, host, 0), "flags are not in pinned memory");
  return pointer;
}

}  // namespace moejet
