"""The router's logits: one fp32 dot product per token and expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.extension import load_extension
from moejet.ops.native import check_dims, check_tensor, cpu_isa, runs_native

if TYPE_CHECKING:
    from moejet._C import ThreadPool


def router_logits(x: Tensor, weight: Tensor, pool: ThreadPool | None = None) -> Tensor:
    """x W^T in fp32, on the pool's workers or, without one, on the caller's thread.

    x [T, D] any float dtype · weight [E, D] fp32. Returns [T, E] fp32; a row does not depend on the other rows.
    """
    x = x.float()
    check_dims("x", x, "T, D")
    check_dims("weight", weight, "E, D")
    if not runs_native(x, weight):
        check_tensor("weight", weight, (weight.shape[0], x.shape[1]), x)
        if weight.dtype != torch.float32:
            raise TypeError(f"weight has dtype {weight.dtype}, expected float32: use .float()")
        return router_logits_ref(x, weight)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    load_extension().router_logits(x, weight, out, pool, cpu_isa())
    return out


def router_logits_ref(x: Tensor, weight: Tensor) -> Tensor:
    """Torch reference of `router_logits`."""
    return F.linear(x.float(), weight)
