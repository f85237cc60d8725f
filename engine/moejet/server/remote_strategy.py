"""A strategy as the server's process sees it while the engine's runs it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from moejet.reasoning.result import Progress
from moejet.server.remote_call import RemoteCall
from moejet.server.strategies import Outcome

if TYPE_CHECKING:
    from moejet.server.supervisor import RemoteBackend


class RemoteStrategy(RemoteCall):
    """What a strategy tells, and its outcome at the end."""

    def __init__(self, backend: RemoteBackend, number: int):
        super().__init__(backend, number)
        self._events: asyncio.Queue[Progress | Outcome | Exception] = asyncio.Queue()

    async def get(self) -> Progress | Outcome:
        event = await self._events.get()
        if isinstance(event, Exception):
            self._events.put_nowait(event)  # who asks again is told again
            raise event
        return event

    def put(self, event: Progress | Outcome) -> None:
        self._events.put_nowait(event)

    def end(self, error: Exception | None = None) -> None:
        if self.accepted.done() and error is not None:
            self._events.put_nowait(error)
        super().end(error)
