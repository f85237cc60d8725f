"""Many streaming clients against `moejet serve` with the embedded tiny reasoner, with clients that leave and an engine
that is killed.

    python bench/serve_load.py --clients 256 --minutes 5 --kills 20

Every answer is compared with the one that the same question and seed got when nothing else ran (the engine is
deterministic), also as far as it came when the client left. One JSON line:

  lost           streams that ended without [DONE] and without an error event
  crossed        streams whose text was not that of their question
  killed         streams that ended with an error event because the engine's process was killed; they count as neither
  rejected       requests answered with 503; clients wait as Retry-After says, but at most 5 s, and ask again
  ttft, itl      milliseconds from the request to the first token, and between two events of a stream
  recovery       milliseconds from a kill to the next answered request
  *_cpu_us       processor time of the server's and of the engine's process per event that a client has read; starts of
                 the engine after kills are left out
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer

ENGINE = Path(__file__).resolve().parent.parent / "engine"
NUM_QUESTIONS = 32
HOST = "127.0.0.1"


@dataclass
class Tally:
    completed: int = 0
    left: int = 0
    rejected: int = 0
    killed: int = 0
    lost: int = 0
    crossed: int = 0
    events: int = 0
    characters: int = 0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    last_success_s: float = 0.0
    may_end: bool = True  # no kill waits for its recovery
    wrong: list[str] = field(default_factory=list)


def question(number: int) -> dict[str, Any]:
    text = f"Start with {number + 3}, add {2 * number + 7}, then multiply by {number % 5 + 2}."
    return {
        "model": "tiny-reasoner",
        "messages": [{"role": "user", "content": text}],
        "seed": number,
        "temperature": 1.0,
        "max_tokens": 80,
        "stream": True,
    }


async def connect(port: int, body: dict[str, Any]) -> tuple[Any, Any, int, dict[str, str]]:
    reader, writer = await asyncio.open_connection(HOST, port)
    data = json.dumps(body).encode()
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        + data
    )
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return reader, writer, status, headers


async def events(reader: Any):  # type: ignore[no-untyped-def]
    """Parsed data of a stream; None for [DONE]."""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            payload = line[6:].strip()
            yield None if payload == b"[DONE]" else json.loads(payload)


async def ask(port: int, number: int, leave_after: int | None, tally: Tally | None) -> str | None:
    """One request; its text, or None if it was refused or did not end well."""
    begin = last = time.perf_counter()
    try:
        reader, writer, status, headers = await connect(port, question(number))
    except (OSError, IndexError):
        if tally is not None:
            tally.lost += 1
        return None
    text, num_events, has_ended = "", 0, False
    try:
        if status == 503:
            if tally is not None:
                tally.rejected += 1
            await asyncio.sleep(min(5.0, float(headers.get("retry-after", "1"))) * random.random())
            return None
        assert status == 200, f"{status=}"
        async for event in events(reader):
            if event is None:
                has_ended = True
                break
            if "error" in event:
                if tally is not None:
                    tally.killed += 1
                return None
            delta = event["choices"][0]["delta"]
            piece = (delta.get("reasoning") or "") + (delta.get("content") or "")
            if not piece:
                continue
            text, now = text + piece, time.perf_counter()
            if tally is not None:
                (tally.itl_s if num_events else tally.ttft_s).append(
                    now - last if num_events else now - begin
                )
            last, num_events = now, num_events + 1
            if tally is not None:
                tally.events += 1
                tally.characters += len(piece)
            if leave_after is not None and num_events >= leave_after:
                writer.transport.abort()
                break
    except (OSError, asyncio.IncompleteReadError):
        has_ended = False
    finally:
        writer.close()
    if tally is None:
        return text if has_ended else None
    check(tally, number, text, has_ended, leave_after is not None and num_events >= leave_after)
    return text


REFERENCE: dict[int, str] = {}


def check(tally: Tally, number: int, text: str, has_ended: bool, has_left: bool) -> None:
    expected = REFERENCE[number]
    is_right = text == expected if has_ended else expected.startswith(text)
    if not is_right:
        tally.crossed += 1
        tally.wrong.append(f"{number}: {text[:80]!r} for {expected[:80]!r}")
    elif has_ended:
        tally.completed += 1
        tally.last_success_s = time.perf_counter()
    elif has_left:
        tally.left += 1
    else:
        tally.lost += 1


async def client(port: int, seed: int, until_s: float, tally: Tally) -> None:
    rng = random.Random(seed)
    await asyncio.sleep(rng.random())
    while time.perf_counter() < until_s or not tally.may_end:
        leave_after = rng.randint(1, 20) if rng.random() < 0.2 else None
        await ask(port, rng.randrange(NUM_QUESTIONS), leave_after, tally)


def engine_pid(server: int) -> int | None:
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return int(children[0]) if children else None


def resident_mb(pid: int | None) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


async def kill_engine(
    server: int, port: int, times: int, seconds: float, tally: Tally
) -> list[float]:
    """Kills the engine's process now and then; seconds until an answer was whole again."""
    found: list[float] = []
    begin_s, pause_s = time.perf_counter(), seconds / (times + 1)
    for number in range(times):
        due_s = begin_s + pause_s * (number + 1)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        pid = engine_pid(server)
        if pid is None:
            continue
        tally.may_end, killed_s = False, time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        while tally.last_success_s < killed_s + 0.2:  # not one whose last event was on its way
            await asyncio.sleep(0.05)
        found.append(time.perf_counter() - killed_s)
        tally.may_end = True
    return found


