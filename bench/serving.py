"""What the benchmarks of `moejet serve` share: its process, requests in all four APIs, and what /proc and /metrics say.

The client speaks HTTP over plain sockets, because it has to leave in the middle of things and to see every event.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENGINE = Path(__file__).resolve().parent.parent / "engine"
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
    else:
        cached = usage.get("cache_read_input_tokens", 0)  # Anthropic's input leaves these out
        answer.usage = usage["input_tokens"] + cached, usage["output_tokens"]


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


class ServerProcess:
    """`moejet serve` with the embedded reasoner. Its log goes to a file: a pipe that nobody reads would stop it."""

    def __init__(
        self, options: Sequence[str], log: Path, environment: dict[str, str] | None = None
    ):
        self.log = log
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self._options = list(options)
        self._environment = {
            **{**os.environ, "PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"},
            **(environment or {}),
        }

    def start(self) -> None:
        """Returns once it answers; a second time on the same port."""
        command = [sys.executable, "-m", "moejet", "serve", "--port", str(self.port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *self._options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for the benchmark
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if ":" not in line:
            raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")
        self.port = int(line.rsplit(":", 1)[1])

    @property
    def pid(self) -> int:
        assert self.process is not None, "it has been started"
        return self.process.pid

    @property
    def engine_pid(self) -> int | None:
        found = children(self.pid)
        return found[0] if found else None

    def stop(self, timeout_s: float = 90.0) -> int:
        """Its exit code."""
        assert self.process is not None, "it has been started"
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()

    def tracebacks(self) -> int:
        return self.log.read_text(errors="replace").count("Traceback")


def children(pid: int) -> list[int]:
    """Those that have not been waited for included."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        found = [(task / "children").read_text() for task in tasks]
    except OSError:
        return []
    return [int(text) for line in found for text in line.split()]


def cpu_s(pid: int | None) -> float:
    """Processor time of a process so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process: resident memory in MB, open files, threads, children."""

    mb: float
    files: int
    threads: int
    children: int

    @classmethod
    def of(cls, pid: int | None) -> Usage | None:
        """None if there is no such process."""
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{pid}/fd"))
            threads = len(os.listdir(f"/proc/{pid}/task"))
        except (OSError, IndexError):
            return None
        assert pid is not None, "it was found"
        return cls(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files, threads, len(children(pid)))


Metrics = dict[tuple[str, str], float]


async def scrape(port: int) -> Metrics:
    """Values of /metrics by (name without prefix, labels without the model's name)."""
    _, content = await ask(port, "/metrics")
    found: Metrics = {}
    for line in content.decode().splitlines():
        head, _, value = line.rpartition(" ")
        if line.startswith("moejet:"):
            name, _, labels = head.removeprefix("moejet:").removesuffix("}").partition("{")
            kept = [part for part in labels.split(",") if not part.startswith("model_name=")]
            found[name, ",".join(kept)] = float(value)
    return found


def total(metrics: Metrics, name: str, label: str = "") -> float:
    """Sum over the labels of a name that hold a text."""
    return sum(v for (n, labels), v in metrics.items() if n == name and label in labels)


def quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds."""
    if not seconds:
        return None
    values = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        n: round(1e3 * values[min(len(values) - 1, int(q * len(values)))], 3) for n, q in at.items()
    }
