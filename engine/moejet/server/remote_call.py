"""What the server's process has asked the engine's for, whose answer comes in pieces."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from moejet.server import frames

if TYPE_CHECKING:
    from moejet.server.supervisor import RemoteBackend


class RemoteCall:
    """The backend's side puts and ends; the reader gets and closes, on the same event loop."""

    def __init__(self, backend: RemoteBackend, number: int):
        self._backend = backend
        self._number = number
        self._is_closed = False
        self.accepted: asyncio.Future[None] = backend.loop.create_future()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._backend.drop(self._number)

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True) and not self._backend.loop.is_closed():
            # It may be collected on any thread.
            close = frames.Close(self._number)
            self._backend.loop.call_soon_threadsafe(self._backend.send, close)

    def end(self, error: Exception | None = None) -> None:
        self._is_closed = True
        if self.accepted.done():
            return
        if error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)
