"""Tensors on huge pages: a cache that is read row by row would otherwise miss the address cache at every page."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A CPU tensor of zeros whose memory asks for huge pages and becomes resident when written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
