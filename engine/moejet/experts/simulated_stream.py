"""A stream of operations without a GPU: a thread that runs them in order, each after a random delay.

For tests of what happens between a model on a device and the CPU: copies, flags, waits and whatever else is enqueued
run later than the call, as on a CUDA stream, and can be captured and replayed. Tensors stay in ordinary memory, so the
thread that enqueues must `synchronize` before it reads results.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moejet._C import ExpertBridge
    from moejet.experts.expert_cache import Mark

Operation = Callable[[], object]


class SimulatedGraph:
    """Captured operations."""

    def __init__(self, stream: SimulatedStream) -> None:
        self.operations: list[Operation] = []
        self._stream = stream

    def replay(self) -> None:
        for operation in self.operations:
            self._stream.call(operation)


class SimulatedStream:
    """Implements `moejet.experts.bridge.Stream`; close it, or use it as a context manager."""

    device = torch.device("cpu")
    pin_memory = False

    def __init__(self, *, seed: int = 0, max_delay_s: float = 0.0) -> None:
        """Half of the operations are preceded by a delay of up to max_delay_s."""
        self._random = random.Random(seed)
        self._max_delay_s = max_delay_s
        self._operations: deque[Operation] = deque()
        self._is_running = False  # an operation
        self._hangs = self._is_closed = False
        self._error: str | None = None
        self._changed = threading.Condition()
        self._graph: SimulatedGraph | None = None
        self._attached: list[ExpertBridge] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __enter__(self) -> SimulatedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, operation: Operation) -> None:
        """Enqueues any function without arguments."""
        if self._graph is not None:
            self._graph.operations.append(operation)
            return
        with self._changed:
            self._operations.append(operation)
            self._changed.notify_all()

    @contextmanager
    def capture(self) -> Iterator[SimulatedGraph]:
        """Records what is enqueued meanwhile."""
        self._graph = graph = SimulatedGraph(self)
        try:
            yield graph
        finally:
            self._graph = None

    def fail(self, error: str | None) -> None:
        """From now on nothing runs, and `query` raises RuntimeError with this text; None: all is well again."""
        with self._changed:
            self._error = error
            self._operations.clear()
            self._changed.notify_all()

    def hang(self, hangs: bool = True) -> None:
        """From now on nothing runs, silently, until hang(False)."""
        with self._changed:
            self._hangs = hangs
            self._changed.notify_all()

    def query(self) -> bool:
        """Whether nothing is left to do."""
        with self._changed:
            if self._error is not None:
                raise RuntimeError(self._error)
            return not self._operations and not self._is_running

    def synchronize(self, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the stream is still busy after {timeout_s} s")
            with self._changed:
                self._changed.wait(0.01)

    def close(self) -> None:
        """Lets the stream through where it waits for a bridge, and ends the thread. What is left is dropped."""
        for native in self._attached:
            with suppress(RuntimeError):
                native.reset(1.0, self.query)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    # moejet.experts.bridge.Stream

    @property
    def is_capturing(self) -> bool:
        return self._graph is not None

    def attach(self, native: ExpertBridge) -> None:
        self._native = native
        self._attached.append(native)

    def detach(self, native: ExpertBridge) -> None:
        if native in self._attached:
            self._attached.remove(native)

    def run(self, operation: Operation) -> None:
        self.call(operation)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.call(lambda: target.copy_(source))

    def submit(self, layer: int) -> None:
        self.call(lambda: self._native.submit(layer))

    def wait(self, layer: int) -> None:
        self.call(lambda: self._native.wait(layer))

    def settle(self) -> None:
        self.synchronize()

    def state(self, replayed_on: torch.cuda.Stream | None = None) -> dict[str, Any]:
        # Nothing runs any more on a stream that is closed.
        return {} if self._is_closed else {"query": self.query}

    def _work(self) -> None:
        while (operation := self._next()) is not None:
            if self._max_delay_s and self._random.random() < 0.5:
                time.sleep(self._random.random() * self._max_delay_s)
            try:
                with torch.inference_mode():  # models make their tensors in it
                    operation()
            except Exception as error:  # a stream's failure is sticky and seen by whoever asks
                self.fail(f"{type(error).__name__}: {error}")
            with self._changed:
                self._is_running = False
                self._changed.notify_all()

    def _next(self) -> Operation | None:
        with self._changed:
            while not self._is_closed and (
                not self._operations or self._hangs or self._error is not None
            ):
                self._changed.wait()
            if self._is_closed:
                return None
            self._is_running = True
            return self._operations.popleft()


class SimulatedMark:
    """A point of a simulated stream."""

    def __init__(self) -> None:
        self._time: float | None = None

    def reach(self) -> None:
        self._time = time.perf_counter()

    def is_done(self) -> bool:
        return self._time is not None

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, SimulatedMark)
        assert self._time is not None
        assert earlier._time is not None
        return self._time - earlier._time


class SimulatedFetchStream:
    """Implements `moejet.experts.expert_cache.FetchStream` for a model that the calling thread itself computes.

    Between steps, all of such a model's operations are done.
    """

    pin_memory = False

    def __init__(self, *, seed: int = 0, max_delay_s: float = 0.0) -> None:
        self._stream = SimulatedStream(seed=seed, max_delay_s=max_delay_s)

    def follow(self) -> None:
        pass

    def run(self, operation: Operation) -> None:
        self._stream.call(operation)

    def mark(self) -> SimulatedMark:
        mark = SimulatedMark()
        self._stream.call(mark.reach)
        return mark

    def mark_model(self) -> SimulatedMark:
        mark = SimulatedMark()
        mark.reach()
        return mark

    def close(self) -> None:
        if not self._stream.is_closed:
            self._stream.synchronize()
            self._stream.close()
