"""Streams of a stand-in for the CUDA driver, tests/experts/fake_cuda.cpp: real driver calls without a GPU.

As with `SimulatedStream`, tensors stay in ordinary memory.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moejet.extension import load_extension

if TYPE_CHECKING:
    from moejet import _C


_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class FakeGraph:
    """Captured operations."""

    def __init__(self, stream: FakeStream) -> None:
        self.handle: int | None = None
        self._stream = stream

    def replay(self) -> None:
        self._stream.call_driver("fake_replay", ctypes.c_void_p(self.handle))


class FakeStream:
    """Implements `moejet.experts.bridge.Stream` by the code that drives CUDA streams; close it."""

    device = torch.device("cpu")
    pin_memory = False

    def __init__(self, path: str, *, host_functions: bool, seed: int, max_delay_s: float) -> None:
        self.library = ctypes.CDLL(path)
        self.library.fake_create.restype = ctypes.c_void_p
        self.library.fake_end_capture.restype = ctypes.c_void_p
        self._path, self._host_functions = path, host_functions
        self.handle = self.library.fake_create(seed, int(max_delay_s * 1e6))
        self.is_capturing = False
        self._is_open = True
        self._kept: list[object] = []  # what operations in progress use
        self._captured: list[object] = []
        self._attached: list[_C.ExpertBridge] = []

    def attach(self, native: _C.ExpertBridge) -> None:
        self._attached.append(native)
        self.signals = load_extension().CudaSignals(
            native, self._path, self.handle, self._host_functions
        )

    def detach(self, native: _C.ExpertBridge) -> None:
        if native in self._attached:
            self._attached.remove(native)

    def copy(self, target: Tensor, source: Tensor) -> None:
        same = (target.dtype, target.shape) == (source.dtype, source.shape)
        if not (same and target.is_contiguous() and source.is_contiguous()):
            raise ValueError("copies need contiguous tensors of one shape and dtype")
        self._kept += [target, source]
        self.call_driver(
            "fake_copy",
            *(ctypes.c_void_p(t.data_ptr()) for t in (target, source)),
            ctypes.c_size_t(source.nbytes),
        )

    def run(self, operation: Callable[[], object]) -> None:
        """By a host function, which the thread of the stream calls."""
        function = _HOST_FUNCTION(lambda _: operation())
        self._kept.append(function)
        self.call_driver("cuLaunchHostFunc", function, None)

    def submit(self, layer: int) -> None:
        self.signals.submit(layer, self.handle)

    def wait(self, layer: int) -> None:
        self.signals.wait(layer, self.handle)

    def settle(self) -> None:
        self.synchronize()

    def state(self, replayed_on: torch.cuda.Stream | None = None) -> dict[str, Any]:
        # Nothing runs any more on a stream that is closed.
        return {"signals": self.signals, "streams": [self.handle]} if self._is_open else {}

    def synchronize(self) -> None:
        deadline = time.monotonic() + 30
        while self.call_driver("cuStreamQuery") != 0:
            if time.monotonic() > deadline:
                raise TimeoutError("the stream is still busy after 30 s")
            time.sleep(0.0002)
        if not self.is_capturing:
            self._kept.clear()

    def fail(self, error: str | None) -> None:
        """From now on nothing runs, and queries say CUDA_ERROR_ILLEGAL_ADDRESS; None: all is well again."""
        self.call_driver("fake_fail", 700 if error else 0)

    def hang(self, hangs: bool = True) -> None:
        self.call_driver("fake_hang", hangs)

    @contextmanager
    def capture(self) -> Iterator[FakeGraph]:
        """Records what is enqueued meanwhile."""
        self.is_capturing = True
        self.call_driver("fake_begin_capture")
        graph = FakeGraph(self)
        try:
            yield graph
        finally:
            self.is_capturing = False
            graph.handle = self.call_driver("fake_end_capture")
            self._captured += self._kept
            self._kept = []

    def close(self) -> None:
        """Lets the stream through where it waits for a bridge. What is left is dropped."""
        if not self._is_open:
            return
        for native in self._attached:
            with suppress(RuntimeError):
                native.reset(1.0, **self.state())
        self._attached.clear()
        self._is_open = False
        self.call_driver("fake_destroy")

    def call_driver(self, name: str, *arguments: object) -> Any:
        return getattr(self.library, name)(ctypes.c_void_p(self.handle), *arguments)
