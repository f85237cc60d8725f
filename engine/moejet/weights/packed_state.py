"""What holds a model's weights, as bytes: on the host, or on a device."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from moejet.extension import load_extension
from moejet.weights.device_copies import DeviceCopies
from moejet.weights.packed_header import Blob


class Packed(Protocol):
    """Weights in memory of their own: `PackedMatrices`, `CpuExperts`."""

    @property
    def weights(self) -> Any: ...

    @property
    def pool(self) -> Any: ...


State = Mapping[str, "Tensor | Packed"]
# Bytes of a blob; a tensor where they are on a device.
Part = NDArray[Any] | Tensor


def is_elsewhere(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def device_copies(state: State) -> DeviceCopies | None:
    """For the tensors of a state that are on a device, if there are any."""
    for value in state.values():
        if isinstance(value, Tensor) and is_elsewhere(value):
            return DeviceCopies(value.device)
    return None


def parts_of(state: State) -> Iterable[tuple[str, Part]]:
    """Name and bytes of every blob; packed weights have one for each memory node."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield name, value if is_elsewhere(value) else bytes_of(value)
            continue
        for node, part in enumerate(value.weights.buffers()):
            yield f"{name}/{node}", part


def bytes_of(tensor: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = tensor.view(-1).view(torch.uint8).numpy()
    return found


def checksum_of(fd: int, part: Part, blob: Blob) -> str:
    """Of a part that has been written; those of a device are looked at in the file."""
    checksum = load_extension().checksum
    if not isinstance(part, Tensor):
        return f"{checksum(part):016x}"
    if blob.nbytes == 0:
        return f"{checksum(b''):016x}"
    with (
        mmap.mmap(fd, blob.nbytes, prot=mmap.PROT_READ, offset=blob.offset) as written,
        memoryview(written) as view,
    ):
        return f"{checksum(view):016x}"
