"""A strategy as the server's process sees it while the engine's runs it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from moejet.reasoning.result import Progress
from moejet.server import frames
from moejet.server.strategies import Outcome

if TYPE_CHECKING:
    from moejet.server.supervisor import RemoteBackend


class RemoteStrategy:
    """The backend's side puts and ends; the reader gets and closes, on the same event loop."""

    def __init__(self, backend: RemoteBackend, number: int):
        self._backend = backend
        self._number = number
        self._events: asyncio.Queue[Progress | Outcome | Exception] = asyncio.Queue()
        self._is_closed = False
        self.accepted: asyncio.Future[None] = backend.loop.create_future()

    async def get(self) -> Progress | Outcome:
        event = await self._events.get()
        if isinstance(event, Exception):
            self._events.put_nowait(event)  # who asks again is told again
            raise event
        return event

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._backend.drop(self._number)

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True) and not self._backend.loop.is_closed():
            # It may be collected on any thread.
            close = frames.Close(self._number)
            self._backend.loop.call_soon_threadsafe(self._backend.send, close)

    def put(self, event: Progress | Outcome) -> None:
        self._events.put_nowait(event)

    def end(self, error: Exception | None = None) -> None:
        self._is_closed = True
        if self.accepted.done():
            if error is not None:
                self._events.put_nowait(error)
        elif error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)
