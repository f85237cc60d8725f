"""Several small tensors in one buffer on the host and one on the device, so that one copy moves them all."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 256  # of each tensor, so that kernels load it in the widest way

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Staging:
    """host and device: the tensors of a layout by name, each a view of its buffer. Host memory is pinned for CUDA."""

    def __init__(self, layout: Layout, device: torch.device):
        offsets: dict[str, int] = {}
        end = 0
        for name, (shape, dtype) in layout.items():
            offsets[name] = end
            size = math.prod(shape) * dtype.itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[offsets[name] : offsets[name] + math.prod(shape) * dtype.itemsize]
                .view(dtype)
                .view(shape)
                for name, (shape, dtype) in layout.items()
            }

        self.host, self.device = views(self._host), views(self._device)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Staging:
        """With these values, on their way to the device."""
        layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        staging = cls(layout, device)
        for name, tensor in tensors.items():
            staging.host[name].copy_(tensor)
        staging.upload()
        return staging

    @property
    def nbytes(self) -> int:
        """On the device, and as much on the host."""
        return self._device.nbytes

    def upload(self) -> None:
        """Enqueues the copy to the device; the host's values must stay until it is done."""
        self._device.copy_(self._host, non_blocking=True)
