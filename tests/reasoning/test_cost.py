"""What parallel samples are expected to read, against a simulation, a table and the engine's own counts."""

import random

import pytest

from moejet import LLM, SamplingParams
from moejet.reasoning.cost import (
    expected_distinct_experts,
    expert_reads,
    relative_cost,
)
from moejet.reasoning.result import Usage
from moejet.reasoning.sample import Sample
from moejet.reasoning.single import Single
from moejet.reasoning.solver import solve, solve_many
from moejet.testing.number_answers import NumberAnswers

PROMPT = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]


def simulate(
    experts: int, k: int, tokens: int, *, reuse: float = 0.0, working_set: int | None = None
) -> float:
    rng = random.Random(0)
    totals = []
    for _ in range(1500):
        pool = rng.sample(range(experts), working_set or experts)
        first = rng.sample(pool, k)
        seen = set(first)
        for _ in range(tokens - 1):
            # The formula takes reuse to hold for each expert on its own; whole sets have the same mean per expert.
            seen.update(first if rng.random() < reuse else rng.sample(pool, k))
        totals.append(len(seen))
    return sum(totals) / len(totals)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1: 8.0, 2: 15.75, 8: 57.4, 16: 102.0, 64: 222.4}),
        ({"reuse": 0.3}, {1: 8.0, 2: 13.4, 8: 43.6, 16: 78.0}),
        ({"reuse": 0.6}, {2: 11.1, 8: 28.9, 64: 143.7}),
        ({"working_set": 128}, {2: 15.5, 8: 51.6, 64: 125.9}),
        ({"reuse": 1.0}, {1: 8.0, 64: 8.0}),
    ],
)
def test_distinct_experts_of_256_with_8_per_token(options: dict, expected: dict) -> None:
    for tokens, value in expected.items():
        found = expected_distinct_experts(256, 8, tokens, **options)
        assert found == pytest.approx(value, abs=0.06), tokens


@pytest.mark.parametrize("options", [{}, {"reuse": 0.5}, {"working_set": 32}])
def test_simulated_tokens_touch_as_many(options: dict) -> None:
    found = simulate(64, 6, 8, **options)
    assert expected_distinct_experts(64, 6, 8, **options) == pytest.approx(found, rel=0.02)


def test_few_tokens() -> None:
    assert expected_distinct_experts(64, 6, 0) == 0
    assert expected_distinct_experts(64, 6, 0.5) == 3
    assert expected_distinct_experts(64, 6, 1, reuse=0.4) == pytest.approx(6)
    assert expected_distinct_experts(6, 6, 3) == 6


@pytest.mark.parametrize(
    ("samples", "distinct", "whole", "with_fixed_share"),
    [(1, 6.0, 1.0, 1.0), (8, 34.9, 0.73, 0.61), (16, 50.8, 0.53, 0.44), (64, 63.9, 0.17, 0.14)],
)
def test_relative_cost_of_64_experts_with_6_per_token(
    samples: int, distinct: float, whole: float, with_fixed_share: float
) -> None:
    found = expected_distinct_experts(64, 6, samples)
    assert found == pytest.approx(distinct, abs=0.06)
    assert relative_cost(found, 6, samples) == pytest.approx(whole, abs=0.006)
    cost = relative_cost(found, 6, samples, fixed_share=0.2)
    assert cost == pytest.approx(with_fixed_share, abs=0.006)


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((64, 65, 1), {}, "experts_per_token=65"),
        ((64, 0, 1), {}, "experts_per_token=0"),
        ((64, 6, -1), {}, "num_tokens=-1"),
        ((64, 6, 1), {"reuse": 1.5}, "reuse=1.5"),
        ((64, 6, 1), {"working_set": 5}, "working_set=5"),
        ((64, 6, 1), {"working_set": 65}, "working_set=65"),
    ],
)
def test_wrong_numbers_are_named(arguments: tuple, options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        expected_distinct_experts(*arguments, **options)
    with pytest.raises(ValueError, match="num_samples=0"):
        relative_cost(6, 6, 0)
    with pytest.raises(ValueError, match="fixed_share=2"):
        relative_cost(6, 6, 1, fixed_share=2)


def test_the_engine_counts_what_a_run_reads(llm: LLM) -> None:
    model = llm.model_config
    params = SamplingParams(temperature=1.0)
    before = llm.counters()
    result = solve(llm, PROMPT, Sample(8), params=params, answers=NumberAnswers())
    after = llm.counters()
    usage = result.usage
    assert usage.step_share == pytest.approx(usage.steps)
    assert usage.steps == after["steps"] - before["steps"]
    reads = expert_reads(usage, model)
    assert reads is not None
    loads = after["expert_loads"] - before["expert_loads"]
    assert reads.measured == pytest.approx(loads / usage.steps / model.num_moe_layers)
    assert model.num_experts_per_tok < reads.measured <= model.num_experts
    assert model.num_experts_per_tok < reads.expected <= model.num_experts
    # Alone it reads what one token asks for, but for the prompt's steps.
    alone = expert_reads(
        solve(llm, PROMPT, Single(), params=params, answers=NumberAnswers()).usage, model
    )
    assert alone is not None
    assert alone.measured < reads.measured
    assert alone.expected < reads.expected
    assert expert_reads(Usage(), model) is None


def test_shares_of_common_steps_add_up(llm: LLM) -> None:
    before = llm.counters()
    results = solve_many(llm, [PROMPT] * 3, Sample(2), answers=NumberAnswers(), concurrency=3)
    after = llm.counters()
    usages = [result.usage for result in results]
    steps = after["steps"] - before["steps"]
    assert sum(usage.step_share for usage in usages) == pytest.approx(steps)
    assert sum(usage.steps for usage in usages) > steps
    loads = after["expert_loads"] - before["expert_loads"]
    assert sum(usage.expert_loads for usage in usages) == pytest.approx(loads)
