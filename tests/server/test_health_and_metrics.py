"""/health, /ready and /metrics: what a backend says of itself, as those who watch the server see it."""

import math

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from moejet.server.backend import ModelCard
from moejet.server.generation import Totals
from moejet.server.health import assess, health_router, is_ready
from moejet.server.metrics import ServerMetrics, metrics_router

WELL = {
    "alive": True,
    "state": "running",
    "error": None,
    "last_step_age_s": 500.0,
    "step_running_s": 0.0,
    "running": 0,
    "waiting": 0,
    "queued_requests": 0,
    "max_queued_requests": 8,
    "free_blocks": 30,
    "total_blocks": 40,
    "generated_tokens_per_s": 12.5,
    "cached_blocks": 25,
    "disk_blocks": 60,
    "memory_bytes_per_s": 5e10,
    "bandwidth_fraction": 0.75,
}


class Backend:
    def __init__(self):
        self.card = ModelCard("m", 1, 1, None, None)
        self.now = dict(WELL)
        self.totals = {
            "steps": 3,
            "prompt_tokens": 100,
            "cached_tokens": 40,
            "generated_tokens": 7,
            "expert_bytes": 9,
            "decode_bytes": 1000,
            "decode_seconds": 0.125,
            "disk_tokens": 10,
            "cache_evictions": 3,
            "worker_restarts": 2,
            "finished_samples": {"stop": 4, "error": 1},
            "queue_time_s": {"buckets": [[0.5, 1], [math.inf, 3]], "count": 3, "sum": 2.5},
        }

    def health(self):
        return self.now

    def counters(self):
        return self.totals


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "ok", ""),
        ({"running": 3, "last_step_age_s": 1.0}, "ok", ""),
        ({"running": 3, "step_running_s": 100.0}, "ok", ""),
        ({"step_running_s": 121.0, "running": 1}, "stalled", "running for 121 s"),
        ({"waiting": 1}, "stalled", "no step for 500 s"),
        ({"alive": False, "state": "stuck"}, "stuck", ""),
        ({"alive": False, "state": "dead", "error": "SIGBUS"}, "dead", "SIGBUS"),
        ({"alive": False, "state": "loading"}, "loading", ""),
    ],
)
def test_health(changes, status, words):
    backend = Backend()
    backend.now |= changes
    found, reason = assess(backend.now)
    assert found == status
    assert words in (reason or "")
    app = FastAPI()
    app.include_router(health_router(backend))
    with TestClient(app) as client:
        response = client.get("/health")
        assert response.status_code == (200 if status == "ok" else 503)
        assert response.json()["status"] == status
        assert ("retry-after" in response.headers) == (status != "ok")
        assert client.get("/ready").status_code == (200 if status == "ok" else 503)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"queued_requests": 8}, "queue is full"), ({"state": "draining"}, "takes no new requests")],
)
def test_an_engine_may_be_well_and_not_ready(changes, words):
    health = WELL | changes
    assert assess(health)[0] == "ok"
    can_accept, reason = is_ready(health)
    assert not can_accept
    assert words in reason


def test_what_was_counted_of_the_disk_stays_while_the_engine_is_started_again():
    backend = Backend()
    metrics = ServerMetrics(backend)
    counted = b'prefix_cache_tier_hits_total{model_name="m",tier="disk"} 10.0'
    assert counted in metrics.render()
    backend.now = {"alive": False, "state": "restarting"}
    assert counted in metrics.render()
    backend.totals |= {"disk_tokens": 0}
    assert b'tier="disk"' not in metrics.render()


def test_metrics():
    backend = Backend()
    metrics = ServerMetrics(backend)
    metrics.request_started("chat")
    metrics.first_token(0.3)
    metrics.inter_token(0.02)
    metrics.inter_token(0.03)
    totals = Totals(100, 40, 7, 2, queue_s=0.1, prefill_s=0.4, decode_s=0.6, longest=4)
    metrics.finished("stop", totals, 1.2)
    metrics.rejected("queue_full")
    metrics.cancelled("decode")
    app = FastAPI()
    app.include_router(metrics_router(metrics))
    with TestClient(app) as client:
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *(v for k, v in sample.labels.items() if k != "model_name")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    expected = {
        ("moejet:prompt_tokens_total",): 100,
        ("moejet:generation_tokens_total",): 7,
        ("moejet:prefix_cache_queries_total",): 100,
        ("moejet:prefix_cache_hits_total",): 40,
        ("moejet:kv_cache_usage_perc",): 0.25,
        ("moejet:expert_bytes_loaded_total",): 9,
        ("moejet:engine_restarts_total",): 2,
        ("moejet:engine_up",): 1,
        ("moejet:generation_tokens_per_second",): 12.5,
        ("moejet:finished_samples_total", "error"): 1,
        ("moejet:request_queue_time_seconds_bucket", "0.5"): 1,
        ("moejet:request_queue_time_seconds_bucket", "+Inf"): 3,
        ("moejet:request_queue_time_seconds_sum",): 2.5,
        ("moejet:request_success_total", "stop"): 1,
        ("moejet:http_requests_started_total", "chat"): 1,
        ("moejet:admission_rejections_total", "queue_full"): 1,
        ("moejet:cancelled_requests_total", "decode"): 1,
        ("moejet:time_to_first_token_seconds_bucket", "0.25"): 0,
        ("moejet:time_to_first_token_seconds_bucket", "0.5"): 1,
        ("moejet:inter_token_latency_seconds_count",): 2,
        ("moejet:e2e_request_latency_seconds_sum",): 1.2,
        ("moejet:request_prompt_tokens_sum",): 100,
        ("moejet:request_generation_tokens_sum",): 7,
        ("moejet:request_prefill_time_seconds_sum",): 0.4,
        ("moejet:request_decode_time_seconds_sum",): 0.6,
        ("moejet:request_time_per_output_token_seconds_sum",): pytest.approx(0.2),
        ("moejet:prefix_cache_blocks", "ram"): 25,
        ("moejet:prefix_cache_blocks", "disk"): 60,
        ("moejet:prefix_cache_tier_hits_total", "ram"): 30,
        ("moejet:prefix_cache_tier_hits_total", "disk"): 10,
        ("moejet:prefix_cache_evictions_total", "ram"): 3,
        ("moejet:memory_read_bytes_per_second",): 5e10,
        ("moejet:memory_bandwidth_fraction",): 0.75,
        ("moejet:decode_weight_bytes_total",): 1000,
        ("moejet:decode_seconds_total",): 0.125,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["moejet:process_resident_memory_bytes", "server"] > 1 << 20


def test_metrics_of_an_engine_that_is_being_restarted():
    backend = Backend()
    backend.now = {"alive": False, "state": "restarting", "running": 0, "worker_pid": None}
    backend.totals = {"worker_restarts": 3}
    text = ServerMetrics(backend).render().decode()
    assert 'moejet:engine_up{model_name="m"} 0.0' in text
    assert 'moejet:engine_restarts_total{model_name="m"} 3.0' in text
    assert 'process="engine"' not in text
