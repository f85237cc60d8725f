"""Random traffic against the embedded reasoner in one process: every answer checked, memory watched.

    python bench/soak.py --minutes 60 [--clients 24] [--loops 2] [--seed 1]

The half of bench/long_run.py that has no server; it also runs on its own.

Clients on several event loops ask prompts of many lengths with shared beginnings, in parallel samples, with priorities,
greedily or with a seed, or have a strategy answer them; some read slowly, some leave early, some are refused by the
full queue. Meanwhile another engine is opened and closed, and a conversation goes on from a file. The engine is
deterministic and its cache too small for all of them, so that requests are preempted, and whatever runs beside an
answer, it must be the beginning of the one that the request gets alone. Prints one JSON line. Exit code 1: a wrong
answer, an unexpected error, or resident memory more than 2 % above what it was after the warm-up (the first fifth).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from moejet import LLM, AsyncLLM, QueueFullError, RequestStream, SamplingParams, StreamDelta
from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer
from moejet.reasoning import solve
from moejet.reasoning.specs import parse_strategy
from moejet.testing import arithmetic

MAX_TOKENS = 160
MAX_GROWTH = 1.02
ENGINE = {
    "deterministic": True,
    "max_context": 512,
    "cache_tokens": 2048,
    "block_size": 16,
    "max_num_requests": 16,
    "max_batch_tokens": 256,
    "max_mixed_tokens": 64,
}
STRATEGIES = ("vote:4", "beam:4x2", "mcts:3", "adaptive:8")
SESSION_PAUSE_S = 10.0


@dataclass(frozen=True)
class Case:
    """A prompt, how to sample from it, and its answer when nothing else runs, for each of n samples."""

    prompt: tuple[int, ...]
    params: SamplingParams
    answers: tuple[tuple[int, ...], ...]


def make_cases(llm: LLM, count: int, seed: int) -> list[Case]:
    """Conversations of one to four questions: those of one length begin with the same ones."""
    problems = arithmetic.held_out_problems(count + 4, seed=seed)
    questions = [question for _, question in problems]
    cases = []
    for number in range(count):
        earlier = questions[count : count + number % 4]
        text = "\n".join([*earlier, questions[number]])
        rendered = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        prompt = llm.tokenizer.encode(rendered, add_special_tokens=False)
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        if number % 3 == 2:
            params = replace(params, temperature=1.0, seed=number, ignore_eos=True)
        if number % 5 == 4:
            params = replace(params, n=3)
        [output] = llm.generate([prompt], params)
        answers = tuple(sample.token_ids for sample in output.outputs)
        cases.append(Case(tuple(prompt), params, answers))
    return cases


@dataclass(frozen=True)
class Solved:
    """A prompt, the strategy that answers it, and its text when nothing else runs."""

    prompt: tuple[int, ...]
    spec: str
    seed: int
    text: str


def make_solved(llm: LLM, cases: list[Case]) -> list[Solved]:
    found = []
    for number, spec in enumerate(STRATEGIES):
        prompt = cases[number % len(cases)].prompt
        result = solve(llm, list(prompt), parse_strategy(spec, llm), seed=number)
        found.append(Solved(prompt, spec, number, result.candidate.text))
    return found


class Soak:
    """The traffic, and what came of it. One instance serves all loops: `counts` only adds under the lock."""

    def __init__(
        self,
        llm: AsyncLLM,
        cases: list[Case],
        solved: list[Solved],
        seed: int,
        stopping: threading.Event,
    ):
        self.llm = llm
        self.cases = cases
        self.solved = solved
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.first_errors: list[str] = []
        self.stopping = stopping
        self._lock = threading.Lock()

    def run(self, seconds: float, *, loops: int, clients: int) -> None:
        """Traffic for so long, until the last request has ended."""
        end_s = time.monotonic() + seconds
        self.seed += 1

        async def work(number: int) -> None:
            mine = range(number, clients, loops)
            await asyncio.gather(*[self._client(client, end_s) for client in mine])

        def thread_of(number: int) -> threading.Thread:
            return threading.Thread(target=lambda: asyncio.run(work(number)))

        threads = [thread_of(number) for number in range(loops)]
        threads.append(threading.Thread(target=self._sessions, args=(end_s,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def _client(self, number: int, end_s: float) -> None:
        rng = random.Random(self.seed * 1000 + number)
        while time.monotonic() < end_s and not self.stopping.is_set():
            try:
                outcome = await self._request(rng)
            except QueueFullError:
                outcome = "refused"
                await asyncio.sleep(rng.uniform(0.1, 0.5))
            except Exception as error:
                outcome = "errors"
                self._note(f"{type(error).__name__}: {error}")
            with self._lock:
                self.counts["requests"] += 1
                self.counts[outcome] += 1

    async def _request(self, rng: random.Random) -> str:
        if rng.random() < 0.05:
            return await self._solve(rng.choice(self.solved))
        case = rng.choice(self.cases)
        params = replace(case.params, max_tokens=rng.randint(1, MAX_TOKENS))
        stream = self.llm.generate(list(case.prompt), params, priority=rng.randint(-1, 1))
        kind = rng.choices(("reads", "slow", "leaves", "cancelled"), (6, 1, 2, 1))[0]
        if kind == "cancelled":
            task = asyncio.ensure_future(stream.result())
            await asyncio.sleep(rng.expovariate(20))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return "cancelled"
        delay_s = rng.uniform(0.01, 0.2) if kind == "slow" else 0.0
        leave_at = rng.randint(1, 40) if kind == "leaves" else None
        return await self._read(stream, case, params, delay_s, leave_at)

    async def _solve(self, known: Solved) -> str:
        result = await self.llm.solve(list(known.prompt), known.spec, seed=known.seed).result()
        if result.candidate.text == known.text:
            return "solved"
        self._note(f"wrong: {known.spec} gave {result.candidate.text!r} instead of {known.text!r}")
        return "wrong"

    def _sessions(self, end_s: float) -> None:
        """Until then: an engine is opened, its conversation saved, and continued in another one."""
        wanted = ""
        while time.monotonic() < end_s:
            try:
                answers = self._session()
            except Exception as error:
                with self._lock:
                    self.counts["errors"] += 1
                self._note(f"session: {type(error).__name__}: {error}")
                return
            with self._lock:
                self.counts["sessions"] += 1
                self.counts["wrong"] += answers != (wanted or answers)
            wanted = wanted or answers
            pause_s = min(SESSION_PAUSE_S, end_s - time.monotonic())
            if self.stopping.wait(max(0.0, pause_s)):
                return

    def _session(self) -> str:
        """Both answers."""
        options = {**ENGINE, "num_threads": self.llm.config.num_threads}
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        messages = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]
        with tempfile.TemporaryDirectory() as directory:
            with LLM(**options) as llm, llm.branch(messages) as root:
                forks = root.fork(2)
                llm.advance(forks, until="\n", max_tokens=40, params=params)
                [first] = llm.chat(messages, params)
                messages.append({"role": "assistant", "content": first.outputs[0].content})
                llm.save_session(f"{directory}/session", messages)
            with LLM(**options, prefix_disk_gib=0.01, prefix_dir=f"{directory}/prefix") as llm:
                session = llm.load_session(f"{directory}/session")
                turn = [*session.messages, {"role": "user", "content": "Now add 4."}]
                [second] = llm.chat(turn, params)
                if not second.timings.cached_tokens:
                    raise RuntimeError("nothing of the session was used")
        return "\n".join(
            [*(fork.text for fork in forks), first.outputs[0].text, second.outputs[0].text]
        )

    async def _read(
        self,
        stream: RequestStream,
        case: Case,
        params: SamplingParams,
        delay_s: float,
        leave_at: int | None,
    ) -> str:
        tokens: list[list[int]] = [[] for _ in range(params.n)]
        text = [""] * params.n
        last: StreamDelta | None = None
        num_read = 0
        async for delta in stream:
            tokens[delta.index] += delta.token_ids
            text[delta.index] += delta.text
            last, num_read = delta, num_read + 1
            if leave_at is not None and num_read >= leave_at:
                break
            if delay_s:
                await asyncio.sleep(delay_s)
        with self._lock:
            self.counts["tokens"] += sum(map(len, tokens))
        is_whole = last is not None and last.output is not None
        for index, mine in enumerate(tokens):
            wanted = list(case.answers[index][: params.max_tokens])
            is_right = mine == (wanted if is_whole else wanted[: len(mine)])
            if is_right and is_whole and last is not None and last.output is not None:
                whole = last.output.outputs[index]
                is_right = text[index] == whole.text and list(whole.token_ids) == mine
            if not is_right:
                self._note(f"wrong: {mine} instead of {wanted}")
                return "wrong"
        return "answered" if is_whole else "left"

    def _note(self, what: str) -> None:
        with self._lock:
            if len(self.first_errors) < 5:
                self.first_errors.append(what)


def resident_bytes() -> int:
    """Of this process, after what can be given back to the system has been."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(args: argparse.Namespace) -> dict[str, object]:
    environment = {} if args.child else describe_environment()
    stopping = threading.Event()
    signal.signal(signal.SIGINT, lambda number, frame: stopping.set())
    options = {**ENGINE, "num_threads": args.threads, "cache_tokens": args.cache_tokens}
    with LLM(**options) as alone:
        cases = make_cases(alone, args.cases, args.seed)
        solved = make_solved(alone, cases)
    llm = AsyncLLM(**options, max_queued_requests=args.clients // 3 or 1)
    soak = Soak(llm, cases, solved, args.seed, stopping)
    seconds = args.minutes * 60
    resident = {"start": resident_bytes()}
    soak.run(seconds / 5, loops=args.loops, clients=args.clients)
    resident["warm"] = resident_bytes()
    begin, tokens = time.monotonic(), llm.counters()["generated_tokens"]
    soak.run(seconds * 4 / 5, loops=args.loops, clients=args.clients)
    rate = (llm.counters()["generated_tokens"] - tokens) / (time.monotonic() - begin)
    resident["end"] = resident_bytes()
    counters, health = llm.counters(), llm.health()
    asyncio.run(llm.close())
    llm._thread.engine.scheduler.check_integrity()
    return {
        "bench": "soak",
        **environment,
        "minutes": args.minutes,
        "clients": args.clients,
        "loops": args.loops,
        "seed": args.seed,
        **{key: soak.counts[key] for key in ("requests", "answered", "wrong", "errors")},
        **{key: soak.counts[key] for key in ("left", "cancelled", "refused")},
        **{key: soak.counts[key] for key in ("solved", "sessions")},
        "leaked_blocks": health["total_blocks"] - health["free_blocks"],
        "tokens_per_s": rate,
        "steps": counters["steps"],
        "preemptions": counters["preemptions"],
        "cached_fraction": counters["cached_tokens"] / max(1, counters["prompt_tokens"]),
        "resident_bytes": resident,
        "growth": resident["end"] / resident["warm"],
        "first_errors": soak.first_errors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--loops", type=int, default=2, help="event loops, each on its own thread")
    parser.add_argument("--cases", type=int, default=60, help="different prompts")
    parser.add_argument("--cache-tokens", type=int, default=ENGINE["cache_tokens"])
    parser.add_argument("--threads", type=int, help="of the engine (default: as everywhere)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_json_option(parser, "-")
    args = parser.parse_args()
    result = run(args)
    with line_writer(args.json) as write:
        write(result)
    is_good = not (result["wrong"] or result["errors"] or result["leaked_blocks"])
    return 0 if is_good and float(str(result["growth"])) <= MAX_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
