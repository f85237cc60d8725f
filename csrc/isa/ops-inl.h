// The table of the operations of ops.h. Included by every file of isa/.
#pragma once

#ifndef MOEJET_ISA_NS
#error "ops-inl.h belongs into a file of isa/"
#endif

#include "logits-inl.h"
#include "router-inl.h"
#include "rows-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

constexpr OpKernels op_kernels() {
  return {embed_row,  add_row,          rms_norm_row,  add_rms_norm_row,
          rope_row,   store_latent_row, router_logits, router_topk_row,
          argmax_row, topk_row,         exp_sum_row,   draw_row};
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
