"""A server for the chat page that answers as it is told, so that every case of a stream can be brought about."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from moejet.server.config import ServerConfig
from moejet.server.page import page_router

SHOWCASE = """Here is the **derivative** of a product, with `code` and a [link](https://example.org/a).

$$\\frac{d}{dx}\\bigl(u\\,v\\bigr) = u'v + uv', \\qquad \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$

Inline $e^{i\\pi} + 1 = 0$ and \\(a_n \\to \\infty\\), but $5 and $6 are amounts.

| method | time | error |
|---|--:|--:|
| direct | 12.1 s | 0.3 % |
| iterative | 3.4 s | 1.2 % |

```python
def gcd(a: int, b: int) -> int:
    while b:  # Euclid
        a, b = b, a % b
    return a
```

1. First, *this*.
2. Then that:
   - [x] done
   - [ ] open

> A quotation.
"""
ATTACKS = """<img src=x onerror="window.hacked=1"> <script>window.hacked=2</script>

[a](javascript:window.hacked=3) [b](JaVaScRiPt&colon;window.hacked=4)
[c](data:text/html,<script>window.hacked=5</script>)

![beacon](http://beacon.test/pixel.png) ![x](x" onerror="window.hacked=6)  ![own](/v1/models)

<a href="java&#x0A;script:window.hacked=7">d</a>

<svg onload="window.hacked=8"><style><img src=x onerror=window.hacked=9>

<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.hacked=10&gt;">

$\\href{javascript:window.hacked=11}{x}$ $\\htmlId{a}{b}$ $\\text{<img src=x onerror=window.hacked=12>}$
$\\includegraphics{http://beacon.test/y.png}$ $\\color{red;background:url(http://beacon.test/z)}{x}$
$\\style{background:url(http://beacon.test/w)}{x}$ $\\class{a}{x}$ $\\def\\x{\\x\\x}\\x$

```html"><img src=x onerror=window.hacked=13>
<iframe src="http://beacon.test/"></iframe>
```

<form action="http://beacon.test/"><input type="image" src="http://beacon.test/i.png"><button>go</button></form>
<link rel=stylesheet href=http://beacon.test/s.css><base href=http://beacon.test/><meta http-equiv=refresh content="0;url=http://beacon.test/">
<span style="background:url(http://beacon.test/b)">styled</span> <a id=forms name=body>clobber</a> http://beacon.test/auto

| <img src=x onerror=window.hacked=14> | b |
|---|---|
| <b onclick=window.hacked=15>c</b> | d<br>e |

last line"""


class StandIn:
    """Answers as the last message says, in the form of the server's streams."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.ended: set[str] = set()
        self.num_left = 0  # streams that the client left before their end
        self.key: str | None = None
        self.app = FastAPI()
        self.app.include_router(page_router(ServerConfig()))
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        path = "/v1/requests/{request_id}/end_thinking"
        self.app.add_api_route(path, self._end_thinking, methods=["POST"])

    def _refused(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "this server needs an API key")

    async def _models(self, request: Request) -> Response:
        refused = self._refused(request)
        return refused or JSONResponse({"object": "list", "data": [{"id": "tiny-reasoner"}]})

    async def _end_thinking(self, request_id: str) -> Response:
        self.ended.add(request_id)
        return JSONResponse({"id": request_id, "object": "request", "ok": True})

    async def _chat(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        body = await request.json()
        self.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "overload" and sum(b == body for b in self.bodies) % 2:
            return _error(503, "the queue is full: 8 requests wait", {"retry-after": "2"})
        events = self._events(text, body, f"chatcmpl-{len(self.bodies)}")
        return StreamingResponse(self._counted(events), media_type="text/event-stream")

    async def _counted(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.num_left += 1
            raise

    async def _events(self, text: str, body: dict[str, Any], id: str) -> AsyncIterator[bytes]:
        n = body.get("n", 1)

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "finish_reason": reason}
            return _event({"id": id, "model": "tiny-reasoner", "choices": [choice]})

        for i in range(n):
            yield chunk(i, {"role": "assistant", "content": ""})
        yield b": keep-alive\n\n"
        num_reasoning = num_content = 0
        while num_reasoning < (10_000 if "ponder" in text else 8) and id not in self.ended:
            for i in range(n):
                thought = f"step {num_reasoning} "
                yield chunk(i, {"reasoning_content": thought, "reasoning": thought})
            num_reasoning += 1
            await asyncio.sleep(0.03)
        answers = [_answer(text, i, len(self.bodies)) for i in range(n)]
        for words in zip(*(a.split(" ") for a in answers), strict=True):
            for i, word in enumerate(words):
                yield chunk(i, {"content": word if num_content == 0 else " " + word})
            num_content += 1
            await asyncio.sleep(0.002 if "story" not in text else 0.02)
            if "break" in text and num_content == 3:
                yield _event({"error": {"message": "the engine stopped", "code": "engine_dead"}})
                yield b"data: [DONE]\n\n"
                return
        for i in range(n):
            yield chunk(i, {}, "stop")
        usage = {
            "prompt_tokens": 12,
            "completion_tokens": n * (num_reasoning + num_content) * (10 if n > 1 else 1),
            "completion_tokens_details": {"reasoning_tokens": n * num_reasoning},
        }
        timings = {"predicted_per_second": 123.4}
        yield _event({"id": id, "choices": [], "usage": usage, "timings": timings})
        yield b"data: [DONE]\n\n"


def _answer(text: str, index: int, number: int) -> str:
    if text == "showcase":
        return SHOWCASE
    if text == "attack":
        return ATTACKS
    if "story" in text:
        return "word " * 500
    return f"Answer {number}.{index} to: {text}"


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": None}}, status, headers)
