"""A server on a thread: it is there for as long as the block runs, with the application's lifespan."""

import asyncio
import socket
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI

from moejet import LLM
from moejet.server import asgi_app, serve_in_thread


def test_it_serves_until_the_block_ends():
    events = []

    @asynccontextmanager
    async def lifespan(_):
        events.append("begin")
        yield
        events.append("end")

    with serve_in_thread(FastAPI(lifespan=lifespan)) as url:
        assert httpx.get(url).status_code == 404
        assert events == ["begin"]
    assert events == ["begin", "end"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_request_that_never_ends_does_not_hold_it_up():
    app = FastAPI()

    @app.get("/")
    async def wait() -> None:
        await asyncio.sleep(60)

    with serve_in_thread(app) as url, pytest.raises(httpx.ReadTimeout):
        httpx.get(url, timeout=0.2)


def test_what_does_not_start_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"), serve_in_thread(FastAPI(), port=port):
            pass

    @asynccontextmanager
    async def lifespan(_):
        raise ValueError("no model")
        yield

    app = FastAPI(lifespan=lifespan)
    with pytest.raises(RuntimeError, match="did not start"), serve_in_thread(app):
        pass


def test_a_model_that_was_given_is_closed_with_it():
    llm = LLM()
    with serve_in_thread(asgi_app(llm)) as url:
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
    with pytest.raises(ValueError, match="closed"):
        llm.score([1, 2])
