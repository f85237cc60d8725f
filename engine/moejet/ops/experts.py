"""The routed experts of a mixture-of-experts layer (DeepSeekMoE, arXiv 2401.06066).

out[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x_t) * (up_e x_t)),  e = topk_ids[t, k]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_experts_ref(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    dequantize: Callable[[int], tuple[Tensor, Tensor, Tensor]],
) -> Tensor:
    """Torch reference of `CpuExperts.forward` in float64; dequantize: (gate [I, D], up [I, D], down [D, I]) of one."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in sorted(set(topk_ids.flatten().tolist())):
        if expert == -1:
            continue
        gate, up, down = (w.double() for w in dequantize(expert))
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        rows = x[tokens].double()
        hidden = F.silu(rows @ gate.T) * (rows @ up.T)
        weight = topk_weights[tokens, slots].double().unsqueeze(1)
        out.index_add_(0, tokens, weight * (hidden @ down.T))
    return out.to(x.dtype)
