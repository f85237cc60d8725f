"""When an operation on CPU tensors goes to C++, and with which instruction set."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moejet.environment import env_max_isa, use_reference
from moejet.extension import load_extension


def runs_native(*tensors: Tensor | None) -> bool:
    """Whether C++ takes these: fp32 on the CPU, elements of the last dimension adjacent, no rows that overlap.

    None is left out.
    """
    if use_reference():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or not tensor.is_cpu or tensor.dim() == 0:
            return False
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return False
        if tensor.dim() == 2 and tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
            return False
    return True


def cpu_isa() -> str:
    """The widest instruction set that this machine and MOEJET_MAX_ISA allow."""
    return _widest(env_max_isa())


@cache
def _widest(max_isa: str | None) -> str:
    isa: str = load_extension().resolve_isa("auto", max_isa)
    return isa
