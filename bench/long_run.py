"""Everything at once against the embedded reasoner for as long as you like: nothing lost, nothing crossed, memory flat.

    python bench/long_run.py --minutes 60 [--clients 10] [--seed 1] [--json FILE]

`moejet serve` with a cache that is too small and a prefix disk, and `AsyncLLM` in a process of its own (bench/soak.py)
get streams of all four APIs, contexts up to the limit, sessions, salts, strategies, answers of a given form, clients
that leave or abort, and wrong input, in phases. Meanwhile the weights and prefixes on disk are listed, verified and
pruned, /metrics is read, and in the storms, in the first half, the engine is killed and the server started again.

Every request ends in exactly one way; an error needs a kill or a restart that explains it; every answer must be the one
that the question got when nothing else ran, or hold what only it was asked for; between phases the server's counters
must agree with what the clients have seen; memory must not grow in the second half of any process's life, and at the
end the server must hold what it held before the first phase. One table, one JSON line; exit code 1 if anything was
violated, 130 after Ctrl-C, which ends the run with the summary so far.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serving.clients import HOST, ask_json
from serving.faults import Faults
from serving.ledger import Ledger, Tally, quiet
from serving.process import ENGINE, Metrics, ServerProcess, Usage, quantiles, scrape, total
from serving.report import SOAK_KEYS, line_of, prefixes_of, summary_of, table_of
from serving.traffic import CaseMaker, Traffic
from serving.watch import Watch, leftovers

from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer

SERVER_OPTIONS = (
    *("--deterministic", "--no-access-log", "--threads", "1", "--max-context", "2048"),
    *("--cache-tokens", "2304", "--max-batch-tokens", "256", "--max-num-requests", "12"),
    *("--max-queued-requests", "3", "--drain-timeout", "60"),
    *("--prefix-disk-gib", "0.02", "--packed-cache", "on", "--seed", "1"),
)
# Kinds of requests and how often; see `traffic.Traffic`.
PHASES: dict[str, dict[str, int]] = {
    "mixed": {
        **{"known": 6, "new": 6, "turn": 3, "form": 2, "long": 1, "strategy": 1},
        **{"leave": 2, "hasty": 1, "abort": 1, "wrong": 1, "broken": 1},
    },
    "long": {"long": 4, "turn": 3, "new": 1},
    "searches": {"strategy": 4, "form": 3, "new": 1},
    "leaving": {"leave": 5, "hasty": 4, "abort": 4, "broken": 3, "wrong": 2, "known": 2},
}
STORM = "storm"  # the mixed phase with kills
STORMS_UNTIL = 0.5  # of the run: what comes later shows whether memory grows
RESTARTS_UNTIL = 0.3
CYCLE_S = 600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One phase. is_restarted: whether the whole server is, too."""

    name: str
    seconds: float
    is_stormy: bool = False
    is_restarted: bool = False


def plan_of(minutes: float) -> list[Plan]:
    seconds = 60 * minutes
    cycles = max(1, round(seconds / CYCLE_S))
    part_s = seconds / cycles / (len(PHASES) + 1)
    plans = []
    for cycle in range(cycles):
        begin = cycle / cycles
        is_stormy = begin < STORMS_UNTIL
        is_restarted = begin < RESTARTS_UNTIL and part_s > 10
        plans.append(Plan(STORM if is_stormy else "mixed", part_s, is_stormy, is_restarted))
        plans += [Plan(name, part_s) for name in PHASES]
    return plans


# What is kept on purpose once it has been needed, and of memory what allocators keep.
_MAY_GROW = {
    **{"threads of the server": 4, "threads of the engine": 4},
    **{"MB of the server": 16, "MB of the engine": 48},
}

_SETTLE_S = 10.0


