"""The routed experts of a mixture-of-experts layer (DeepSeekMoE, arXiv 2401.06066).

out[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x_t) * (up_e x_t)),  e = topk_ids[t, k]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.config import use_reference

if TYPE_CHECKING:
    from moejet.experts.cpu_experts import CpuExperts


def moe_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: CpuExperts) -> Tensor:
    """Weighted sum of each token's routed experts.

    Shapes: T tokens, D = hidden_size, K experts per token.
      x [T, D] fp32 or bf16 (rows may be apart) · topk_ids [T, K] i32 or i64, -1 skips ·
      topk_weights [T, K] fp32
    Returns: [T, D] in x's dtype. Integer formats quantise activations to int8 per 32 inputs on
    vector instruction sets; AMX computes in bf16, or in int8 (see `CpuExperts`). An id out of range raises ValueError.
    """
    if use_reference():
        return moe_experts_ref(x, topk_ids, topk_weights, experts)
    out = torch.empty(x.shape, dtype=x.dtype)
    experts.run_kernels(x, topk_ids, topk_weights, out)
    return out


def moe_experts_ref(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: CpuExperts
) -> Tensor:
    """Torch reference of `moe_experts` in float64, on the dequantised weights."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in sorted(set(topk_ids.flatten().tolist())):
        if expert == -1:
            continue
        gate, up, down = (w.double() for w in experts.dequantize(expert))
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        rows = x[tokens].double()
        hidden = F.silu(rows @ gate.T) * (rows @ up.T)
        weight = topk_weights[tokens, slots].double().unsqueeze(1)
        out.index_add_(0, tokens, weight * (hidden @ down.T))
    return out.to(x.dtype)
