"""A server on a thread of this process: for scripts, notebooks and tests that bring their own model or application."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from moejet.validation import require_int, require_text, short

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_DRAIN_S = 1  # for requests that still run at the end


@contextmanager
def serve_in_thread(app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves an application, such as `asgi_app(LLM())`, until the block ends; yields its address. Port 0: any free one.

    The application's lifespan runs on that thread. OSError if the address is in use, RuntimeError if the application
    does not start; the log says why.
    """
    import uvicorn

    if not callable(app) or isinstance(app, type):
        raise ValueError(f"app={short(app)} must be an ASGI application, such as asgi_app(LLM())")
    require_text("host", host)
    require_int("port", port, 0, 65535)

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            ws="none",
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_S,
        )
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family)
    except (OSError, TypeError, UnicodeError) as error:
        if isinstance(error, OSError) and (error.errno or 0) > 0:  # not of the resolver
            raise
        raise ValueError(f"host={short(host)} is unknown: use an address of this machine") from None
    with sock:
        bound = sock.getsockname()[1]

        def run() -> None:
            with suppress(SystemExit):  # how uvicorn says that it did not start
                server.run([sock])

        thread = threading.Thread(target=run, name="moejet-server", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the application did not start: see the log")
                time.sleep(0.005)
            yield f"http://{f'[{host}]' if ':' in host else host}:{bound}"
        finally:
            server.should_exit = True
            thread.join()
