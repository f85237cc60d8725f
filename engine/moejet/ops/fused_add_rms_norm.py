"""Residual addition and the RMSNorm that follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.ops.native import check_tensor
from moejet.ops.rms_norm import rms_norm, rms_norm_ref


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out_dtype: torch.dtype
) -> Tensor:
    """residual += x in place, then rms_norm(residual).

    x [..., D] · residual [..., D], fp32 or x's dtype · weight [D].
    Returns [..., D] in out_dtype: the norm of the residual as stored, computed in fp32.
    """
    if x.is_cuda and not use_reference():
        from moejet.kernels.fused_add_rms_norm import fused_add_rms_norm as launch

        return launch(x, residual, weight, eps, out_dtype=out_dtype)
    check_tensor("residual", residual, x.shape, x)
    if not residual.is_floating_point():
        raise TypeError(f"residual has dtype {residual.dtype}, expected a float: use .float()")
    residual += x
    return rms_norm(residual, weight, eps, out_dtype=out_dtype)


def fused_add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out_dtype: torch.dtype
) -> Tensor:
    """Torch reference of `fused_add_rms_norm`."""
    residual.copy_(residual.float() + x.float())
    return rms_norm_ref(residual, weight, eps, out_dtype=out_dtype)
