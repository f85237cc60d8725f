"""Root-mean-square layer normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.extension import load_extension
from moejet.ops.native import check_tensor, cpu_isa, runs_native


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out_dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32.

    x [..., D] any float dtype · weight [D]. Returns [..., D] in out_dtype.
    """
    if x.is_cuda and not use_reference():
        from moejet.kernels.rms_norm import rms_norm as rms_norm_triton

        return rms_norm_triton(x, weight, eps, out_dtype=out_dtype)
    if out_dtype == torch.float32 and x.numel() > 0 and runs_native(x, weight):
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(rows.shape, dtype=torch.float32)
        load_extension().rms_norm(rows, weight, eps, out, isa=cpu_isa())
        return out.view(x.shape)
    check_tensor("weight", weight, x.shape[-1:], x)
    return rms_norm_ref(x, weight, eps, out_dtype=out_dtype)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, *, out_dtype: torch.dtype) -> Tensor:
    """Torch reference of `rms_norm`."""
    x = x.float()
    inverse = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (x * inverse * weight.float()).to(out_dtype)
