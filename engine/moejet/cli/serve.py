"""`moejet serve`: the HTTP server, with the engine in a process of its own."""

import argparse
import asyncio
import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moejet.cli import options
from moejet.cli.main import fail
from moejet.cli.serve_options import add_options, engine_options, server_config
from moejet.cli.terminal import note
from moejet.progress import ProgressLine, bar

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from moejet.server.backend import Backend
    from moejet.server.config import ServerConfig

__all__ = ["add_options", "execute"]

_MAX_CONNECTIONS = 4096
_CLOSE_S = 30.0
_WRITE_S, _HASTY_WRITE_S = 5.0, 0.5  # for the last events of streams that are ended


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    _check_packages()
    config = server_config(args)
    engine, limits = engine_options(args)
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts={args.max_restarts} must be 0 or more")
    if args.no_access_log:
        logging.getLogger("moejet.server.access").setLevel(logging.WARNING)
    elif logging.getLogger().level > logging.INFO:
        logging.getLogger("moejet.server.access").setLevel(logging.INFO)
    _raise_file_limit()
    with _listening_socket(config.host, config.port) as sock:
        return asyncio.run(_serve(args, config, sock, engine, limits))


def _check_packages() -> None:
    for name in ("fastapi", "uvicorn", "msgspec", "prometheus_client"):
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(
                f"moejet serve needs the package {name}, which cannot be imported ({error}): "
                "pip install 'moejet[server]'"
            ) from error


def _raise_file_limit() -> None:
    """A connection each is a file each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _listening_socket(host: str, port: int) -> socket.socket:
    """Taken before a long load, which a port in use would make futile."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ValueError(
            f"--host={host!r} is no address of this machine: {error.strerror}"
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        message = f"cannot listen on {host} port {port}: {error.strerror}; choose another --port"
        raise ValueError(message) from error
    return sock


class _Gate:
    """Answers 503 until there is an application behind it."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        error = {
            "message": "the model is being loaded",
            "type": "overloaded_error",
            "param": None,
            "code": "loading",
        }
        body = {"status": "loading", "error": error}
        response = JSONResponse(
            body, 503, headers={"retry-after": "5", "cache-control": "no-store"}
        )
        await response(scope, receive, send)


async def _serve(
    args: argparse.Namespace,
    config: "ServerConfig",
    sock: socket.socket,
    engine: dict[str, Any],
    limits: dict[str, Any],
) -> int:
    import uvicorn

    from moejet.server.app import asgi_app
    from moejet.server.connection import protocol_class
    from moejet.server.supervisor import LoadError

    gate = _Gate()
    server = uvicorn.Server(
        uvicorn.Config(
            gate,
            http=protocol_class(config.header_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            h11_max_incomplete_event_size=config.max_header_bytes,
            timeout_graceful_shutdown=round(args.drain_timeout + _WRITE_S),
        )
    )
    stopped, hastened = _on_signals(server)
    # _serve and not serve, which would take the signals for itself and end the process by them.
    serving = asyncio.create_task(server._serve([sock]))
    waiting = asyncio.create_task(stopped.wait())
    loading = asyncio.create_task(_load(args, config, engine, limits))
    await asyncio.wait((loading, waiting, serving), return_when=asyncio.FIRST_COMPLETED)
    try:
        if not loading.done():
            loading.cancel()
            return 130 if hastened.is_set() else 0
        backend = loading.result()
    except LoadError as error:
        return fail(str(error), error.exit_code)
    else:
        app = asgi_app(backend, config)
        async with app.router.lifespan_context(app), _closing(backend):
            gate.app = app
            _retry_on_signal(backend)
            print(f"{backend.card.name} is served at {_url(config, sock)}", flush=True)
            _tell(backend.card.description)
            _tell("a page to talk to it is there, too; Ctrl-C ends the server")
            ending = asyncio.create_task(
                _end(server, backend, stopped, hastened, args.drain_timeout)
            )
            await serving
            ending.cancel()
        return 130 if hastened.is_set() else 0
    finally:
        server.should_exit = True
        await asyncio.wait((loading, serving))
        waiting.cancel()


def _on_signals(server: Any) -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first SIGTERM or SIGINT, after which nothing new is taken, and by the second."""
    stopped, hastened = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        server.should_exit = True
        if stopped.is_set():
            hastened.set()
            return
        stopped.set()
        _tell("finishing the running requests; once more ends them")

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return stopped, hastened


def _tell(text: str) -> None:
    """A note to whoever started the server, if that still listens."""
    with suppress(OSError):
        note(text)


async def _end(
    server: Any,
    backend: "Backend",
    stopped: asyncio.Event,
    hastened: asyncio.Event,
    drain_timeout_s: float,
) -> None:
    """Ends what still runs when its time is over; every stream gets an event that says so."""
    await stopped.wait()
    with suppress(TimeoutError):
        await asyncio.wait_for(hastened.wait(), drain_timeout_s)
    _tell("ending the running requests")
    closing = asyncio.create_task(backend.close())
    await asyncio.sleep(_WRITE_S if not hastened.is_set() else _HASTY_WRITE_S)
    server.force_exit = True  # for clients that do not read
    await closing


def _retry_on_signal(backend: "Backend") -> None:
    """SIGUSR1 starts an engine that has been given up, or waits for its next start."""

    def retry() -> None:
        is_due = getattr(backend, "retry", lambda: False)()
        _tell("starting the engine" if is_due else "the engine runs: SIGUSR1 changes nothing")

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, retry)


async def _load(
    args: argparse.Namespace,
    config: "ServerConfig",
    engine: dict[str, Any],
    limits: dict[str, Any],
) -> "Backend":
    from moejet.server.backend import LocalBackend
    from moejet.server.restarts import RestartPolicy
    from moejet.server.supervisor import RemoteBackend, WorkerOptions

    assert config.model_name is not None, "it has been set"
    if args.no_worker:
        options.quiet_openmp()
        from moejet.async_llm import AsyncLLM

        llm = await asyncio.to_thread(AsyncLLM, args.model, **limits, **engine)
        return LocalBackend(llm, name=config.model_name, is_owned=True)
    line = ProgressLine()
    try:
        return await RemoteBackend.open(
            WorkerOptions(args.model, {**engine, "show_progress": False}, limits),
            name=config.model_name,
            restarts=RestartPolicy(args.max_restarts + 1),
            on_loading=lambda share: line.update(f"loading {bar(share)}"),
        )
    finally:
        line.close()


@asynccontextmanager
async def _closing(backend: "Backend") -> AsyncIterator[None]:
    try:
        yield
    finally:
        await asyncio.wait_for(backend.close(), _CLOSE_S)


def _url(config: "ServerConfig", sock: socket.socket) -> str:
    host = "localhost" if config.host in ("0.0.0.0", "::") else config.host
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
