"""One request's deltas on their way from the engine's thread to a consumer on some event loop.

What the consumer has not read is merged: text and token ids are joined, so that an unread stream holds little more than
the answer itself, however many steps it took. Nothing is lost and nothing is reordered within a sample; reasoning and
content that came apart stay apart.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from moejet.request import StreamDelta

logger = logging.getLogger(__name__)

Wakes = list[asyncio.Future[None] | None]

_MERGE_AT = 64  # deltas kept apart: joining at every step would copy the text again and again
_TEXTS = ("text", "reasoning", "content")


def merge_deltas(deltas: Sequence[StreamDelta]) -> StreamDelta:
    """One delta in place of consecutive ones of a sample: texts and tuples joined, the rest as in the last."""
    if len(deltas) == 1:
        return deltas[0]
    joined: dict[str, Any] = {}
    for field in fields(StreamDelta):
        values = [getattr(delta, field.name) for delta in deltas]
        if field.name in _TEXTS:
            joined[field.name] = "".join(values)
        elif isinstance(values[-1], tuple):
            joined[field.name] = tuple(item for value in values for item in value or ())
    return replace(deltas[-1], **joined)


class _Run:
    """Consecutive deltas of one sample that will be read as one."""

    __slots__ = ("deltas", "has_content", "has_reasoning")

    def __init__(self, delta: StreamDelta):
        self.deltas = [delta]
        self.has_reasoning = bool(delta.reasoning)
        self.has_content = bool(delta.content)

    def fits(self, delta: StreamDelta) -> bool:
        return delta.error is None and not (
            (self.has_content and delta.reasoning) or (self.has_reasoning and delta.content)
        )

    def append(self, delta: StreamDelta) -> None:
        self.deltas.append(delta)
        self.has_reasoning |= bool(delta.reasoning)
        self.has_content |= bool(delta.content)
        if len(self.deltas) >= _MERGE_AT:
            self.deltas = [merge_deltas(self.deltas)]


class Mailbox:
    """Filled by the engine's thread, read by one task at a time, on whichever event loop that runs.

    put() and end() return the future to be resolved on its own loop when somebody waits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: deque[_Run] = deque()
        self._open: dict[int, _Run] = {}  # by sample
        self._waiter: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._has_ended = False

    @property
    def num_unread(self) -> int:
        """Deltas that a consumer would get now."""
        return len(self._runs)

    def put(self, delta: StreamDelta) -> asyncio.Future[None] | None:
        with self._lock:
            run = self._open.get(delta.index)
            # The output comes last, so it may not overtake what other samples have waiting.
            is_blocked = delta.output is not None and bool(self._runs) and run is not self._runs[-1]
            if run is not None and not is_blocked and run.fits(delta):
                run.append(delta)
            else:
                self._open[delta.index] = run = _Run(delta)
                self._runs.append(run)
            return self._take_waiter()

    def end(self, error: BaseException | None = None) -> asyncio.Future[None] | None:
        """Nothing comes any more; `error` is raised to who has read everything."""
        with self._lock:
            if not self._has_ended:
                self._has_ended, self._error = True, error
            return self._take_waiter()

    async def get(self, timeout_s: float | None = None) -> StreamDelta | None:
        """The next delta, None at the end. Raises TimeoutError if there is none in time, and the error of end()."""
        while True:
            with self._lock:
                if self._runs:
                    return self._pop()
                if self._error is not None:
                    raise self._error
                if self._has_ended:
                    return None
                if self._waiter is not None:
                    raise RuntimeError("this stream is being read by another task: one may read it")
                loop = asyncio.get_running_loop()
                waiter = self._waiter = loop.create_future()
            # Not asyncio.wait or asyncio.timeout, which cost several times as much, and this is once per token.
            timer = None if timeout_s is None else loop.call_later(timeout_s, _resolve, [waiter])
            try:
                await waiter
            finally:
                if timer is not None:
                    timer.cancel()
                with self._lock:
                    is_late = self._waiter is waiter  # else whoever has something has taken it
                    if is_late:
                        self._waiter = None
            if is_late and not self._runs and not self._has_ended:
                raise TimeoutError(f"no token within {timeout_s:g} s")

    def error(self) -> BaseException | None:
        return self._error

    def _pop(self) -> StreamDelta:
        run = self._runs.popleft()
        delta = merge_deltas(run.deltas)
        if self._open.get(delta.index) is run:
            del self._open[delta.index]
        return delta

    def _take_waiter(self) -> asyncio.Future[None] | None:
        waiter, self._waiter = self._waiter, None
        return waiter


def wake(waiters: Wakes) -> None:
    """Resolves each future on its own event loop, with one call per loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if waiter is not None:
            by_loop.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, futures in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, futures)
        except RuntimeError:  # the loop was closed; its streams abort when they are collected
            logger.debug("an event loop was closed while it waited for %d streams", len(futures))


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