def cpu_s(pid: int | None) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Usage:
    """Memory (MB) of server and engine, sampled, and the engines' processor time from their first answers on."""

    sizes: list[tuple[float, float]] = field(default_factory=list)
    engine_cpu_s: float = 0.0

    async def watch(self, server: int, until_s: float, tally: Tally) -> None:
        last_pid, last_s, num_events = engine_pid(server), cpu_s(engine_pid(server)), 0
        while time.perf_counter() < until_s:
            await asyncio.sleep(0.5)
            pid = engine_pid(server)
            self.sizes.append((resident_mb(server), resident_mb(pid)))
            now_s = cpu_s(pid)
            if pid == last_pid and tally.events > num_events:
                self.engine_cpu_s += max(0.0, now_s - last_s)
            last_pid, last_s, num_events = pid, now_s, tally.events


async def measure(args: argparse.Namespace, server: int, port: int) -> dict[str, Any]:
    for number in range(NUM_QUESTIONS):
        text = await ask(port, number, None, None)
        assert text, f"question {number} has no answer"
        assert text == await ask(port, number, None, None), "the engine is not deterministic"
        REFERENCE[number] = text
    tally, seconds = Tally(), args.minutes * 60
    begin = time.perf_counter()
    until_s = begin + seconds
    clients = [asyncio.create_task(client(port, i, until_s, tally)) for i in range(args.clients)]
    usage, before_s = Usage(), cpu_s(server)
    watch = asyncio.create_task(usage.watch(server, until_s, tally))
    killer = asyncio.create_task(kill_engine(server, port, args.kills, seconds, tally))
    await asyncio.gather(*clients)
    duration_s = time.perf_counter() - begin
    recovery_s = sorted(await asyncio.wait_for(killer, 60))
    await watch
    sizes, server_cpu_s = usage.sizes, cpu_s(server) - before_s
    tenth = max(1, len(sizes) // 10)
    final = await ask(port, 0, None, None)
    return {
        "clients": args.clients,
        "seconds": round(duration_s, 1),
        **{
            n: getattr(tally, n)
            for n in ("completed", "left", "rejected", "killed", "lost", "crossed")
        },
        "events_per_s": round(tally.events / duration_s, 1),
        "characters_per_event": round(tally.characters / max(1, tally.events), 2),
        "server_cpu_us": round(1e6 * server_cpu_s / max(1, tally.events), 1),
        "engine_cpu_us": round(1e6 * usage.engine_cpu_s / max(1, tally.events), 1),
        "ttft_ms": quantiles(tally.ttft_s),
        "itl_ms": quantiles(tally.itl_s),
        "kills": len(recovery_s),
        "recovery_ms": quantiles(recovery_s),
        "server_rss_mb": {
            "first": sizes[tenth][0],
            "last": sizes[-1][0],
            "max": max(s for s, _ in sizes),
        },
        "engine_rss_mb": {"last": sizes[-1][1], "max": max(s for _, s in sizes)},
        "answers_after": final == REFERENCE[0],
        "wrong": tally.wrong[:3],
    }


def quantiles(seconds: list[float]) -> dict[str, float] | None:
    """Milliseconds."""
    if not seconds:
        return None
    values = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        n: round(1e3 * values[min(len(values) - 1, int(q * len(values)))], 3) for n, q in at.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--max-queued-requests", type=int, default=150)
    parser.add_argument("--max-num-requests", type=int, default=64)
    add_json_option(parser, "-")
    args = parser.parse_args()
    provenance = describe_environment()
    environment = {**os.environ, "PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "moejet",
        "serve",
        "--port",
        "0",
        "--deterministic",
        "--no-access-log",
    ]
    command += ["--max-queued-requests", str(args.max_queued_requests)]
    command += ["--max-num-requests", str(args.max_num_requests)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as server,
    ):
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            result = asyncio.run(measure(args, server.pid, port))
        finally:
            server.terminate()
            code = server.wait(60)
            log.seek(0)
            lines = [line for line in log if "Traceback" in line]
    ending = {"exit_code": code, "tracebacks": len(lines)}
    with line_writer(args.json) as write:
        write({"bench": "serve_load", **provenance, **result, **ending})
    is_good = not (result["lost"] or result["crossed"] or lines or code) and result["answers_after"]
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
