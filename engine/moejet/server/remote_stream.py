"""A request as the server's process sees it while the engine's computes it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from moejet.mailbox import Mailbox
from moejet.request import StreamDelta
from moejet.server import frames
from moejet.server.backend import Job

if TYPE_CHECKING:
    from moejet.server.supervisor import RemoteBackend


class RemoteStream:
    """The backend's side puts and ends; the reader gets and closes, on the same event loop."""

    def __init__(self, backend: RemoteBackend, number: int, job: Job):
        self._backend = backend
        self._number = number
        self._job = job
        self._mailbox = Mailbox()
        self._num_received = 0  # since the reader last took something
        self._is_closed = False
        self.accepted: asyncio.Future[None] = backend.loop.create_future()

    async def get(self, timeout_s: float | None = None) -> StreamDelta | None:
        try:
            delta = await self._mailbox.get(timeout_s)
        except asyncio.CancelledError:
            self.close()
            raise
        if self._num_received >= frames.WINDOW // 2:
            self._backend.send(frames.Credit(self._number, self._num_received))
            self._num_received = 0
        return delta

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._backend.drop(self._number)

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True) and not self._backend.loop.is_closed():
            # It may be collected on any thread.
            close = frames.Close(self._number)
            self._backend.loop.call_soon_threadsafe(self._backend.send, close)

    def put(self, delta: StreamDelta) -> None:
        self._num_received += 1
        if delta.output is not None:
            ids = tuple(self._job.token_ids)
            output = replace(delta.output, prompt_token_ids=ids)
            delta = replace(delta, output=output)
        _resolve(self._mailbox.put(delta))

    def end(self, error: Exception | None = None) -> None:
        self._is_closed = True
        if not self.accepted.done():
            if error is None:
                self.accepted.set_result(None)
            else:
                self.accepted.set_exception(error)
        _resolve(self._mailbox.end(error))


def _resolve(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
