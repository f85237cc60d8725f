"""The long run in seconds: that nothing is lost, crossed or leaked, and that it would have noticed."""

import asyncio
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    """Its modules, which import each other as scripts do."""
    names = ("clients", "ledger", "process", "watch")
    sys.path.insert(0, str(BENCH))
    try:
        modules = {name: import_module(f"serving.{name}") for name in names}
        yield SimpleNamespace(long_run=import_module("long_run"), **modules)
    finally:
        sys.path.remove(str(BENCH))
        for name in [n for n in sys.modules if n == "long_run" or n.startswith("serving")]:
            del sys.modules[name]


@pytest.mark.slow
def test_seconds_of_everything_leave_nothing(tmp_path):
    engine = str(BENCH.parent / "engine")
    command = [sys.executable, str(BENCH / "long_run.py"), "--minutes", "0.05", "--cases", "1"]
    command += ["--clients", "6", "--pause", "0.1", "--soak-clients", "2", "--prune-s", "5"]
    command += ["--header-timeout", "2"]
    done = subprocess.run(
        [*command, "--sockets", "50", "--json", str(tmp_path / "lines")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": engine, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads((tmp_path / "lines").read_text())
    assert (found["violations"], found["leaks"]) == ({}, [])
    outcomes = found["outcomes"]
    assert min(outcomes["complete"], outcomes["left"]) > 0
    assert not outcomes.keys() & {"lost", "stuck"}
    assert sum(outcomes.values()) == found["requests"]
    assert found["events"]["kills"] == 1
    assert len(found["phases"]) == 5
    in_process = found["in_process"]
    assert in_process["answered"] > 0
    assert (in_process["wrong"], in_process["errors"], in_process["leaked_blocks"]) == (0, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


CHUNK = 'data: {"id":"ID","choices":[{"index":0,"delta":{"content":"TEXT"},"finish_reason":REASON}]}\n\n'


def chunk(text: str, *, request_id: str = "a", reason: str = "null") -> str:
    return CHUNK.replace("ID", request_id).replace("TEXT", text).replace("REASON", reason)


def exchanged(bench: SimpleNamespace, stream: str, ledger: Any, status: str = "200 OK") -> str:
    """The outcome of a request that is answered so."""

    async def run() -> str:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(stream)}\r\n\r\n"
            writer.write((head + stream).encode())
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            ticket = ledger.begin("known", "chat")
            found = await bench.clients.exchange(port, "chat", {"stream": True})
            return ledger.settle(ticket, found)

    return asyncio.run(run())


DONE = "data: [DONE]\n\n"
DIED = 'data: {"error":{"code":"engine_dead","message":"killed"}}\n\n'


@pytest.mark.parametrize(
    ("stream", "outcome", "violation"),
    [
        (chunk("x") + chunk("", reason='"stop"') + DONE, "complete", None),
        (chunk("x") + DONE + chunk("y"), "complete", "form of a stream"),
        (chunk("x") + chunk("y", request_id="b") + DONE, "complete", "form of a stream"),
        (chunk("x"), "lost", "lost"),
        (chunk("x") + DIED, "lost", "an error without a cause"),
        (chunk("x") + DIED + DONE, "lost", "an error without a cause"),
    ],
)
def test_what_becomes_of_a_stream(bench, stream, outcome, violation):
    ledger = bench.ledger.Ledger()
    assert exchanged(bench, stream, ledger) == outcome
    assert list(ledger.violations) == ([violation] if violation else [])
    assert ledger.tally.outcomes == {outcome: 1}
    assert not ledger.open


def test_a_kill_explains_an_error_but_not_a_silence(bench):
    ledger = bench.ledger.Ledger()
    with ledger.outage("kill"):
        assert exchanged(bench, chunk("x") + DIED + DONE, ledger) == "failed"
        assert not ledger.violations
        assert exchanged(bench, chunk("x", request_id="b"), ledger) == "lost"
    ledger.outages[-1].begin_s = ledger.outages[-1].end_s = time.perf_counter() - 60
    assert exchanged(bench, chunk("x", request_id="c") + DIED + DONE, ledger) == "lost"
    assert ledger.violations == {"lost": 1, "an error without a cause": 1}


def test_refusals_say_when_to_come_back(bench):
    ledger = bench.ledger.Ledger()
    full = '{"error":{"code":"queue_full","message":"the queue is full"}}'
    status = "503 Service Unavailable\r\nRetry-After: 1"
    assert exchanged(bench, full, ledger, status) == "refused"
    assert not ledger.violations
    assert exchanged(bench, full, ledger, "503 Service Unavailable") == "refused"
    assert ledger.violations == {"503 without Retry-After": 1}


def test_an_id_serves_once_and_a_request_ends_once(bench):
    ledger = bench.ledger.Ledger()
    for _ in range(2):
        exchanged(bench, chunk("x") + DONE, ledger)
    assert ledger.violations == {"an id was used twice": 1}
    ticket = ledger.begin("known", "chat")
    ledger.end(ticket, "complete")
    ledger.end(ticket, "left")
    assert ledger.violations["ended twice"] == 1


def counters(**values: float) -> dict[tuple[str, str], float]:
    names = {
        "started": "http_requests_started_total",
        "success": "request_success_total",
        "cancelled": "cancelled_requests_total",
        "prompt": "request_prompt_tokens_sum",
        "tokens": "request_generation_tokens_sum",
        "engine": "generation_tokens_total",
    }
    return {(names[name], ""): value for name, value in values.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"started": 4}, "started"),
        ({"success": 1}, "success"),
        ({"tokens": 9}, "tokens"),
        ({"cancelled": 0}, "have no end"),
        ({"engine": 9}, "the engine has generated"),
    ],
)
def test_counters_are_compared(bench, change, says):
    """Two answers of five tokens, and a client that left."""
    ledger = bench.ledger.Ledger()
    for number in range(3):
        ticket = ledger.begin("known", "chat", most_prompt=10, most_tokens=5)
        answer = bench.clients.Answer("chat", status=200, id=str(number))
        answer.usage, answer.is_whole, answer.has_left = (10, 5), number < 2, number == 2
        assert ledger.settle(ticket, answer) == ("left" if number == 2 else "complete")
    before = counters(started=7, success=7, cancelled=7, prompt=7, tokens=7, engine=7)
    now = {"started": 3, "success": 2, "cancelled": 1, "prompt": 20, "tokens": 10, "engine": 12}
    after = counters(**{name: 7 + value for name, value in (now | change).items()})
    wrong = ledger.disagreements(before, after, has_kills=False)
    assert bool(wrong) == bool(says)
    assert says in " ".join(wrong)
    assert not bench.ledger.fallen(before, after)
    assert bench.ledger.fallen(after, before)


@pytest.mark.parametrize(("mb_per_hour", "is_flat"), [(0, True), (5, True), (30, False)])
def test_growth_is_told_from_noise(bench, mb_per_hour, is_flat):
    """An hour that begins with a warm-up, with a peak now and then."""
    life = bench.watch.Life(1)
    for second in range(0, 3600, 2):
        warm = min(second, 600) / 10
        peak = 40 if second % 97 == 0 else 0
        mb = 300 + warm + peak + mb_per_hour * second / 3600 + second % 3
        life.samples.append((float(second), bench.process.Usage(mb - 90, 80.0, 10.0, 5, 5, 0)))
    trend = life.trend()
    assert trend["mb_per_hour"] == pytest.approx(mb_per_hour, abs=1)
    assert trend["is_flat"] == is_flat


def test_phases_leave_the_second_half_without_kills(bench):
    for minutes in (0.1, 3, 60):
        plans = bench.long_run.plan_of(minutes)
        assert sum(plan.seconds for plan in plans) == pytest.approx(60 * minutes)
        assert plans[0].is_stormy
    late = plans[len(plans) // 2 :]
    assert not any(plan.is_stormy or plan.is_restarted for plan in late)
    assert {plan.name for plan in late} == set(bench.long_run.PHASES)
