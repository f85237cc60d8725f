// Python functions for the operations of ops.h on whole tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "ops.h"

namespace moejet {

// A choice from the arguments of Python's router_topk; throws py::value_error for what makes none.
RouterChoice router_choice(int64_t num_experts, int64_t top_k, const std::string& scoring,
                           const std::string& group_rank, int64_t num_groups, int64_t top_groups,
                           bool norm_topk_prob, float scaling_factor, const float* bias);

void register_ops(pybind11::module_& m);

}  // namespace moejet
