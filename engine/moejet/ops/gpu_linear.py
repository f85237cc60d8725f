"""Linear layers on the GPU with weights in the formats of `moejet.weights.gpu_weights`.

out[t] = W x[t] + bias, or out[t, h] = W_h x[t, h] with one matrix per head (MLA's absorbed projections).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.weights.gpu_weights import GpuWeights, dequantize


def gpu_linear(
    x: Tensor,
    weights: GpuWeights,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, K] with weights (N, K) and bias [N], or x [T, H, K] with weights (H, N, K).

    x bf16, fp16 or fp32, adjacent in K; activations stay as they are, sums are fp32. Returns [T, N] or [T, H, N] in
    out_dtype (default: x's). bf16 activations meet weights as bf16: int4_g32 values are rounded to it, codes of int8
    and fp8 fit exactly and are scaled in fp32. From hundreds of tokens on, and for bf16 and fp16 weights, torch
    multiplies in x's dtype: values of all formats and results are rounded to it, whatever out_dtype is. On a GPU bf16
    and fp16 weights take x of their own dtype; fp32 x costs a copy of the matrix for each product, others TypeError.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not x.is_cuda or use_reference():
        return gpu_linear_ref(x, weights, bias, out_dtype=out_dtype)
    from moejet.kernels.linear import linear

    return linear(x, weights, bias, out_dtype=out_dtype)


def gpu_linear_ref(
    x: Tensor, weights: GpuWeights, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """Torch reference of `gpu_linear` in float64, on the dequantised weights."""
    w = dequantize(weights).double()
    equation = "tk,nk->tn" if x.dim() == 2 else "thk,hnk->thn"
    out = torch.einsum(equation, x.double(), w)
    return (out if bias is None else out + bias.double()).to(out_dtype)
