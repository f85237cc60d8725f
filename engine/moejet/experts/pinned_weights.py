"""Packed experts pinned where they are, so that a GPU copies them without a detour."""

from __future__ import annotations

import ctypes
import logging
import os
import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_cuda: Any = torch.cuda  # whose runtime functions have no types
_ALREADY_REGISTERED = 712
_MADV_DONTFORK, _MADV_DOFORK = 10, 11
_libc = ctypes.CDLL(None, use_errno=True)

logger = logging.getLogger(__name__)


class PinnedWeights:
    """Memory that is registered with CUDA as long as this lives; it must stay where it is until `close`."""

    def __init__(self, parts: Iterable[Tensor], device: torch.device) -> None:
        """parts: uint8, beginning and ending at pages, written to before. RuntimeError if the system refuses.

        Pages that nothing was written to become resident.
        """
        self._parts: list[Tensor] = []
        self._finalizer = weakref.finalize(self, _unregister, self._parts, os.getpid())
        self._finalizer.atexit = False
        start = time.perf_counter()
        for part in parts:
            if part.numel() == 0:
                continue
            code = int(_cuda.cudart().cudaHostRegister(part.data_ptr(), part.numel(), 0))
            if code == _ALREADY_REGISTERED:  # it stays whose it is
                _forget_error(device)
                continue
            if code:
                self.close()
                _forget_error(device)
                raise RuntimeError(f"cudaHostRegister fails with error {code}")
            self._parts.append(part)
            _advise(part, _MADV_DONTFORK)
        size = sum(part.numel() for part in self._parts)
        logger.info("pinned %.2f GiB in %.1f s", size / 2**30, time.perf_counter() - start)

    def close(self) -> None:
        """No copy may run any more."""
        self._finalizer()


def _unregister(parts: list[Tensor], process: int) -> None:
    if os.getpid() != process:  # a forked child has no part in its parent's registrations
        return
    for part in parts:
        _cuda.cudart().cudaHostUnregister(part.data_ptr())
        _advise(part, _MADV_DOFORK)
    parts.clear()


def _advise(part: Tensor, advice: int) -> None:
    """Pinned pages are copied by a fork at once: a child, which cannot use them, does without."""
    address, size = ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(part.numel())
    if _libc.madvise(address, size, advice):
        logger.debug("madvise(%d): error %d", advice, ctypes.get_errno())


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the last error until somebody asks, which is the next launch."""
    try:
        torch.empty(1, device=device).zero_()
    except RuntimeError as error:
        logger.debug("the error of cudaHostRegister: %s", error)
