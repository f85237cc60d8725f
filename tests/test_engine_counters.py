import asyncio
import math
from dataclasses import replace

import pytest

from moejet import LLM, AsyncLLM, SamplingParams
from moejet.engine_counters import Histogram, Rate
from moejet.layers.moe import MoE
from moejet.testing.checkpoints import tiny_checkpoint


@pytest.mark.parametrize("seconds", [1.0, 50.0])
def test_a_steady_rate_is_found_at_any_time(seconds):
    """10 events a second: a short window has forgotten its start, a long one has not filled yet."""
    rate = Rate(seconds)
    assert rate.per_s(0.0) == 0.0
    for i in range(200):
        rate.add(1, now=100 + i / 10)
        if i > 50:
            assert rate.per_s(100 + (i + 1) / 10) == pytest.approx(10, rel=0.06)


def test_a_rate_decays_when_nothing_happens():
    rate = Rate(2.0)
    rate.add(100, now=5.0)
    assert rate.per_s(25.0) < 0.01


def test_histogram_counts_up_to_each_bound():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 3.0):
        histogram.observe(value)
    assert histogram.as_dict() == {
        "buckets": [[0.1, 2], [1.0, 3], [math.inf, 4]],
        "count": 4,
        "sum": pytest.approx(3.65),
    }


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tiny_checkpoint(tmp_path_factory.mktemp("m"), "deepseek_v3", num_hidden_layers=2)
    with LLM(path, max_context=128, max_batch_tokens=32, prefix_caching=False) as llm:
        assert sum(isinstance(layer.mlp, MoE) for layer in llm.engine.runner.model.layers) == 1
        yield llm


def test_expert_loads_are_the_distinct_experts_of_each_step(llm):
    """One MoE layer, so the program's buffer of chosen experts is that layer's."""
    runner = llm.engine.runner
    execute, distinct = runner.execute, []

    def watch(batch):
        before = llm.counters()["expert_loads"]
        logits = execute(batch)
        distinct.append(runner._program._topk_ids[: batch.num_tokens].unique().numel())
        assert llm.counters()["expert_loads"] - before == distinct[-1]
        return logits

    before = llm.counters()
    runner.execute = watch
    try:
        params = SamplingParams(max_tokens=9, ignore_eos=True, seed=1)
        llm.generate([[10 + i] * (1 + 9 * i) for i in range(6)], params)
    finally:
        runner.execute = execute
    gained = {key: value - before[key] for key, value in llm.counters().items()}
    assert gained["steps"] == len(distinct)
    assert gained["expert_loads"] == sum(distinct)
    experts = llm.engine.runner.model.layers[1].mlp.experts.weights
    assert gained["expert_bytes"] == sum(distinct) * experts.expert_nbytes > 0
    assert len(set(distinct)) > 2


def test_one_token_reads_top_k_experts_in_every_layer(llm):
    config = replace(llm.model_config, num_hidden_layers=4)
    with LLM.synthetic(config, max_context=64) as deep:
        before = deep.counters()
        deep.generate([[1]], SamplingParams(max_tokens=8, ignore_eos=True))
        gained = {key: value - before[key] for key, value in deep.counters().items()}
        num_layers = sum(isinstance(layer.mlp, MoE) for layer in deep.engine.runner.model.layers)
        assert gained["expert_loads"] == 8 * num_layers * config.num_experts_per_tok
        assert num_layers == 3
        assert (gained["prefill_tokens"], gained["decode_tokens"]) == (1, 7)


def test_async_counters_hold_both(llm):
    async def main():
        async with AsyncLLM.synthetic(llm.model_config, max_context=64) as served:
            await served.complete([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
            return served.counters()

    counters = asyncio.run(main())
    assert counters.keys() > llm.counters().keys()
    assert (counters["prompt_tokens"], counters["generated_tokens"]) == (3, 4)
    assert counters["accepted_requests"] == 1
    assert counters["expert_loads"] > 0
