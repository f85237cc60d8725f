"""For tests of `AsyncLLM`: a tiny engine's options, holding its steps, and looking whether a request left anything."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterable, Callable
from typing import Any

from torch import Tensor

from moejet.async_llm import AsyncLLM
from moejet.batch import Batch
from moejet.request import SamplingParams, StreamDelta

OPTIONS: dict[str, Any] = {
    "expert_format": "bf16",
    "dense_format": "fp32",
    "cache_dtype": "fp32",
    "max_context": 128,
    "block_size": 8,
    "deterministic": True,
}
SHORT = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
PROMPTS = [f"prompt number {i} " * (1 + i % 4) for i in range(32)]


def assert_nothing_leaked(llm: AsyncLLM) -> None:
    """Waits for the engine to become idle, then looks at its books."""
    engine, deadline = llm._thread.engine, time.monotonic() + 10

    def is_busy() -> bool:  # a failed step has ended its requests while its probe still runs
        health = llm.health()
        return bool(health["requests"] or health["step_running_s"] or engine.has_work)

    while is_busy() and time.monotonic() < deadline:
        time.sleep(0.001)
    health = llm.health()
    assert (health["requests"], health["queued_requests"], health["queued_tokens"]) == (0, 0, 0)
    assert not engine.has_work
    assert not engine._groups
    engine.scheduler.check_integrity()
    assert engine.block_pool.num_free == engine.block_pool.num_blocks


async def tokens_of(stream: AsyncIterable[StreamDelta]) -> tuple[int, ...]:
    """All tokens that are still to come."""
    return tuple([t async for delta in stream for t in delta.token_ids])


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Returns as soon as the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


class Gate:
    """Stands in for a runner's execute: holds each step until it may go on."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.runner = llm._thread.engine.runner
        self.execute = self.runner.execute
        self.is_open = threading.Event()
        self.is_inside = threading.Event()
        self.runner.execute = self  # type: ignore[method-assign]

    def __call__(self, batch: Batch) -> Tensor:
        self.is_inside.set()
        assert self.is_open.wait(30)
        return self.execute(batch)

    def open(self) -> None:
        self.is_open.set()
        self.runner.execute = self.execute  # type: ignore[method-assign]
