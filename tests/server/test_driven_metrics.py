"""/metrics after a workload whose figures can be worked out by hand."""

import asyncio
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moejet import AsyncLLM, decode_traffic
from moejet.layers.moe import MoE
from moejet.model_cost import ModelCost
from moejet.server import asgi_app
from moejet.testing.checkpoints import tiny_checkpoint

BLOCK = 8
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("served"), "deepseek_v3")


class Client:
    """Asks an application on one event loop."""

    def __init__(self, llm: AsyncLLM):
        transport = httpx.ASGITransport(asgi_app(llm, model_name="tiny"))
        self._http = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def complete(self, prompt: list[int], max_tokens: int, **fields: object) -> dict:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            **fields,
        }
        response = await self._http.post(PATH, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def metrics(self) -> dict[tuple[str, ...], float]:
        text = (await self._http.get("/metrics")).text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                # As with vLLM, everything says which model it is about.
                assert sample.labels["model_name"] == "tiny", sample
                name = sample.name.removeprefix("moejet:")
                labels = [v for k, v in sample.labels.items() if k != "model_name"]
                found[name, *labels] = sample.value
        return found


def test_decoding_expert_loads_and_bandwidth(model):
    async def main() -> None:
        async with AsyncLLM(model, max_context=128, memory_gbps=0.25) as llm:
            runner = llm._thread.engine.runner
            num_layers = sum(isinstance(layer.mlp, MoE) for layer in runner.model.layers)
            top_k = llm.model_config.num_experts_per_tok
            [experts] = {
                layer.mlp.experts.weights.expert_nbytes
                for layer in runner.model.layers
                if isinstance(layer.mlp, MoE)
            }
            client = Client(llm)
            before = await client.metrics()
            assert ("memory_bandwidth_fraction",) not in before
            num_tokens = 21
            await client.complete([5], num_tokens)
            found = await client.metrics()
            # A step per token; the first one computes the prompt.
            loads = num_layers * top_k
            assert found["engine_steps_total",] == num_tokens
            assert found["decode_steps_total",] == num_tokens - 1
            assert found["decode_tokens_computed_total",] == num_tokens - 1
            assert found["prefill_tokens_computed_total",] == 1
            assert found["expert_loads_total",] == num_tokens * loads
            assert found["expert_bytes_loaded_total",] == num_tokens * loads * experts
            cost = ModelCost.of(llm.model_config, llm.config)
            dense = sum(
                size for name, size in cost._dense_matrix_bytes() if not name.endswith("w_uk")
            )
            dense += 4 * num_layers * llm.model_config.num_experts * llm.model_config.hidden_size
            step_bytes = round(dense) + loads * experts
            assert found["decode_weight_bytes_total",] == (num_tokens - 1) * step_bytes
            seconds = found["decode_seconds_total",]
            assert 0 < seconds < found["e2e_request_latency_seconds_sum",]
            assert found["memory_read_bytes_per_second",] == 2.5e8
            assert found["memory_bandwidth_fraction",] == pytest.approx(
                (num_tokens - 1) * step_bytes / seconds / 2.5e8, rel=0.1
            )

            # Two at once share what they read, so a step reads at most both's experts.
            await asyncio.gather(client.complete([6], 30), client.complete([7], 30))
            both = await client.metrics()
            steps = both["engine_steps_total",] - found["engine_steps_total",]
            gained = both["expert_loads_total",] - found["expert_loads_total",]
            assert steps * loads < gained <= 60 * loads
            assert both["generation_tokens_total",] == num_tokens + 60
            assert both["request_success_total", "length"] == 3
            assert both["request_time_per_output_token_seconds_count",] == 3
            assert both["request_decode_time_seconds_count",] == 3

    asyncio.run(main())


def test_tiers_of_the_prefix_cache(model, tmp_path):
    options = {
        "block_size": BLOCK,
        "max_context": 8 * BLOCK,
        "cache_tokens": 8 * BLOCK,
        "prefix_min_tokens": BLOCK,
        "prefix_disk_gib": 1.0,
        "prefix_dir": tmp_path / "prefix",
    }

    async def main() -> None:
        async with AsyncLLM(model, **options) as llm:
            client, scheduler = Client(llm), llm._thread.engine.scheduler
            # Two full blocks and a token, and one to generate: three blocks while it runs, two that stay.
            prompts = [[10 * i + j % 7 + 3 for j in range(2 * BLOCK + 1)] for i in range(4)]

            async def ask(i: int) -> int:
                answer = await client.complete(prompts[i], 2)
                return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

            assert [await ask(0), await ask(1), await ask(2)] == [0, 0, 0]
            assert await ask(0) == 2 * BLOCK  # all but the token that must be computed
            scheduler.store.flush()
            found = await client.metrics()
            expected = {
                "prefix_cache_blocks": {"ram": 6, "disk": 6},
                "prefix_cache_tier_hits_total": {"ram": 2 * BLOCK, "disk": 0},
                "prefix_cache_evictions_total": {"ram": 0, "disk": 0},
            }
            for name, tiers in expected.items():
                assert {t: found[name, t] for t in tiers} == tiers, name
            assert found["kv_cache_usage_perc",] == 0.0

            # Two blocks were unused, so the fourth prompt takes the oldest one: the end of the second prompt.
            assert await ask(3) == 0
            # Its beginning is still there, its end comes from disk and takes the last unused block; another one has
            # to go for the token that is computed.
            scheduler._seconds_per_token = 1.0  # so that reading is worth it
            assert await ask(1) == 2 * BLOCK
            scheduler.store.flush()
            found = await client.metrics()
            expected = {
                "prefix_cache_tier_hits_total": {"ram": 3 * BLOCK, "disk": BLOCK},
                "prefix_cache_evictions_total": {"ram": 2, "disk": 0},
                "prefix_cache_blocks": {"ram": 7, "disk": 8},
            }
            for name, tiers in expected.items():
                assert {t: found[name, t] for t in tiers} == tiers, name
            assert found["prefix_cache_hits_total",] == 4 * BLOCK
            assert found["prefix_cache_queries_total",] == 6 * (2 * BLOCK + 1)

    asyncio.run(main())


def test_the_ceiling_is_measured_for_large_models_only(model, monkeypatch):
    measured = []

    class Meter:
        def __init__(self, pool, *, isa):
            pass

        def read(self):
            measured.append(True)
            return type("Ceiling", (), {"value": 12.5})

    monkeypatch.setattr("moejet.ceilings.Meter", Meter)

    async def ceiling(**options: object) -> float | None:
        async with AsyncLLM(model, max_context=64, **options) as llm:
            return llm.health()["memory_bytes_per_s"]

    assert asyncio.run(ceiling()) is None
    monkeypatch.setattr(decode_traffic, "MIN_WEIGHT_BYTES", 1)
    assert asyncio.run(ceiling(memory_gbps=0)) is None
    assert asyncio.run(ceiling(memory_gbps=3)) == 3e9
    assert not measured
    assert asyncio.run(ceiling()) == 12.5e9
    for wrong in (-1, "fast", True, float("nan")):
        with pytest.raises(ValueError, match="memory_gbps="):
            asyncio.run(ceiling(memory_gbps=wrong))
