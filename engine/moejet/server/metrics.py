"""GET /metrics for Prometheus. Names after "moejet:" and meanings are vLLM's where it has the same figure.

What happens at the HTTP side is counted here (`ServerMetrics` is the observer that the application tells of requests);
what happens in the engine is read from its backend when somebody asks.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from moejet.server.health import assess
from moejet.server.openapi import answers

if TYPE_CHECKING:
    from moejet.server.backend import Backend
    from moejet.server.generation import Totals

_PREFIX = "moejet:"
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

# Counters of the engine: name after the prefix -> (the backend's name, what it says).
_ENGINE_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts that have started"),
    "generation_tokens": ("generated_tokens", "Tokens generated"),
    "prompt_tokens_cached": ("cached_tokens", "Tokens of prompts found in the cache"),
    "prefix_cache_queries": ("prompt_tokens", "Tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("cached_tokens", "Tokens found in the prefix cache"),
    "num_preemptions": ("preemptions", "Requests interrupted for lack of cache"),
    "engine_steps": ("steps", "Steps of the engine"),
    "prefill_tokens_computed": ("prefill_tokens", "Positions of prompts computed"),
    "decode_tokens_computed": ("decode_tokens", "Positions of answers computed"),
    "expert_loads": ("expert_loads", "Routed experts read from memory, over layers and steps"),
    "expert_bytes_loaded": ("expert_bytes", "Bytes of routed experts read from memory"),
    "expert_cache_queries": ("expert_cache_uses", "Experts looked up in the cache on the GPU"),
    "expert_cache_hits": ("expert_cache_hits", "Experts found in the cache on the GPU"),
    "expert_cache_bytes_fetched": ("expert_cache_bytes", "Bytes of experts fetched for it"),
    "decode_steps": ("decode_steps", "Steps that computed no position of a prompt"),
    "decode_seconds": ("decode_seconds", "Seconds of the forward passes of those steps"),
    "decode_weight_bytes": ("decode_bytes", "Bytes of weights that those steps read from memory"),
    "step_errors": ("step_errors", "Requests ended by a step that failed"),
    "step_timeouts": ("step_timeouts", "Steps that took longer than allowed"),
    "engine_requests_accepted": ("accepted_requests", "Requests taken into the engine's queue"),
    "engine_requests_rejected": ("rejected_requests", "Requests refused because the queue is full"),
    "engine_restarts": ("worker_restarts", "Times that the engine's process was started again"),
}
_ENGINE_GAUGES = {
    "num_requests_running": ("running", "Samples being computed"),
    "num_requests_waiting": ("queued_requests", "Requests that wait for their first step"),
    "num_requests": (
        "requests",
        "Requests that have not ended, those that are being read included",
    ),
    "num_tokens_waiting": ("queued_tokens", "Prompt tokens of waiting requests"),
    "generation_tokens_per_second": ("generated_tokens_per_s", "Over about the last 20 s"),
    "prompt_tokens_per_second": ("prompt_tokens_per_s", "Over about the last 20 s"),
    "engine_step_running_seconds": ("step_running_s", "Age of the step that runs now"),
}


class ServerMetrics:
    """Everything that /metrics shows of one backend."""

    def __init__(self, backend: Backend):
        self.registry = CollectorRegistry()
        self._label = backend.card.name
        self._started = self._counter(
            "http_requests_started", "Requests for an answer, by API", ("dialect",)
        )
        self._finished = self._counter(
            "request_success", "Requests answered to the end", ("finished_reason",)
        )
        self._rejected = self._counter(
            "admission_rejections", "Requests refused before they began", ("reason",)
        )
        self._cancelled = self._counter(
            "cancelled_requests", "Requests whose client left, by how far they were", ("phase",)
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token", _FIRST_TOKEN_S
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer", _TOKEN_S
        )
        self._seconds = self._histogram(
            "e2e_request_latency_seconds", "From the request to its last token", _REQUEST_S
        )
        self._prefill_s = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token", _REQUEST_S
        )
        self._decode_s = self._histogram(
            "request_decode_time_seconds", "From the first token to the last", _REQUEST_S
        )
        self._per_token_s = self._histogram(
            "request_time_per_output_token_seconds",
            "Seconds of decoding per token after the first, of each request",
            _TOKEN_S,
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Tokens of a request's prompt", _TOKENS
        )
        self._answer_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a request", _TOKENS
        )
        self.registry.register(_EngineCollector(backend))

    def request_started(self, dialect: str) -> None:
        self._started.labels(self._label, dialect).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def finished(self, reason: str, totals: Totals, seconds: float) -> None:
        """Cached tokens and the time in the queue are the engine's to count."""
        self._finished.labels(self._label, reason).inc()
        self._prompt_tokens.observe(totals.prompt_tokens)
        self._answer_tokens.observe(totals.completion_tokens)
        self._seconds.observe(seconds)
        self._prefill_s.observe(totals.prefill_s)
        self._decode_s.observe(totals.decode_s)
        if totals.longest > 1:
            per_token_s = totals.decode_s / (totals.longest - 1)
            self._per_token_s.observe(per_token_s)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._label, reason).inc()

    def cancelled(self, phase: str) -> None:
        self._cancelled.labels(self._label, phase).inc()

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(_PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        """Of this model: one is observed per token, and looking its label up would cost as much as counting."""
        family = Histogram(
            _PREFIX + name, text, ("model_name",), buckets=buckets, registry=self.registry
        )
        return family.labels(self._label)


class _EngineCollector(Collector):
    """Reads the backend's numbers at every scrape."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._label = [backend.card.name]
        self._started_s = time.time()

    def collect(self) -> Iterator[Metric]:
        counters, health = self._backend.counters(), self._backend.health()
        for name, (source, text) in _ENGINE_COUNTERS.items():
            if source in counters:
                yield self._family(CounterMetricFamily, name, text, counters[source])
        for name, (source, text) in _ENGINE_GAUGES.items():
            yield self._family(GaugeMetricFamily, name, text, health.get(source, 0))
        total = health.get("total_blocks", 0)
        used = 1.0 - health.get("free_blocks", 0) / total if total else 0.0
        yield self._family(GaugeMetricFamily, "kv_cache_usage_perc", "1 means full", used)
        yield from self._bandwidth(health)
        yield from self._tiers(counters, health)
        is_up = assess(health)[0] == "ok"
        yield self._family(GaugeMetricFamily, "engine_up", "1 while /health says ok", is_up)
        yield from self._samples(counters.get("finished_samples", {}))
        if (queue := counters.get("queue_time_s")) is not None:
            yield self._queue_time(queue)
        yield from self._memory(health.get("worker_pid"))

    def _family(
        self,
        kind: type[CounterMetricFamily | GaugeMetricFamily],
        name: str,
        text: str,
        value: float,
    ) -> Metric:
        family = kind(_PREFIX + name, text, labels=["model_name"])
        family.add_metric(self._label, float(value))
        return family

    def _bandwidth(self, health: dict[str, Any]) -> Iterator[Metric]:
        """Only where the memory's rate is known."""
        for name, source, text in (
            ("memory_read_bytes_per_second", "memory_bytes_per_s", "Most that memory can be read"),
            (
                "memory_bandwidth_fraction",
                "bandwidth_fraction",
                "Weight bytes per second of decoding over what memory can be read with, over about 20 s of it",
            ),
        ):
            if (value := health.get(source)) is not None:
                yield self._family(GaugeMetricFamily, name, text, value)

    def _tiers(self, counters: dict[str, Any], health: dict[str, Any]) -> Iterator[Metric]:
        """Of the prefix cache: memory, and the disk if there is one."""
        blocks = GaugeMetricFamily(
            _PREFIX + "prefix_cache_blocks",
            "Blocks of tokens that could be found",
            labels=["model_name", "tier"],
        )
        hits = CounterMetricFamily(
            _PREFIX + "prefix_cache_tier_hits",
            "Tokens of prompts found in each tier",
            labels=["model_name", "tier"],
        )
        evictions = CounterMetricFamily(
            _PREFIX + "prefix_cache_evictions",
            "Blocks that had to make room for others",
            labels=["model_name", "tier"],
        )
        from_disk = counters.get("disk_tokens", 0)
        found = {"ram": (health.get("cached_blocks", 0), "cache_evictions")}
        # While an engine is being started nobody knows of its disk, but what has been counted stays.
        on_disk = health.get("disk_blocks")
        if on_disk is not None or from_disk or counters.get("disk_evictions"):
            found["disk"] = (on_disk or 0, "disk_evictions")
        for tier, (num_blocks, source) in found.items():
            tokens = from_disk if tier == "disk" else counters.get("cached_tokens", 0) - from_disk
            blocks.add_metric([*self._label, tier], num_blocks)
            hits.add_metric([*self._label, tier], tokens)
            evictions.add_metric([*self._label, tier], counters.get(source, 0))
        yield from (blocks, hits, evictions)

    def _samples(self, finished: dict[str, int]) -> Iterator[Metric]:
        family = CounterMetricFamily(
            _PREFIX + "finished_samples",
            "Samples that have ended in the engine",
            labels=["model_name", "finished_reason"],
        )
        for reason, count in finished.items():
            family.add_metric([*self._label, reason], count)
        yield family

    def _queue_time(self, histogram: dict[str, Any]) -> Metric:
        family = HistogramMetricFamily(
            _PREFIX + "request_queue_time_seconds",
            "From arrival to the first step",
            labels=["model_name"],
        )
        buckets = [("+Inf" if b == float("inf") else str(b), n) for b, n in histogram["buckets"]]
        if buckets:
            family.add_metric(self._label, buckets, histogram["sum"])
        return family

    def _memory(self, worker_pid: int | None) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            _PREFIX + "process_resident_memory_bytes",
            "Memory of the server's process and of the engine's",
            labels=["model_name", "process"],
        )
        files = GaugeMetricFamily(
            _PREFIX + "process_open_fds",
            "Files and connections of both",
            labels=["model_name", "process"],
        )
        for name, pid in (("server", os.getpid()), ("engine", worker_pid)):
            if pid is not None and (size := resident_bytes(pid)) is not None:
                family.add_metric([*self._label, name], size)
            if pid is not None and (count := open_files(pid)) is not None:
                files.add_metric([*self._label, name], count)
        yield from (family, files)
        with suppress(RuntimeError):  # not called by the server's event loop
            num_tasks = len(asyncio.all_tasks())
            text = "Tasks of the server's event loop"
            yield self._family(GaugeMetricFamily, "event_loop_tasks", text, num_tasks)
        text = "Since the epoch"
        yield self._family(GaugeMetricFamily, "process_start_time_seconds", text, self._started_s)


def resident_bytes(pid: int) -> int | None:
    """Memory of a process, what it has mapped of files included; None if there is none."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def open_files(pid: int) -> int | None:
    """File descriptors of a process; None if that cannot be seen."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


def metrics_router(metrics: ServerMetrics) -> APIRouter:
    """GET /metrics; it needs a key where the server has any."""
    router = APIRouter(tags=["metrics"])

    content = answers("Error", has_body=False)
    content[200] = {"description": "Prometheus' text format", "content": {"text/plain": {}}}

    @router.get("/metrics", response_class=Response, responses=content)
    async def render() -> Response:
        """Prometheus' text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
