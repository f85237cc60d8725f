"""One tiny reasoner per module, and ways to ask a server about it."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from moejet import AsyncLLM
from moejet.server import asgi_app, serve_in_thread
from moejet.server.backend import LocalBackend
from moejet.tokenizer import Tokenizer

# Conversations with tools, in the form that models of the Hermes family were taught.
TOOL_TEMPLATE = """{{- bos_token -}}
{%- if tools -%}{{- '<|user|>Tools: ' + (tools | tojson) + ' Answer with <tool_call>{...}</tool_call>.' -}}{%- endif -%}
{%- for message in messages -%}
{{- ('<|assistant|>' if message.role == 'assistant' else '<|user|>') + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '</tool_call>' -}}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|><think>\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""


@dataclass
class Reply:
    status: int
    headers: httpx.Headers
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """Data of a stream's events, the end marker left out."""
        lines = [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


Ask = Callable[..., Reply]


def _ask(app: Any) -> Ask:
    def ask(path: str, body: Any = None, *, method: str | None = None, **kw: Any) -> Reply:
        async def send() -> Reply:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                if body is not None:
                    kw["json"] = body
                verb = method or ("GET" if body is None and "content" not in kw else "POST")
                response = await client.request(verb, path, **kw)
                return Reply(response.status_code, response.headers, response.text)

        return asyncio.run(send())

    return ask


@pytest.fixture(scope="session")
def ask_app() -> Callable[[Any], Ask]:
    """Makes a function that asks an application, without a network."""
    return _ask


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM()
    yield llm
    asyncio.run(llm.close(drain=False))


@pytest.fixture(scope="module")
def app(llm: AsyncLLM) -> Any:
    return asgi_app(llm)


@pytest.fixture(scope="module")
def ask(app: Any) -> Ask:
    return _ask(app)


def _with_tools(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(
        tokenizer.raw,
        special_tokens=tokenizer.special_tokens,
        chat_templates={"default": TOOL_TEMPLATE},
        eos_token_ids=tokenizer.eos_token_ids,
    )


@pytest.fixture(scope="module")
def tool_tokenizer(llm: AsyncLLM) -> Tokenizer:
    """The tiny reasoner's with a template that knows tools."""
    return _with_tools(llm.tokenizer)


@pytest.fixture(scope="module")
def tool_app(llm: AsyncLLM, tool_tokenizer: Tokenizer) -> Any:
    backend = LocalBackend(llm, name="tiny-reasoner")
    backend.card = replace(backend.card, tokenizer=tool_tokenizer)
    return asgi_app(backend)


@dataclass
class Served:
    """An application behind a real server on a free port."""

    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Any], Served]]:
    """Starts servers that end with the session."""
    with ExitStack() as running:
        yield lambda app: Served(running.enter_context(serve_in_thread(app)))


@pytest.fixture(scope="module")
def served(app: Any, serve: Callable[[Any], Served]) -> Served:
    return serve(app)


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Waits until something holds."""

    def wait(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        until = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until, "it did not come true in time"
            time.sleep(0.01)

    return wait
