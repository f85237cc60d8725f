#pragma once

#include <pybind11/pybind11.h>

namespace moejet {
void register_bridge(pybind11::module_& m);
}  // namespace moejet
