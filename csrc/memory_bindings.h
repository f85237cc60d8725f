#pragma once

#include <pybind11/pybind11.h>

namespace moejet {

// The memory of packed weights as buffers and as views of files. After the classes of weights.
void register_memory(pybind11::module_& m);

}  // namespace moejet
