"""What a launcher must know of the GPU that it launches on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

# Products and sums are fused as in torch's kernels; said here because Triton 3.9 warns where nothing is said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


MAX_GRID_Y = 65535  # programs of a grid along its second and third axis

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Card:
    """One kind of GPU: compute capability as major * 10 + minor, multiprocessors, shared memory per block in bytes."""

    capability: int
    num_sms: int
    shared_memory: int
    name: str


# Shared memory per block is the most that a kernel may opt in to (CUDA C++ programming guide, compute capabilities).
CARDS = {
    80: Card(80, 108, 163 << 10, "A100"),
    86: Card(86, 82, 99 << 10, "RTX 3090"),
    89: Card(89, 128, 99 << 10, "RTX 4090"),
    90: Card(90, 132, 227 << 10, "H100, H200"),
    100: Card(100, 148, 227 << 10, "B200"),
    120: Card(120, 170, 99 << 10, "RTX 5090"),
}

_pretended: ContextVar[Card] = ContextVar("pretended_card", default=CARDS[86])


def card_of(device: torch.device) -> Card:
    """The card behind a CUDA device; elsewhere (interpreter, compilation without a GPU) the one of `pretend`."""
    if device.type != "cuda":
        return _pretended.get()
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


def on_own_device(launcher: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
    """Launches on the device of the first argument, a tensor: Triton would take the current one."""

    @wraps(launcher)
    def launch(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        with torch.cuda.device_of(args[0]):
            return launcher(*args, **kwargs)

    return launch


@contextmanager
def pretend(card: Card) -> Iterator[None]:
    """Launchers given tensors outside of a GPU decide as on this card."""
    token = _pretended.set(card)
    try:
        yield
    finally:
        _pretended.reset(token)


@cache
def _properties(index: int) -> Card:
    found = torch.cuda.get_device_properties(index)
    return Card(
        found.major * 10 + found.minor,
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
        found.name,
    )
