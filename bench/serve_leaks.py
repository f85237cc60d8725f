"""Does `moejet serve` give back what requests took? Everything that clients do to it, then a look at what is left.

    python bench/serve_leaks.py --rounds 1000 --sockets 2000

A round is one of: a whole answer, streamed or not; a stream, of one or three samples, that the client leaves; a
request whose client leaves before its answer; one that is aborted by its id; wrong input; half a request; a connection
that asks for nothing. Eight clients make them at the same time, with the embedded tiny reasoner. Then idle connections
are opened, and requests are made beside them until the server has closed them all. One JSON line:

  before, after   of the server and of the engine: resident memory (MB), open files, tasks of the server's event loop,
                  samples that run or wait, requests, and blocks of the cache that somebody holds; `before` follows a
                  tenth as many rounds, which fill what is kept on purpose
  idle            sockets that were open at once, milliseconds of /health and of an answer beside them, seconds until
                  all of them had been closed, and how many of them were closed by the server
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer

ENGINE = Path(__file__).resolve().parent.parent / "engine"
HOST = "127.0.0.1"
NUM_CLIENTS = 8
MOST_MB = 12.0  # by which memory may differ: allocators keep some of what they had
CHAT = "/v1/chat/completions"


def body(rng: random.Random, **fields: Any) -> dict[str, Any]:
    text = f"Start with {rng.randrange(100)}, add {rng.randrange(100)}."
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 40, **fields}


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(HOST, port)


def send(writer: asyncio.StreamWriter, path: str, data: Any = None) -> None:
    content = b"" if data is None else json.dumps(data).encode()
    verb = "GET" if data is None else "POST"
    head = f"{verb} {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}\r\n".encode() + content)


async def ask(port: int, path: str, data: Any = None) -> tuple[int, bytes]:
    """Status and body of a whole answer."""
    reader, writer = await connect(port)
    try:
        send(writer, path, data)
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        return int(head.split()[1]), content
    finally:
        writer.close()


async def whole(port: int, rng: random.Random) -> None:
    status, _ = await ask(port, CHAT, body(rng, stream=rng.random() < 0.5))
    assert status == 200, f"{status=}"


async def left_stream(port: int, rng: random.Random) -> None:
    reader, writer = await connect(port)
    send(writer, CHAT, body(rng, stream=True, n=rng.choice((1, 3)), max_tokens=200))
    for _ in range(rng.randrange(1, 30)):
        await reader.readline()
    writer.transport.abort()


async def left_before_the_answer(port: int, rng: random.Random) -> None:
    _, writer = await connect(port)
    send(writer, CHAT, body(rng, max_tokens=400))
    await asyncio.sleep(rng.random() * 0.05)
    writer.transport.abort()


async def aborted(port: int, rng: random.Random) -> None:
    reader, writer = await connect(port)
    send(writer, CHAT, body(rng, stream=True, max_tokens=400, ignore_eos=True))
    while not (line := await reader.readline()).startswith(b"data: "):
        assert line, "the stream has ended"
    request_id = json.loads(line[6:])["id"]
    await ask(port, f"/v1/requests/{request_id}/abort", {})
    await reader.read()
    writer.close()


async def wrong(port: int, rng: random.Random) -> None:
    data = rng.choice(
        (
            {"messages": []},
            body(rng, temperature=-1),
            body(rng, n=10**6),
            body(rng, surprise=1),
            body(rng, max_tokens=-1),
        )
    )
    status, _ = await ask(port, CHAT, data)
    assert status == 400, f"{status=} {data=}"


async def half_a_request(port: int, rng: random.Random) -> None:
    _, writer = await connect(port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    data = head.encode() + b'{"messages": ['
    writer.write(data[: rng.randrange(1, len(data))])
    await asyncio.sleep(rng.random() * 0.02)
    writer.transport.abort()


async def nothing(port: int, rng: random.Random) -> None:
    _, writer = await connect(port)
    writer.close()


KINDS = (whole, left_stream, left_before_the_answer, aborted, wrong, half_a_request, nothing)


async def run_rounds(port: int, num_rounds: int, seed: int) -> dict[str, int]:
    done: Counter[str] = Counter()
    rounds = iter(range(num_rounds))

    async def client(number: int) -> None:
        rng = random.Random(seed * NUM_CLIENTS + number)
        for _ in rounds:
            kind = rng.choice(KINDS)
            try:
                await asyncio.wait_for(kind(port, rng), 60)
            except TimeoutError as error:
                health = (await ask(port, "/health"))[1].decode()
                raise TimeoutError(f"{kind.__name__} took more than 60 s: {health}") from error
            done[kind.__name__] += 1

    await asyncio.gather(*(client(i) for i in range(NUM_CLIENTS)))
    return dict(done)


async def state(port: int) -> dict[str, float]:
    """What is in use, once nothing runs any more."""
    deadline = time.monotonic() + 30
    while True:
        text = (await ask(port, "/metrics"))[1].decode()
        found = {}
        for line in text.splitlines():
            name, _, value = line.partition("} ")
            if value:
                found[name] = float(value)
        now = {
            "server_mb": value_of(found, "process_resident_memory_bytes", "server") / 1e6,
            "engine_mb": value_of(found, "process_resident_memory_bytes", "engine") / 1e6,
            "server_files": value_of(found, "process_open_fds", "server"),
            "engine_files": value_of(found, "process_open_fds", "engine"),
            "tasks": value_of(found, "event_loop_tasks"),
            "running": value_of(found, "num_requests_running"),
            "waiting": value_of(found, "num_requests_waiting"),
            "requests": value_of(found, "num_requests"),
            "held_share": value_of(found, "kv_cache_usage_perc"),
        }
        is_idle = not any(now[n] for n in ("running", "waiting", "requests", "held_share"))
        if is_idle or time.monotonic() > deadline:
            return {name: round(value, 1) for name, value in now.items()}
        await asyncio.sleep(0.2)


def value_of(found: dict[str, float], name: str, process: str = "") -> float:
    begin = f"moejet:{name}{{"
    return next(v for n, v in found.items() if n.startswith(begin) and f'"{process}' in n)


async def idle(port: int, num_sockets: int, wait_s: float) -> dict[str, Any]:
    """Requests beside connections that ask for nothing, until all of those have been closed."""
    sockets = [await connect(port) for _ in range(num_sockets)]
    begin = time.perf_counter()
    closed = asyncio.gather(*(reader.read() for reader, _ in sockets))
    health_ms, answer_ms = [], []
    rng = random.Random(0)
    while not closed.done() and time.perf_counter() - begin < wait_s:
        for path, data, found in (
            ("/health", None, health_ms),
            (CHAT, body(rng, max_tokens=8), answer_ms),
        ):
            start = time.perf_counter()
            status, _ = await ask(port, path, data)
            assert status == 200, f"{path=} {status=}"
            found.append(1e3 * (time.perf_counter() - start))
        await asyncio.sleep(0.1)
    seconds = time.perf_counter() - begin
    num_closed = sum(reader.at_eof() for reader, _ in sockets)
    closed.cancel()
    for _, writer in sockets:
        writer.close()
    return {
        "sockets": num_sockets,
        "closed": num_closed,
        "seconds": round(seconds, 1),
        "health_ms": quantiles(health_ms),
        "answer_ms": quantiles(answer_ms),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(ordered[len(ordered) // 2], 1),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 1),
        "max": round(ordered[-1], 1),
    }


async def measure(args: argparse.Namespace, port: int) -> dict[str, Any]:
    await run_rounds(port, max(2 * NUM_CLIENTS, args.rounds // 10), 1)
    before = await state(port)
    begin = time.perf_counter()
    done = await run_rounds(port, args.rounds, 2)
    seconds = time.perf_counter() - begin
    after = await state(port)
    found = await idle(port, args.sockets, args.header_timeout + 30)
    last = await state(port)
    leaks = [
        name
        for state_now in (after, last)
        for name, value in state_now.items()
        if value - before[name] > (MOST_MB if name.endswith("_mb") else 0)
    ]
    return {
        "rounds": done,
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
        "idle": found,
        "after_idle": last,
        "leaks": leaks,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--sockets", type=int, default=2000)
    parser.add_argument("--header-timeout", type=float, default=20.0, help="of the server, seconds")
    add_json_option(parser, "-")
    args = parser.parse_args(arguments)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    provenance = describe_environment()
    environment = {**os.environ, "PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moejet", "serve", "--port", "0", "--no-access-log"]
    command += ["--header-timeout", str(args.header_timeout)]
    with (
        tempfile.TemporaryFile(
            "w+"
        ) as log,  # a pipe that nobody reads would fill up and stop the server
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as server,
    ):
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            result = asyncio.run(measure(args, port))
        finally:
            server.terminate()
            server.wait(60)
            log.seek(0)
            num_tracebacks = log.read().count("Traceback")
    result |= {"exit_code": server.returncode, "tracebacks": num_tracebacks}
    with line_writer(args.json) as write:
        write({"bench": "serve_leaks", **provenance, **result})
    is_good = not result["leaks"] and result["idle"]["closed"] == args.sockets
    return 0 if is_good and not result["tracebacks"] and not server.returncode else 1


if __name__ == "__main__":
    sys.exit(main())
