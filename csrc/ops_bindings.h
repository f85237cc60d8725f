// Python functions for the operations of ops.h on whole tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace moejet {

void register_ops(pybind11::module_& m);

}  // namespace moejet
