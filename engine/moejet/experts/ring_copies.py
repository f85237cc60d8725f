"""Copies to a device beside what the model computes there, and the order between the two.

A mark is a place in the model's own stream of operations. A copy starts when the device has come to a mark (then
nobody reads its target any more) and the model's stream waits for a copy that it needs (`join`). The host waits for
neither, except `StagedCopies`, whose pinned buffers have to be filled.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_cuda: Any = torch.cuda  # whose streams and events have no types
# What is copied, and where to: uint8, of the same size.
Pieces = Sequence[tuple[Tensor, Tensor]]
# Threads that fill pinned buffers; memory delivers no more to more of them than PCIe takes. They are not the pool's:
# its workers belong to whoever runs a step.
_HOST_THREADS = 4


class Copies(Protocol):
    """Marks and copies are whatever an implementation makes them."""

    def mark(self) -> Any:
        """What the model has enqueued so far."""

    def start(self, pieces: Pieces, after: Any | None) -> Any:
        """Enqueues (target, source) for when `after` is reached; copies run in the order of their starts."""

    def join(self, copy: Any) -> None:
        """What the model enqueues from now on comes after the copy."""

    def wait(self, copy: Any) -> None:
        """Blocks until the copy has run."""

    def close(self) -> None:
        """Blocks until all copies have run; to be called once, at the end."""

    @property
    def seconds(self) -> float:
        """That copies which have run took, without waiting for others."""


class CudaCopies:
    """On a stream of their own; sources should be pinned, or each copy blocks the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device)
        # Copies are started by one thread and joined by another; times are taken by any.
        self._lock = threading.Lock()
        self._running: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = _cuda.Event()
        event.record(_cuda.current_stream(self._device))
        return event

    def start(self, pieces: Pieces, after: torch.cuda.Event | None) -> torch.cuda.Event:
        begin = _cuda.Event(enable_timing=True)
        end = _cuda.Event(enable_timing=True, blocking=True)  # a thread that waits for it sleeps
        with _cuda.stream(self._stream), torch.inference_mode():
            if after is not None:
                self._stream.wait_event(after)
            begin.record(self._stream)
            for target, source in pieces:
                target.copy_(source, non_blocking=True)
            end.record(self._stream)
        copy: torch.cuda.Event = end
        with self._lock:
            self._running.append((begin, end))
            self._reap()
        return copy

    def join(self, copy: torch.cuda.Event) -> None:
        _cuda.current_stream(self._device).wait_event(copy)

    def wait(self, copy: torch.cuda.Event) -> None:
        copy.synchronize()

    def close(self) -> None:
        self._stream.synchronize()

    @property
    def seconds(self) -> float:
        with self._lock:
            self._reap()
            return self._seconds

    def _reap(self) -> None:
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3


class ThreadCopies:
    """Without a GPU: on a thread, at any later time, as a device would. The model itself computes at once.

    before: called ahead of every copy, to delay or to fail it.
    """

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moejet-copies")
        self._before = before
        self.seconds = 0.0

    def mark(self) -> None:
        return None

    def start(self, pieces: Pieces, after: None) -> Future[None]:
        return self._thread.submit(self._copy, pieces)

    def join(self, copy: Future[None]) -> None:
        copy.result()

    def wait(self, copy: Future[None]) -> None:
        wait([copy])

    def close(self) -> None:
        self._thread.shutdown()

    def _copy(self, pieces: Pieces) -> None:
        self._before()
        start = time.perf_counter()
        for target, source in pieces:
            np.copyto(target.numpy(), source.numpy())
        self.seconds += time.perf_counter() - start


class StagedCopies:
    """From memory that is not pinned, over a few pinned buffers that host threads fill in turn."""

    def __init__(self, copies: Copies, buffers: Sequence[Tensor]) -> None:
        """buffers: uint8, each as large as the largest copy."""
        self._copies = copies
        self._buffers: deque[tuple[Tensor, Any]] = deque((buffer, None) for buffer in buffers)
        self._feeder = ThreadPoolExecutor(1, thread_name_prefix="moejet-ring")
        self._threads = ThreadPoolExecutor(_HOST_THREADS, thread_name_prefix="moejet-ring-copy")

    def mark(self) -> Any:
        return self._copies.mark()

    def start(self, pieces: Pieces, after: Any | None) -> Future[Any]:
        return self._feeder.submit(self._feed, pieces, after)

    def join(self, copy: Future[Any]) -> None:
        self._copies.join(copy.result())

    def wait(self, copy: Future[Any]) -> None:
        self._copies.wait(copy.result())

    def close(self) -> None:
        self._feeder.shutdown()
        self._threads.shutdown()
        self._copies.close()

    @property
    def seconds(self) -> float:
        return self._copies.seconds

    def _feed(self, pieces: Pieces, after: Any | None) -> Any:
        buffer, last = self._buffers[0]
        if last is not None:
            self._copies.wait(last)  # the device has read it
        parts, begin = [], 0
        for target, source in pieces:
            part = buffer[begin : begin + source.numel()]
            parts.append((target, part))
            self._fill(part, source)
            begin += source.numel()
        copy = self._copies.start(parts, after)
        # The buffer comes again when the others had their turn.
        self._buffers.rotate(-1)
        self._buffers[-1] = (buffer, copy)
        return copy

    def _fill(self, target: Tensor, source: Tensor) -> None:
        """On several threads; numpy copies without the interpreter's lock."""
        share = -(-source.numel() // _HOST_THREADS)
        jobs = [
            self._threads.submit(np.copyto, to.numpy(), of.numpy())
            for to, of in zip(torch.split(target, share), torch.split(source, share), strict=True)
        ]
        for job in jobs:
            job.result()
