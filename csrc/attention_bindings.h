// The Python function of attention.h.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "attention.h"

namespace moejet {

// "auto", "absorbed", "expanded" or "invariant"; throws py::value_error.
AttentionForm parse_attention_form(const std::string& name);

void register_attention(pybind11::module_& m);

}  // namespace moejet
