"""GET /metrics for Prometheus. Names after "moejet:" and meanings are vLLM's where it has the same figure.

What happens at the HTTP side is counted here (`ServerMetrics` is the observer that the application tells of requests);
what happens in the engine is read from its backend when somebody asks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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

if TYPE_CHECKING:
    from moejet.server.backend import Backend

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
    "step_errors": ("step_errors", "Requests ended by a step that failed"),
    "step_timeouts": ("step_timeouts", "Steps that took longer than allowed"),
    "engine_requests_accepted": ("accepted_requests", "Requests taken into the engine's queue"),
    "engine_requests_rejected": ("rejected_requests", "Requests refused because the queue is full"),
    "engine_restarts": ("worker_restarts", "Times that the engine's process was started again"),
}
_ENGINE_GAUGES = {
    "num_requests_running": ("running", "Samples being computed"),
    "num_requests_waiting": ("queued_requests", "Requests that wait for their first step"),
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
        self._first_token.labels(self._label).observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter_token.labels(self._label).observe(seconds)

    def finished(
        self,
        reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int,
        seconds: float,
    ) -> None:
        """cached_tokens are the engine's to count."""
        self._finished.labels(self._label, reason).inc()
        self._prompt_tokens.labels(self._label).observe(prompt_tokens)
        self._answer_tokens.labels(self._label).observe(completion_tokens)
        self._seconds.labels(self._label).observe(seconds)

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
        return Histogram(
            _PREFIX + name, text, ("model_name",), buckets=buckets, registry=self.registry
        )


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
            labels=["process"],
        )
        for name, pid in (("server", os.getpid()), ("engine", worker_pid)):
            if pid is not None and (size := resident_bytes(pid)) is not None:
                family.add_metric([name], size)
        yield family
        yield GaugeMetricFamily(
            _PREFIX + "process_start_time_seconds", "Since the epoch", self._started_s
        )


def resident_bytes(pid: int) -> int | None:
    """Memory of a process, what it has mapped of files included; None if there is none."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def metrics_router(metrics: ServerMetrics) -> APIRouter:
    """GET /metrics; it needs a key where the server has any."""
    router = APIRouter(tags=["metrics"])

    content: dict[int | str, dict[str, Any]] = {
        200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}
    }

    @router.get("/metrics", response_class=Response, responses=content)
    async def render() -> Response:
        """Prometheus' text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