class LongRun:
    """The server, its clients, and everything that happens to it."""

    def __init__(self, args: argparse.Namespace, directory: Path):
        self.args = args
        self.directory = directory
        self.rng = random.Random(args.seed)
        self.ledger = Ledger()
        self.stopping = asyncio.Event()
        for name in ("tmp", "cache"):
            (directory / name).mkdir()
        self.environment = {
            "TMPDIR": str(directory / "tmp"),
            "MOEJET_CACHE": str(directory / "cache"),
        }
        options = (*SERVER_OPTIONS, "--header-timeout", f"{args.header_timeout:g}")
        self.server = ServerProcess(options, directory / "server.log", self.environment)
        self.faults = Faults(
            self.server, self.ledger, self.stopping, self.environment, random.Random(args.seed)
        )
        self.phases: list[dict[str, Any]] = []
        self.in_process: dict[str, Any] | None = None
        self.leaks: list[str] = []
        self.prefixes: dict[str, int] = {}
        self.watch: Watch
        self._seen: Metrics | None = None  # since when nothing was asked
        self._traffic: Traffic

    async def run(self) -> dict[str, Any]:
        begin_s = time.perf_counter()
        await asyncio.to_thread(self.server.start)
        self.watch = Watch(self.server, self.ledger, 0.5 if self.args.minutes < 2 else 2.0)
        watching = asyncio.create_task(self.watch.run())
        soak = asyncio.create_task(self._soak())
        try:
            maker = CaseMaker(self.server.port, self.ledger, random.Random(self.args.seed))
            cases = await maker.make(self.args.cases)
            has_grammars = find_spec("llguidance") is not None
            self._traffic = Traffic(self.server.port, self.ledger, cases, has_grammars)
            before = await self._held()
            pruning = asyncio.create_task(self.faults.prune(self.args.prune_s))
            end_s = time.perf_counter()
            for plan in plan_of(self.args.minutes):
                end_s += plan.seconds  # a phase that ends late takes from the next one's time
                if not self.stopping.is_set():
                    await self._phase(plan, end_s)
            pruning.cancel()
            await asyncio.gather(pruning, return_exceptions=True)
            if not self.stopping.is_set():
                await self._idle_sockets()
            await self._compare(before)
            self.prefixes = prefixes_of(await scrape(self.server.port))
        except Exception:
            self.ledger.violate("the run broke off", traceback.format_exc()[-1500:])
        finally:
            self.stopping.set()
            await soak
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self.faults.exit_codes.append(await asyncio.to_thread(self.server.stop))
        self._look_at_files()
        return self._summary(time.perf_counter() - begin_s)

    async def _phase(self, plan: Plan, end_s: float) -> None:
        tally = self.ledger.tally = Tally()
        before = self._seen or (await quiet(self.server))[0]
        pid, num_kills = self.server.pid, self.faults.events["kills"]
        begin_s = time.perf_counter()
        until_s = max(end_s, begin_s + plan.seconds / 2)
        kinds = PHASES.get(plan.name, PHASES["mixed"])
        seeds = [self.rng.randrange(2**32) for _ in range(self.args.clients)]
        clients = [asyncio.create_task(self._client(kinds, s, until_s)) for s in seeds]
        if plan.is_stormy:
            await self.faults.storm(until_s - begin_s, is_restarted=plan.is_restarted)
        await asyncio.gather(*clients)
        if tickets := list(self.ledger.open.values()):
            self.ledger.violate("requests without an end", tickets[:3])
        after, busy = await quiet(self.server)
        if busy:
            self.ledger.violate("something still runs", busy)
        if self.server.pid == pid:  # counters begin again with the server
            has_kills = self.faults.events["kills"] > num_kills
            for wrong in self.ledger.disagreements(before, after, has_kills):
                self.ledger.violate("counters", f"{plan.name}: {wrong}")
        preemptions = total(after, "num_preemptions_total") - total(before, "num_preemptions_total")
        again = await self._traffic.ask_doubts_again()
        self._seen = None if again or busy else after
        row = {
            "phase": plan.name,
            "seconds": round(until_s - begin_s, 1),
            **summary_of(tally),
            "asked_again": again,
            "preemptions": max(0, preemptions),
        }
        self.phases.append(row)
        print(line_of(row), flush=True)

    async def _client(self, kinds: dict[str, int], seed: int, until_s: float) -> None:
        rng = random.Random(seed)
        await asyncio.sleep(rng.random() * self.args.pause)
        while True:
            [kind] = rng.choices(list(kinds), list(kinds.values()))
            try:
                await self._traffic.one(kind, rng)
            except Exception:
                self.ledger.violate("a client failed", f"{kind}: {traceback.format_exc()[-1500:]}")
            await asyncio.sleep(rng.expovariate(1 / self.args.pause))
            if time.perf_counter() >= until_s or self.stopping.is_set():
                return

    async def _soak(self) -> None:
        """`AsyncLLM` beside it, in a process of its own."""
        if not self.args.soak_clients:
            return
        minutes = max(0.05, self.args.minutes * 0.95)
        command = [sys.executable, str(Path(__file__).with_name("soak.py"))]
        command += ["--minutes", f"{minutes:.3f}", "--clients", str(self.args.soak_clients)]
        command += ["--cases", str(3 * self.args.cases), "--seed", str(self.args.seed)]
        command += ["--threads", "1", "--cache-tokens", "640", "--child"]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                **{**os.environ, "PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"},
                **self.environment,
            },
            start_new_session=True,
        )
        self.watch.others["soak"] = lambda: process.pid if process.returncode is None else None

        async def interrupt() -> None:
            await self.stopping.wait()
            process.send_signal(signal.SIGINT)

        ending = asyncio.create_task(interrupt())
        output, errors = await process.communicate()
        ending.cancel()
        try:
            self.in_process = json.loads(output.splitlines()[-1])
        except (ValueError, IndexError):
            self.ledger.violate("in process", f"no result: {errors[-500:]!r}")
        if process.returncode:
            detail = {k: v for k, v in (self.in_process or {}).items() if k in SOAK_KEYS}
            self.ledger.violate("in process", f"exit code {process.returncode}: {detail}")

    # What is left at the end.

    async def _held(self) -> dict[str, int]:
        """What the server holds when nothing runs."""
        async with self.watch.asking:
            metrics, busy = await quiet(self.server)
            await asyncio.sleep(0.2)  # the server closes what asked it
            pids = {"server": self.server.pid, "engine": self.server.engine_pid}
            usages = {name: Usage.of(pid) for name, pid in pids.items()}
        if busy:
            self.ledger.violate("something still runs", busy)
        held = {"event loop tasks": int(total(metrics, "event_loop_tasks"))}
        for name, usage in usages.items():
            assert usage is not None, f"the {name} runs"
            held[f"MB of the {name}"] = round(usage.mb)
            for what in ("files", "threads", "children"):
                held[f"{what} of the {name}"] = getattr(usage, what)
        return held

    async def _compare(self, before: dict[str, int]) -> None:
        """What closes by itself gets a while to do so."""
        until_s = time.perf_counter() + _SETTLE_S
        while True:
            after = await self._held()
            grown = [n for n in after if after[n] > before[n] + _MAY_GROW.get(n, 0)]
            if not grown or time.perf_counter() > until_s:
                break
        for name in grown:
            self._leak(f"{name}: {after[name]} after {before[name]}")

    async def _idle_sockets(self) -> None:
        """Connections that ask for nothing are closed, and others are answered meanwhile."""
        sockets = [
            await asyncio.open_connection(HOST, self.server.port) for _ in range(self.args.sockets)
        ]
        try:
            async with asyncio.timeout(30):
                reads = [asyncio.create_task(reader.read()) for reader, _ in sockets]
                while not all(read.done() for read in reads):
                    await ask_json(self.server.port, "/health")
                    await asyncio.sleep(0.2)
        except TimeoutError:
            self.ledger.violate("idle connections", "still open after 30 s")
        for _, writer in sockets:
            writer.close()

    def _leak(self, what: str) -> None:
        self.leaks.append(what)
        self.ledger.violate("leak", what)

    def _look_at_files(self) -> None:
        for name in self.watch.shared:
            if Path("/dev/shm", name).exists():
                self._leak(f"shared memory {name}")
        for path in leftovers(self.directory / "tmp", lambda path: False):
            self._leak(f"temporary file {path}")

        def kept(path: Path) -> bool:
            return path.suffix in (".packed", ".blocks") or path.name == ".lock"

        for path in leftovers(self.directory / "cache", kept):
            self._leak(f"file in the cache {path}")

    def _summary(self, seconds: float) -> dict[str, Any]:
        memory = {}
        for name in self.watch.lives:
            life = self.watch.longest(name)
            if life is None or life.seconds < 120:  # nothing but warm-up
                continue
            memory[name] = life.trend()
            if not memory[name]["is_flat"]:
                self.ledger.violate("memory", f"{name}: {memory[name]}")
        if bad := [code for code in self.faults.exit_codes if code]:
            self.ledger.violate("exit code of the server", bad)
        if count := self.server.tracebacks():
            self.ledger.violate("tracebacks in the server's log", count)
        if (ended := self.ledger.outcomes.total()) != self.ledger.num_sent:
            self.ledger.violate("requests without an end", f"{ended} of {self.ledger.num_sent}")
        posed = sum(row["posed"] for row in self.phases)
        return {
            "minutes": self.args.minutes,
            "seconds": round(seconds, 1),
            "seed": self.args.seed,
            "clients": self.args.clients,
            "requests": self.ledger.num_sent,
            "outcomes": dict(sorted(self.ledger.outcomes.items())),
            "right": round(sum(row["right"] for row in self.phases) / max(1, posed), 3),
            "posed": posed,
            "tokens": sum(row["tokens"] for row in self.phases),
            "preemptions": sum(row["preemptions"] for row in self.phases),
            "prefixes": self.prefixes,
            "events": dict(sorted(self.faults.events.items())),
            "recovery_ms": quantiles(self.faults.recovery_s),
            "scrapes": self.watch.num_scrapes,
            "scrape_ms": quantiles(self.watch.scrape_s),
            "memory": memory,
            "per_minute_mb": self.watch.per_minute(),
            "leaks": self.leaks,
            "in_process": {k: (self.in_process or {}).get(k) for k in SOAK_KEYS},
            "phases": self.phases,
            "violations": dict(self.ledger.violations),
            "shown": self.ledger.shown,
        }


