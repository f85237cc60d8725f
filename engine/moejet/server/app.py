"""The HTTP application.

>>> app = asgi_app(AsyncLLM("org/model"))          # for uvicorn, or to be mounted: other.mount("/llm", app)

A request is read and checked, rendered and tokenised on a thread, queued with the backend, and answered by one of the
dialects' renderers, streamed or whole. When the client leaves, it is ended wherever it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from moejet.server.backend import Backend, LocalBackend
from moejet.server.config import ServerConfig
from moejet.server.errors import ApiError, dialect_of
from moejet.server.generation import Generation, Observer, Plan
from moejet.server.health import health_router
from moejet.server.metrics import ServerMetrics, metrics_router
from moejet.server.middleware import Guard, read_json
from moejet.server.openapi import describe
from moejet.server.page import PAGE_PATHS, page_router
from moejet.server.prompts import PromptMaker
from moejet.server.protocol.answers import Renderer, collect, stream
from moejet.server.protocol.common import Context
from moejet.server.protocol.fields import ApiModel, parse
from moejet.server.routes import add_routes
from moejet.server.sse import WorkResponse, error_response
from moejet.server.strategy_generation import StrategyGeneration
from moejet.server.strategy_metrics import StrategyMetrics
from moejet.server.tool_calls import detect_tool_format
from moejet.validation import require_type, short

if TYPE_CHECKING:
    from moejet.async_llm import AsyncLLM
    from moejet.llm import LLM

_PROMPT_THREADS = 2
_CLIENT_LEFT = 499  # as nginx calls it
PUBLIC_PATHS = ("/health", "/ready")

Model = TypeVar("Model", bound=ApiModel)
Result = TypeVar("Result")


@dataclass(slots=True)
class Server:
    """What the endpoints share. threads: end with this object, so that an application may be started again."""

    backend: Backend
    config: ServerConfig
    context: Context
    observer: Observer
    threads: ThreadPoolExecutor
    strategy_metrics: StrategyMetrics

    async def read(self, request: Request, kind: type[Model]) -> Model:
        """The checked body of a request."""
        return parse(kind, await read_json(request, self.config))

    async def prepared(self, make: Callable[..., Result], *args: Any) -> Result:
        """Runs what takes as long as a prompt is long, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, make, *args)

    def respond(
        self,
        request: Request,
        prepare: Callable[[], Any],
        make_renderer: Callable[[Any], Renderer],
        *,
        is_streamed: bool,
        plan_of: Callable[[Any], Plan] = lambda prepared: prepared,
        before: Callable[[Any], Awaitable[None]] | None = None,
    ) -> Response:
        """The answer to a request: prepare() runs on a thread and makes the plan, or what plan_of finds it in.

        before: what is to be done with what was prepared before it runs
        """
        running: list[Generation | StrategyGeneration] = []

        async def start() -> dict[str, Any] | AsyncGenerator[bytes]:
            prepared = await self.prepared(prepare)
            if before is not None:
                await before(prepared)
            salt = request.scope.get("state", {}).get("cache_salt")
            plan, renderer = plan_of(prepared).salted(salt), make_renderer(prepared)
            generation = self._generation(plan)
            running.append(generation)
            await generation.start()
            if is_streamed:
                return stream(generation, renderer)
            num_choices = len(plan.jobs) * plan.jobs[0].params.n if plan.jobs else 0
            answers = await collect(generation, num_choices)
            return renderer.body(answers, generation.totals())

        def cancel() -> None:
            for generation in running:
                generation.cancel()

        return WorkResponse(start, dialect=dialect_of(request.url.path), on_cancel=cancel)

    def _generation(self, plan: Plan) -> Generation | StrategyGeneration:
        observer, keep_alive_s = self.observer, self.config.keep_alive_s
        if plan.solve is None:
            return Generation(self.backend, plan, keep_alive_s=keep_alive_s, observer=observer)
        return StrategyGeneration(
            self.backend,
            plan,
            keep_alive_s=keep_alive_s,
            observer=observer,
            metrics=self.strategy_metrics,
        )


