"""When an operation on CPU tensors goes to C++, and with which instruction set."""

from __future__ import annotations

from collections.abc import Sequence
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


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raises ValueError for a tensor of another shape or on another device, which torch might broadcast.

    Before a reference runs: the kernels check by themselves.
    """
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected {list(shape)}: pass one that fits"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}: use .to()")


def check_dims(name: str, tensor: Tensor, dims: str) -> None:
    """Raises ValueError for another number of dimensions. dims: their names, as in "T, D"."""
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{dims}]")


def cpu_isa() -> str:
    """The widest instruction set that this machine and MOEJET_MAX_ISA allow."""
    return _widest(env_max_isa())


@cache
def _widest(max_isa: str | None) -> str:
    isa: str = load_extension().resolve_isa("auto", max_isa)
    return isa
