"""The gate of a SwiGLU block (arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up [..., 2I], gate first. Returns [..., I] in the same dtype."""
    return silu_mul_ref(gate_up)


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """Torch reference of `silu_mul`, fp32 inside."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.dtype == gate_up.float().dtype:
        return F.silu(gate) * up
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)
