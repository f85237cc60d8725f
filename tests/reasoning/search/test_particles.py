"""Particle filtering: resampling is unbiased, and the filter follows its weights."""

import random
from collections import Counter

import pytest

from moejet import LLM, SamplingParams
from moejet.reasoning.budget import Budget
from moejet.reasoning.scorers import Confidence
from moejet.reasoning.search.particles import ParticleFilter, multinomial, normalised, systematic
from moejet.reasoning.solver import solve
from moejet.testing import arithmetic
from moejet.testing.arithmetic_oracle import StepOracle
from moejet.testing.number_answers import NumberAnswers

PROBLEM, TEXT = arithmetic.held_out_problems(3, seed=5, min_steps=7, max_steps=8)[0]
PROMPT = [{"role": "user", "content": TEXT}]
HOT = SamplingParams(temperature=1.2)
WEIGHTS = [0.4, 0.05, 0.25, 0.0, 0.3]


def test_multinomial_resampling_is_unbiased() -> None:
    rng = random.Random(1)
    counts = Counter(i for _ in range(2000) for i in multinomial(WEIGHTS, 10, rng))
    assert counts[3] == 0
    chi_square = sum(
        (counts[i] - 20_000 * weight) ** 2 / (20_000 * weight)
        for i, weight in enumerate(WEIGHTS)
        if weight
    )
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001


def test_systematic_resampling_is_unbiased_and_rounds() -> None:
    rng = random.Random(2)
    n, runs = 7, 4000
    rounded_up: Counter[int] = Counter()
    for _ in range(runs):
        drawn = systematic(WEIGHTS, n, rng.random())
        assert len(drawn) == n
        for i, weight in enumerate(WEIGHTS):
            more = drawn.count(i) - int(n * weight)
            assert more in (0, 1)
            rounded_up[i] += more
    # Each is rounded up as often as its fraction says: a chi-square of one degree of freedom each.
    for i, weight in enumerate(WEIGHTS):
        share = n * weight - int(n * weight)
        expected, missed = runs * share, runs * (1 - share)
        if share:
            chi_square = (rounded_up[i] - expected) ** 2 * (1 / expected + 1 / missed)
            assert chi_square < 10.83, i  # p = 0.001
    assert systematic([0.5, 0.5], 4, 0.0) == [0, 0, 1, 1]
    assert systematic([1 / 3] * 3, 3, 0.999999) == [0, 1, 2]
    assert systematic([0.1] * 10 + [0.0], 10, 0.9999999999) == list(range(10))


def test_weights_are_odds_of_the_score() -> None:
    particles = ParticleFilter(4, Confidence())
    logs = [particles._log_weight(score) for score in (0.5, 0.8, 0.2)]
    assert logs == pytest.approx([0.0, 1.3862943611, -1.3862943611])
    assert normalised(logs) == pytest.approx([1 / 5.25, 4 / 5.25, 0.25 / 5.25])
    assert particles._log_weight(1.0) == pytest.approx(13.8155, abs=1e-3)


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_a_perfect_verifier_leads_the_particles(llm: LLM, resampling: str) -> None:
    strategy = ParticleFilter(6, StepOracle(PROBLEM), resampling=resampling)  # type: ignore[arg-type]
    result = solve(llm, PROMPT, strategy, params=HOT, answers=NumberAnswers(), seed=2)
    assert result.answer == str(PROBLEM.answer)
    assert len(result.candidates) == 6
    # Who was wrong while another was right has no descendants.
    nodes = result.nodes
    parents = {node.parent for node in nodes}
    right = {node.parent for node in nodes if node.score == 1.0}
    for node in nodes[1:]:
        if node.score == 0.0 and node.parent in right and node.state == "pruned":
            assert node.number not in parents
    assert any(node.state == "pruned" for node in nodes)
    assert llm.engine.scheduler.held == []


def test_logarithms_as_weights_and_the_budget(llm: LLM) -> None:
    strategy = ParticleFilter(4, Confidence(), scale="log", final="vote")
    result = solve(llm, PROMPT, strategy, params=HOT, answers=NumberAnswers(), seed=1)
    assert result.answer is not None
    assert 0 < result.confidence <= 1
    cut = solve(
        llm, PROMPT, strategy, params=HOT, answers=NumberAnswers(), budget=Budget(total_tokens=100)
    )
    assert cut.is_exhausted
    assert cut.usage.generated_tokens <= 100
    with pytest.raises(ValueError, match="is no probability"):
        solve(llm, PROMPT, ParticleFilter(2, Confidence()), answers=NumberAnswers())
    assert llm.engine.scheduler.held == []


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="n=0"):
        ParticleFilter(0, Confidence())
    with pytest.raises(ValueError, match="resampling='all'"):
        ParticleFilter(2, Confidence(), resampling="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature=0"):
        ParticleFilter(2, Confidence(), temperature=0)
