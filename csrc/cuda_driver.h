// The few functions of the CUDA driver that the bridge needs, found when it is first used: nothing
// of CUDA is needed to build or to load the extension.
#pragma once

#include <cstdint>
#include <string>

namespace moejet {

// The driver API's types: handles and numbers of any process that uses CUDA.
using CuStream = void*;
using CuDevicePtr = unsigned long long;
using CuResult = int;
using CuGraph = void*;
using CuGraphExec = void*;

class CudaDriver {
 public:
  // library: a file or soname. It stays loaded. Throws std::runtime_error if it cannot be loaded or
  // lacks a function; stream memory operations alone may be missing.
  explicit CudaDriver(const std::string& library);

  bool has_memory_operations() const { return write_value_ != nullptr && wait_value_ != nullptr; }
  // Enqueue *address = value, or a wait until *address == value. Return the driver's error.
  CuResult try_write_value(CuStream stream, CuDevicePtr address, uint32_t value) const;
  CuResult try_wait_value(CuStream stream, CuDevicePtr address, uint32_t value) const;
  // Captures a write and a wait on a stream of its own and makes a graph of them, which does not
  // run. Returns the driver's first error; none where the driver has not all that this takes.
  CuResult try_capture(CuDevicePtr address) const;
  // Enqueues function(argument), which must not call CUDA. Throws std::runtime_error.
  void launch_host_function(CuStream stream, void (*function)(void*), void* argument) const;
  // Whether the stream has nothing left to do. Throws std::runtime_error if it has failed.
  bool is_idle(CuStream stream) const;
  // Blocks until the stream has nothing left to do. Throws std::runtime_error if it has failed.
  void synchronize(CuStream stream) const;
  // What the GPU calls this pinned memory. Throws std::runtime_error.
  CuDevicePtr device_pointer(void* host) const;

  // Throws std::runtime_error that names the error, unless it is none.
  void check(CuResult result, const char* what) const;
  std::string error_name(CuResult result) const;

 private:
  template <class Function>
  bool find(const char* name, Function* function);
  template <class Function>
  void require(const std::string& library, const char* name, Function* function);

  void* library_;
  CuResult (*write_value_)(CuStream, CuDevicePtr, uint32_t, unsigned) = nullptr;
  CuResult (*wait_value_)(CuStream, CuDevicePtr, uint32_t, unsigned) = nullptr;
  CuResult (*launch_host_function_)(CuStream, void (*)(void*), void*) = nullptr;
  CuResult (*query_)(CuStream) = nullptr;
  CuResult (*synchronize_)(CuStream) = nullptr;
  CuResult (*device_pointer_)(CuDevicePtr*, void*, unsigned) = nullptr;
  CuResult (*error_name_)(CuResult, const char**) = nullptr;
  // For try_capture.
  CuResult (*create_stream_)(CuStream*, unsigned) = nullptr;
  CuResult (*destroy_stream_)(CuStream) = nullptr;
  CuResult (*begin_capture_)(CuStream, unsigned) = nullptr;
  CuResult (*end_capture_)(CuStream, CuGraph*) = nullptr;
  CuResult (*instantiate_)(CuGraphExec*, CuGraph, unsigned long long) = nullptr;
  CuResult (*destroy_graph_)(CuGraph) = nullptr;
  CuResult (*destroy_exec_)(CuGraphExec) = nullptr;
  bool can_capture_ = false;
};

}  // namespace moejet
