// The Python function of attention.h.
#pragma once

#include <pybind11/pybind11.h>

namespace moejet {

void register_attention(pybind11::module_& m);

}  // namespace moejet
