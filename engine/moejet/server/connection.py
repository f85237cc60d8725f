"""HTTP/1.1 connections with a time limit for a request's headers, which uvicorn does not have."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_class(header_timeout_s: float) -> type[H11Protocol]:
    """For uvicorn's `http` option: a connection is closed if the headers of its next request are not there in time.

    It counts from the connection's beginning and from the end of every response.
    """

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self._start_timer()
            super().on_response_complete()

        def _start_timer(self) -> None:
            self._stop_timer()
            self._timer = self.loop.call_later(header_timeout_s, self._on_timer)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()

        def _on_timer(self) -> None:
            # The cycle is that of the last request whose headers are complete.
            is_waiting = self.cycle is None or self.cycle.response_complete
            if is_waiting and not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol
