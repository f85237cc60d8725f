"""Requests over plain sockets in all four APIs, because a client has to leave in the middle of things and to see every
event.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
MODEL = "tiny-reasoner"
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
_FINISH = {
    **{"end_turn": "stop", "max_tokens": "length", "stop_sequence": "stop"},
    **{"completed": "stop", "incomplete": "length", "cancelled": "abort"},
}


@dataclass(slots=True)
class Answer:
    """What has come back for one request, in the same form for all APIs.

    texts: [reasoning, content] of every choice · usage: tokens of prompt and answer, if it was told
    error: the code of what went wrong, "connection" where nobody said · is_whole: it has ended as its API says
    has_left: we did · arrivals: when text came, seconds after the request · faults: of its form
    """

    api: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    id: str = ""
    texts: dict[int, list[str]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    cached: int = 0  # of the prompt's tokens
    error: str = ""
    message: str = ""
    is_whole: bool = False
    has_left: bool = False
    num_events: int = 0
    arrivals: list[float] = field(default_factory=list)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    content: bytes = b""  # of what was not streamed

    @property
    def is_good(self) -> bool:
        return self.status == 200 and self.is_whole and not self.error

    @property
    def choices(self) -> tuple[tuple[str, str, str], ...]:
        """(reasoning, content, finish reason) of all choices."""
        return tuple(
            (self.texts[i][0], self.texts[i][1], self.finish.get(i, "")) for i in sorted(self.texts)
        )

    def add(self, choice: int, reasoning: str, content: str) -> None:
        texts = self.texts.setdefault(choice, ["", ""])
        texts[0] += reasoning
        texts[1] += content

    def named(self, request_id: str) -> None:
        if self.id and request_id != self.id:
            self.faults.append(f"an event of {request_id} in the stream of {self.id}")
        self.id = request_id

    def ended(self, choice: int, reason: str | None) -> None:
        if reason is not None:
            self.finish[choice] = _FINISH.get(reason, reason)

    def failed(self, error: dict[str, Any]) -> None:
        self.error = error.get("code") or error.get("type") or "unknown"
        self.message = error.get("message", "")


async def exchange(
    port: int,
    api: str,
    body: dict[str, Any],
    *,
    leave: Callable[[Answer], bool] = lambda answer: False,
    patience_s: float | None = None,
) -> Answer:
    """One request. leave: asked after every event whether to hang up · patience_s: to hang up before anything comes."""
    answer, begin = Answer(api), time.perf_counter()
    writer = None
    try:
        reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 24)
        send(writer, PATHS[api], body)
        async with asyncio.timeout(patience_s):
            answer.status, answer.headers = await read_head(reader)
        if answer.status != 200 or not body.get("stream"):
            size = int(answer.headers["content-length"])
            async with asyncio.timeout(patience_s):
                answer.content = await reader.readexactly(size)
            _read_body(answer)
        else:
            await _read_stream(answer, reader, begin, leave)
    except TimeoutError:
        answer.has_left = True
    except (OSError, asyncio.IncompleteReadError) as error:
        answer.error, answer.message = "connection", repr(error)
    finally:
        answer.seconds = time.perf_counter() - begin
        if writer is not None:
            if not answer.is_whole:
                writer.transport.abort()
            writer.close()
    return answer


def send(writer: asyncio.StreamWriter, path: str, data: Any = None) -> None:
    """A GET, or a POST of JSON."""
    content = b"" if data is None else json.dumps(data).encode()
    head = f"{'GET' if data is None else 'POST'} {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}\r\n".encode() + content)


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line = await reader.readline()
    if not line:
        raise ConnectionResetError("the connection was closed before an answer")
    headers = {}
    while header := (await reader.readline()).strip():
        name, _, value = header.decode().partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers


async def ask(port: int, path: str, data: Any = None) -> tuple[int, bytes]:
    """Status and body of anything else."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 24)
    try:
        send(writer, path, data)
        status, headers = await read_head(reader)
        return status, await reader.readexactly(int(headers["content-length"]))
    finally:
        writer.close()


async def ask_json(port: int, path: str, data: Any = None) -> Any:
    """Of an answer that must be 200."""
    status, content = await ask(port, path, data)
    if status != 200:
        raise RuntimeError(f"{path}: {status} {content[:300]!r}")
    return json.loads(content)


async def events(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """Data of a stream's events; None for [DONE]."""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            payload = line[6:].strip()
            yield None if payload == b"[DONE]" else json.loads(payload)


async def _read_stream(
    answer: Answer,
    reader: asyncio.StreamReader,
    begin_s: float,
    leave: Callable[[Answer], bool],
) -> None:
    take = _EVENTS[answer.api]
    async for event in events(reader):
        if answer.is_whole:
            answer.faults.append(f"an event after the end: {str(event)[:200]}")
        if event is None:
            answer.is_whole = True
            continue
        answer.num_events += 1
        if "error" in event and event.get("error"):
            answer.failed(event["error"])
            answer.is_whole = answer.api == "messages"  # the others have an end of their own
            continue
        if take(answer, event):
            answer.arrivals.append(time.perf_counter() - begin_s)
        if leave(answer):
            answer.has_left = True
            return
    if not answer.is_whole:
        answer.error = answer.error or "connection"


def _chat_event(answer: Answer, event: dict[str, Any]) -> bool:
    answer.named(event["id"])
    has_text = False
    for choice in event["choices"]:
        delta = choice["delta"]
        reasoning, content = delta.get("reasoning_content") or "", delta.get("content") or ""
        answer.add(choice["index"], reasoning, content)
        answer.ended(choice["index"], choice["finish_reason"])
        has_text = has_text or bool(reasoning or content)
    _take_usage(answer, event.get("usage"))
    return has_text


def _completions_event(answer: Answer, event: dict[str, Any]) -> bool:
    answer.named(event["id"])
    for choice in event["choices"]:
        answer.add(choice["index"], "", choice["text"])
        answer.ended(choice["index"], choice["finish_reason"])
    _take_usage(answer, event.get("usage"))
    return any(choice["text"] for choice in event["choices"])


def _responses_event(answer: Answer, event: dict[str, Any]) -> bool:
    if event["sequence_number"] != answer.num_events - 1:
        answer.faults.append(f"event {event['sequence_number']} in place {answer.num_events - 1}")
    kind = event["type"]
    if (response := event.get("response")) is not None:
        answer.named(response["id"])
    if kind == "response.reasoning_text.delta":
        answer.add(0, event["delta"], "")
    elif kind == "response.output_text.delta":
        answer.add(0, "", event["delta"])
    elif kind in ("response.completed", "response.incomplete", "response.failed"):
        answer.is_whole = True
        if kind == "response.failed":
            answer.failed(response["error"])
            return False
        answer.add(0, "", "")
        answer.ended(0, response["status"])
        _take_usage(answer, response["usage"])
    return kind.endswith("_text.delta")


def _messages_event(answer: Answer, event: dict[str, Any]) -> bool:
    kind = event["type"]
    if kind == "message_start":
        answer.named(event["message"]["id"])
        answer.add(0, "", "")
    elif kind == "content_block_delta":
        delta = event["delta"]
        answer.add(0, delta.get("thinking", ""), delta.get("text", ""))
        return delta["type"] in ("thinking_delta", "text_delta")
    elif kind == "message_delta":
        answer.ended(0, event["delta"]["stop_reason"])
        _take_usage(answer, event["usage"])
    elif kind == "message_stop":
        answer.is_whole = True
    return False


_EVENTS = {
    "chat": _chat_event,
    "completions": _completions_event,
    "responses": _responses_event,
    "messages": _messages_event,
}


def _take_usage(answer: Answer, usage: dict[str, Any] | None) -> None:
    if not usage:
        return
    if "prompt_tokens" in usage:
        answer.usage = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached = usage["prompt_tokens_details"]["cached_tokens"]
    elif "cache_read_input_tokens" in usage:  # which Anthropic's input leaves out
        answer.cached = usage["cache_read_input_tokens"]
        answer.usage = usage["input_tokens"] + answer.cached, usage["output_tokens"]
    else:
        answer.usage = usage["input_tokens"], usage["output_tokens"]
        answer.cached = usage["input_tokens_details"]["cached_tokens"]


def _read_body(answer: Answer) -> None:
    answer.is_whole = True
    data = json.loads(answer.content)
    if data.get("error"):
        answer.failed(data["error"])
        return
    answer.named(data["id"])
    _take_usage(answer, data["usage"])
    if answer.api == "chat":
        for choice in data["choices"]:
            message = choice["message"]
            answer.add(
                choice["index"], message.get("reasoning_content") or "", message["content"] or ""
            )
            answer.ended(choice["index"], choice["finish_reason"])
    elif answer.api == "completions":
        for choice in data["choices"]:
            answer.add(choice["index"], "", choice["text"])
            answer.ended(choice["index"], choice["finish_reason"])
    elif answer.api == "responses":
        answer.add(0, "", "")
        for item in data["output"]:
            text = "".join(part["text"] for part in item.get("content", ()))
            answer.add(0, *((text, "") if item["type"] == "reasoning" else ("", text)))
        answer.ended(0, data["status"])
    else:
        answer.add(0, "", "")
        for block in data["content"]:
            answer.add(0, block.get("thinking", ""), block.get("text", ""))
        answer.ended(0, data["stop_reason"])