async def _main(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    run = LongRun(args, directory)
    is_interrupted = False

    def interrupt() -> None:
        nonlocal is_interrupted
        is_interrupted = True
        run.stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    describing = asyncio.create_task(asyncio.to_thread(describe_environment))  # while it starts
    result = await run.run()
    return {**await describing, **result, "is_interrupted": is_interrupted}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument(
        "--pause", type=float, default=0.3, help="mean seconds between a client's requests"
    )
    parser.add_argument(
        "--cases", type=int, default=12, help="questions with known answers, of each kind"
    )
    parser.add_argument("--soak-clients", type=int, default=4, help="in the other process; 0: none")
    parser.add_argument("--sockets", type=int, default=200, help="idle connections at the end")
    parser.add_argument(
        "--header-timeout", type=float, default=5.0, help="seconds that an idle connection is kept"
    )
    parser.add_argument(
        "--prune-s", type=float, default=30.0, help="seconds between uses of `moejet cache`"
    )
    parser.add_argument("--seed", type=int, default=1)
    add_json_option(parser, "-")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moejet-long-run-") as directory:
        result = asyncio.run(_main(args, Path(directory)))
    print(table_of(result))
    with line_writer(args.json) as write:
        write({"bench": "long_run", **result})
    return 1 if result["violations"] else 130 if result["is_interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
