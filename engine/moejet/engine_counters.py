"""What a running engine counts: totals, recent rates and a histogram, as plain numbers for a metrics endpoint."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import Any

_RATE_SECONDS = 20.0
_QUEUE_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)


class Rate:
    """Events per second, the last `seconds` counting most (exponential decay)."""

    def __init__(self, seconds: float = _RATE_SECONDS):
        self.seconds = seconds
        self._sum = 0.0
        self._start_s: float | None = None
        self._last_s = 0.0

    def add(self, count: float, now: float | None = None) -> None:
        now = time.perf_counter() if now is None else now
        if self._start_s is None:
            self._start_s = self._last_s = now
        self._sum = self._sum * math.exp((self._last_s - now) / self.seconds) + count
        self._last_s = now

    def per_s(self, now: float | None = None) -> float:
        """0 before the first event; until `seconds` have passed, an average over the time there has been."""
        if self._start_s is None:
            return 0.0
        now = time.perf_counter() if now is None else now
        age = max(now - self._start_s, 0.1)
        weight = self.seconds * -math.expm1(-age / self.seconds)
        return self._sum * math.exp((self._last_s - now) / self.seconds) / weight


class Histogram:
    """Counts of values up to each bound, as Prometheus wants them."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def as_dict(self) -> dict[str, Any]:
        """{"buckets": [[upper bound, values up to it], ...], "count", "sum"}; the last bound is infinity."""
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            total += count
            buckets.append([bound, total])
        return {"buckets": buckets, "count": total, "sum": self.sum}


@dataclass(slots=True)
class EngineCounters:
    """What an engine has done since it was made.

    prompt_tokens, cached_tokens: of requests that have started, and how many of these were in the cache ·
    prefill_tokens, decode_tokens: computed at positions of prompts and of outputs, both again after a preemption ·
    expert_loads: routed experts read by all layers and steps, so loads / (steps * MoE layers) is how many distinct ones
    a layer reads per step; a step of more than 1024 tokens reads them more than once · expert_bytes: of their weights.
    Both count every forward pass, also those outside the schedule, and are 0 with MOEJET_REF=1.
    expert_cache_uses, expert_cache_hits: experts asked for by tokens, in layers with a cache on the GPU, and how many
    of them it had · expert_cache_bytes: fetched for it. These lag a few steps behind.
    decode_steps: those that computed no position of a prompt · decode_seconds: of their forward passes · decode_bytes:
    of weights that they read through this machine's memory
    disk_tokens: those of cached_tokens that were read from disk · cache_evictions, disk_evictions: blocks that had to
    make room in memory, and on disk by this process
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    expert_loads: int = 0
    expert_bytes: int = 0
    expert_cache_uses: int = 0
    expert_cache_hits: int = 0
    expert_cache_bytes: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    decode_bytes: int = 0
    disk_tokens: int = 0
    cache_evictions: int = 0
    disk_evictions: int = 0


class TrafficCounters:
    """What becomes of requests that come from outside. Written by one thread at a time, read by any."""

    def __init__(self) -> None:
        self.step_errors = 0
        self.step_timeouts = 0
        self.accepted_requests = 0
        self.rejected_requests = 0
        self.finished_samples: Counter[str] = Counter()  # by finish reason, and "error"
        self.queue_time = Histogram(_QUEUE_BOUNDS)
        self.starts = Rate()
        self.computed_prompt_tokens_rate = Rate()
        self.generated_tokens_rate = Rate()

    def as_dict(self) -> dict[str, Any]:
        return {
            "step_errors": self.step_errors,
            "step_timeouts": self.step_timeouts,
            "accepted_requests": self.accepted_requests,
            "rejected_requests": self.rejected_requests,
            "finished_samples": dict(self.finished_samples),
            "queue_time_s": self.queue_time.as_dict(),
        }


def add_totals(a: Any, b: Any) -> Any:
    """Sums of totals as `as_dict` gives them: numbers, those within dicts, and counts of buckets; None counts as 0."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict):
        return {name: add_totals(a.get(name), b.get(name)) for name in {**a, **b}}
    if isinstance(a, list):
        return [[bound, count + other] for (bound, count), (_, other) in zip(a, b, strict=True)]
    return a + b
