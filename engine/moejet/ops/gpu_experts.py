"""The routed experts that live on the GPU; those of other experts are computed elsewhere and added.

out[t] = sum_k topk_weights[t, k] * down_s(silu(gate_s x_t) * (up_s x_t)),  s = slot_of_expert[topk_ids[t, k]] >= 0
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.environment import use_reference
from moejet.weights.gpu_weights import GpuWeights, dequantize


def gpu_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    slot_of_expert: Tensor,
    gate_up: GpuWeights,
    down: GpuWeights,
    *,
    out_dtype: torch.dtype | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's resident experts; zero for a token that has none.

    T tokens, D = hidden size, I = inner size, K experts per token, E experts, S slots:
      x [T, D] bf16, fp16 or fp32, rows may be apart · topk_ids [T, K] int32 or int64, -1 skips ·
      topk_weights [T, K] fp32 · slot_of_expert [E] int32 on the same device, -1: not resident ·
      gate_up (S, 2, I, D) and down (S, D, I), in formats of their own
    Returns [T, D] in out_dtype (default: x's), or adds to `into` [T, D] fp32, contiguous, and returns that. Sums are
    fp32, the inner activations are rounded to x's dtype.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    arguments = (x, topk_ids, topk_weights, slot_of_expert, gate_up, down)
    if not x.is_cuda or use_reference():
        if into is not None:
            return into.add_(gpu_experts_ref(*arguments, out_dtype=torch.float32))
        return gpu_experts_ref(*arguments, out_dtype=out_dtype)
    from moejet.kernels.moe_experts import moe_experts

    return moe_experts(*arguments, out_dtype=out_dtype, into=into)


def gpu_experts_ref(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    slot_of_expert: Tensor,
    gate_up: GpuWeights,
    down: GpuWeights,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Torch reference of `gpu_experts` in float64, on the dequantised weights."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert, slot in enumerate(slot_of_expert.tolist()):
        tokens, choices = (topk_ids == expert).nonzero(as_tuple=True)
        if slot < 0 or tokens.numel() == 0:
            continue
        gate, up = dequantize(gate_up[slot]).double()
        rows = x[tokens].double()
        hidden = F.silu(rows @ gate.T) * (rows @ up.T)
        weight = topk_weights[tokens, choices].double().unsqueeze(1)
        out.index_add_(0, tokens, weight * (hidden @ dequantize(down[slot]).double().T))
    return out.to(out_dtype)
