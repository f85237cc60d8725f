"""A request as the server's process sees it while the engine's computes it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from moejet.mailbox import Mailbox
from moejet.request import StreamDelta
from moejet.server import frames
from moejet.server.backend import Job
from moejet.server.remote_call import RemoteCall

if TYPE_CHECKING:
    from moejet.server.supervisor import RemoteBackend


class RemoteStream(RemoteCall):
    """The deltas of a request."""

    def __init__(self, backend: RemoteBackend, number: int, job: Job):
        super().__init__(backend, number)
        self._job = job
        self._mailbox = Mailbox()
        self._num_received = 0  # since the reader last took something

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

    def put(self, delta: StreamDelta) -> None:
        self._num_received += 1
        if delta.output is not None:
            ids = tuple(self._job.token_ids)
            output = replace(delta.output, prompt_token_ids=ids)
            delta = replace(delta, output=output)
        _resolve(self._mailbox.put(delta))

    def end(self, error: Exception | None = None) -> None:
        super().end(error)
        _resolve(self._mailbox.end(error))


def _resolve(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