def asgi_app(
    llm: AsyncLLM | LLM | Backend,
    config: ServerConfig | None = None,
    *,
    observer: Observer | None = None,
    public_paths: tuple[str, ...] = (),
    **options: Any,
) -> FastAPI:
    """An ASGI application that serves a loaded model; it stays the caller's to close, except for an `LLM`.

    config, or options: the fields of `ServerConfig` · observer: is told of every request · public_paths: of routes that
    the caller adds and that need no API key
    """
    if config is not None and options:
        raise ValueError(f"config and {', '.join(options)} are given: put all of them into config")
    config = ServerConfig(**options) if config is None else config
    require_type("config", config, ServerConfig)
    if observer is not None and not isinstance(observer, Observer):
        raise ValueError(f"observer={short(observer)} must have the methods of Observer")
    if not isinstance(public_paths, tuple | list) or not all(
        isinstance(path, str) and path.startswith("/") for path in public_paths
    ):
        raise ValueError(f"public_paths={short(public_paths)} must be paths that begin with /")
    backend, owned = _backend_of(llm, config)
    metrics = ServerMetrics(backend)
    server = _server(
        backend,
        config,
        observer or metrics,
        StrategyMetrics(metrics.registry, backend.card.name),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if owned is not None:
            await owned.close(drain=False)

    app = FastAPI(
        title="moejet",
        description="OpenAI's and Anthropic's dialects over one engine.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={
            ApiError: _answer_error,
            ClientDisconnect: _answer_nobody,
            HTTPException: _answer_http_error,
            ValueError: _answer_error,
            Exception: _answer_error,
        },
    )
    app.state.server = server
    public = (*PUBLIC_PATHS, *PAGE_PATHS, *public_paths)
    app.add_middleware(Guard, config=config, public=public)
    add_routes(app, server)
    app.include_router(health_router(backend))
    app.include_router(metrics_router(metrics))
    describe(app)
    app.include_router(page_router(config))  # not part of the API's description
    return app


def _backend_of(
    llm: AsyncLLM | LLM | Backend, config: ServerConfig
) -> tuple[Backend, AsyncLLM | None]:
    """The backend, and the engine behind it if that is the application's to close."""
    if hasattr(llm, "card"):
        return cast("Backend", llm), None
    # Not at the top: it loads torch, which a server beside its engine does not need.
    from moejet.async_llm import AsyncLLM

    if not isinstance(llm, AsyncLLM):
        owned = engine = AsyncLLM.from_llm(llm)
    else:
        owned, engine = None, llm
    name = config.model_name or Path(engine.config.model).name
    return LocalBackend(engine, name=name), owned


def _server(
    backend: Backend, config: ServerConfig, observer: Observer, strategy_metrics: StrategyMetrics
) -> Server:
    tokenizer = backend.card.tokenizer
    context = Context(
        card=backend.card,
        config=config,
        prompts=PromptMaker(tokenizer, backend.card.max_context),
        tool_format=detect_tool_format(tokenizer) if tokenizer is not None else None,
    )
    threads = ThreadPoolExecutor(_PROMPT_THREADS, thread_name_prefix="moejet-render")
    return Server(backend, config, context, observer, threads, strategy_metrics)


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(error, dialect_of(request.url.path))


async def _answer_nobody(_: Request, error: Exception) -> Response:
    """The client left before its request was complete; the status is for the log."""
    return Response(status_code=_CLIENT_LEFT)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), f"{error=}"
    path = request.url.path[:200]
    allowed = (error.headers or {}).get("allow", "another method")
    message = {
        404: f"there is nothing at {path}: see /openapi.json for what there is",
        405: f"{request.method} is not for {path}: use {allowed}",
    }
    known = ApiError(
        error.status_code,
        message.get(error.status_code, str(error.detail)),
        headers=error.headers,
        code="not_found" if error.status_code == 404 else None,
    )
    return error_response(known, dialect_of(request.url.path))
