"""Blocks of the latent cache as bytes on the host, wherever the cache is."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]


class CacheBlocks:
    """Reads and writes blocks of a cache [layers, blocks, ...]; a block is its bytes in all layers, one after another.

    From a GPU, `read` copies on a stream of its own and so does not wait for a step; `write` is in order with steps.
    """

    def __init__(self, cache: Tensor):
        layers, blocks = cache.shape[:2]
        self._bytes = cache.view(layers, blocks, -1).view(torch.uint8)
        # numpy copies without the interpreter's lock, torch's dispatch or its threads.
        self._here: Bytes | None = None if cache.is_cuda else self._bytes.numpy()

    @property
    def block_bytes(self) -> int:
        return self._bytes.shape[0] * self._bytes.shape[2]

    def read(self, block: int, target: Bytes) -> None:
        """Into target [block_bytes]; everything is there when it returns."""
        if self._here is not None:
            np.copyto(target.reshape(self._here.shape[0], -1), self._here[:, block])
            return
        with torch.cuda.stream(self._stream):
            self._staging.copy_(self._bytes[:, block], non_blocking=True)
            self._stream.synchronize()
        np.copyto(target.reshape(self._staging.shape), self._staging.numpy())

    def write(self, block: int, data: Bytes) -> None:
        """From data [block_bytes], which may change when it returns."""
        if self._here is not None:
            np.copyto(self._here[:, block], data.reshape(self._here.shape[0], -1))
            return
        there = self._bytes[:, block]
        there.copy_(torch.from_numpy(np.ascontiguousarray(data)).view(there.shape))

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._bytes.device)  # type: ignore[no-untyped-call]

    @cached_property
    def _staging(self) -> Tensor:
        shape = (self._bytes.shape[0], self._bytes.shape[2])
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
