"""The activation of a gated MLP, silu(gate) * up, in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.environment import use_reference
from moejet.ops.native import check_tensor


def silu_mul(gate: Tensor, up: Tensor | None = None, *, out_dtype: torch.dtype) -> Tensor:
    """silu(gate) * up.

    gate and up [T, I], or gate [T, 2 I] = [gate | up] without up; last dimension adjacent. Returns [T, I] in out_dtype.
    """
    if up is None:
        assert gate.shape[1] % 2 == 0, f"{gate.shape=}"
        gate, up = gate.chunk(2, dim=1)
    if gate.is_cuda and not use_reference():
        from moejet.kernels.silu_mul import silu_mul as launch

        return launch(gate, up, out_dtype=out_dtype)
    check_tensor("up", up, gate.shape, gate)
    return silu_mul_ref(gate, up, out_dtype=out_dtype)


def silu_mul_ref(gate: Tensor, up: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """Torch reference of `silu_mul`."""
    return (F.silu(gate.float()) * up.float()).to(out_dtype)
