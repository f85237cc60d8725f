"""How fast `moejet serve` is under load: many streaming clients, some of which leave, and an engine that is killed.

    python bench/serve_load.py --clients 256 --minutes 5 --kills 20

The same few questions over and over, so that the server's own work shows; bench/long_run.py looks for what goes wrong.
Still, every answer is compared with the one that the same question and seed got when nothing else ran, also as far as
it came when the client left. One JSON line:

  completed, left, lost, wrong   answers; `lost` ended neither as they should nor with an error that a kill explains
  killed         streams that ended with an error event because the engine's process was killed, and requests refused
                 while it was started again
  rejected       requests answered with 503 because of the full queue; clients wait as Retry-After says, but at most
                 5 s, and ask again
  ttft, itl      milliseconds from the request to the first text, and between two events of a stream
  recovery       milliseconds from a kill to the next answered request
  *_cpu_us       processor time of the server's and of the engine's process per event that a client has read; starts of
                 the engine after kills are left out
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.clients import MODEL, Answer, exchange
from serving.faults import Faults
from serving.ledger import Ledger
from serving.process import ServerProcess, Usage, cpu_s, quantiles

from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer

NUM_QUESTIONS = 32


def question(number: int) -> dict[str, Any]:
    text = f"Start with {number + 3}, add {2 * number + 7}, then multiply by {number % 5 + 2}."
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "seed": number,
        "temperature": 1.0,
        "max_tokens": 80,
        "stream": True,
    }


def resident_mb(pid: int | None) -> float:
    usage = Usage.of(pid)
    return usage.mb if usage is not None else 0.0


def text_of(answer: Answer) -> str:
    return "".join(answer.texts.get(0, ()))


@dataclass
class Load:
    """The clients and what they read. events, characters: of all streams."""

    server: ServerProcess
    ledger: Ledger = field(default_factory=Ledger)
    texts: dict[int, str] = field(default_factory=dict)
    events: int = 0
    characters: int = 0
    sizes_mb: list[tuple[float, float]] = field(default_factory=list)
    engine_cpu_s: float = 0.0

    async def ask(self, number: int, leave_after: int | None = None) -> tuple[str, Answer]:
        """The outcome, and the answer."""
        ticket = self.ledger.begin("known", "chat")

        def leave(answer: Answer) -> bool:
            return leave_after is not None and len(answer.arrivals) >= leave_after

        answer = await exchange(self.server.port, "chat", question(number), leave=leave)
        return self.ledger.settle(ticket, answer), answer

    async def learn(self) -> None:
        """What each question is answered when nothing else runs."""
        for number in range(NUM_QUESTIONS):
            texts = [text_of((await self.ask(number))[1]) for _ in range(2)]
            assert texts[0], f"question {number} has no answer"
            assert texts[0] == texts[1], "the engine is not deterministic"
            self.texts[number] = texts[0]
        self.ledger = Ledger()

    async def client(self, seed: int, until_s: float) -> None:
        rng = random.Random(seed)
        await asyncio.sleep(rng.random())
        while time.perf_counter() < until_s:
            number = rng.randrange(NUM_QUESTIONS)
            outcome, answer = await self.ask(
                number, rng.randint(1, 20) if rng.random() < 0.2 else None
            )
            text = text_of(answer)
            self.events += len(answer.arrivals)
            self.characters += len(text)
            wanted = self.texts[number]
            if text != (wanted if outcome == "complete" else wanted[: len(text)]):
                self.ledger.violate("wrong", f"{number}: {text[:80]!r} for {wanted[:80]!r}")
            if answer.status == 503:
                wait_s = float(answer.headers.get("retry-after", "1"))
                await asyncio.sleep(min(5.0, wait_s) * rng.random())

    async def watch(self) -> None:
        """Memory of server and engine, and the engines' processor time from their first answers on."""
        last_pid, last_s, num_events = None, 0.0, 0
        while True:
            pid = self.server.engine_pid
            self.sizes_mb.append((resident_mb(self.server.pid), resident_mb(pid)))
            now_s = cpu_s(pid)
            if pid == last_pid and self.events > num_events:
                self.engine_cpu_s += max(0.0, now_s - last_s)
            last_pid, last_s, num_events = pid, now_s, self.events
            await asyncio.sleep(0.5)


async def measure(args: argparse.Namespace, server: ServerProcess) -> dict[str, Any]:
    load = Load(server)
    await load.learn()
    begin_s, cpu_before_s = time.perf_counter(), cpu_s(server.pid)
    until_s = begin_s + 60 * args.minutes
    clients = [asyncio.create_task(load.client(i, until_s)) for i in range(args.clients)]
    watching = asyncio.create_task(load.watch())
    faults = Faults(server, load.ledger, asyncio.Event(), {}, random.Random(args.seed))
    await faults.kill_evenly(args.kills, 60 * args.minutes)
    await asyncio.gather(*clients)
    watching.cancel()
    seconds = time.perf_counter() - begin_s
    server_cpu_s = cpu_s(server.pid) - cpu_before_s
    tally, sizes = load.ledger.tally, load.sizes_mb
    _, last = await load.ask(0)
    if text_of(last) != load.texts[0]:
        load.ledger.violate("wrong", "the last answer")
    return {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "completed": tally.outcomes["complete"],
        "left": tally.outcomes["left"],
        "rejected": tally.outcomes["refused"],
        "killed": tally.outcomes["failed"],
        "lost": tally.outcomes["lost"],
        "wrong": load.ledger.violations["wrong"],
        "events_per_s": round(load.events / seconds, 1),
        "characters_per_event": round(load.characters / max(1, load.events), 2),
        "server_cpu_us": round(1e6 * server_cpu_s / max(1, load.events), 1),
        "engine_cpu_us": round(1e6 * load.engine_cpu_s / max(1, load.events), 1),
        "ttft_ms": quantiles(tally.first_s),
        "itl_ms": quantiles(tally.gaps_s),
        "kills": faults.events["kills"],
        "recovery_ms": quantiles(faults.recovery_s),
        "server_rss_mb": {
            "first": sizes[len(sizes) // 10][0],
            "last": sizes[-1][0],
            "max": max(server_mb for server_mb, _ in sizes),
        },
        "engine_rss_mb": {"last": sizes[-1][1], "max": max(engine_mb for _, engine_mb in sizes)},
        "violations": dict(load.ledger.violations),
        "shown": load.ledger.shown,
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
    parser.add_argument("--seed", type=int, default=1)
    add_json_option(parser, "-")
    args = parser.parse_args()
    provenance = describe_environment()
    options = ["--deterministic", "--no-access-log"]
    options += ["--max-queued-requests", str(args.max_queued_requests)]
    options += ["--max-num-requests", str(args.max_num_requests)]
    with tempfile.TemporaryDirectory() as directory:
        server = ServerProcess(options, Path(directory) / "server.log")
        server.start()
        try:
            result = asyncio.run(measure(args, server))
        finally:
            code = server.stop()
        tracebacks = server.tracebacks()
    ending = {"exit_code": code, "tracebacks": tracebacks}
    with line_writer(args.json) as write:
        write({"bench": "serve_load", **provenance, **result, **ending})
    return 1 if result["violations"] or tracebacks or code else 0


if __name__ == "__main__":
    sys.exit(main())
