"""moejet.reasoning.metrics against closed forms and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejet.reasoning.metrics import (
    Interval,
    Solution,
    bootstrap_interval,
    mcnemar,
    mean_pass_at_k,
    outcome_efficiency,
    paired_bootstrap,
    pass_at_k,
    plurality,
    process_efficiency,
    risk_coverage,
    truncation_rate,
    wilson_interval,
)


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))
    )
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_stable() -> None:
    assert pass_at_k(1000, 0, 10) == 0.0
    assert pass_at_k(10, 10, 1) == 1.0
    exact = 1 - math.comb(99_999, 500) / math.comb(100_000, 500)
    assert pass_at_k(100_000, 1, 500) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12)
    for arguments in ((5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)):
        with pytest.raises(ValueError, match=r"num_correct|k="):
            pass_at_k(*arguments)


def test_averages() -> None:
    outcomes = [[1, 0, 0, 1], [0, 0, 0, 0], [True, True, True, True]]
    assert mean_pass_at_k(outcomes, 1) == pytest.approx(0.5)
    assert mean_pass_at_k(outcomes, 2) == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert mean_pass_at_k(outcomes, 4) == pytest.approx(2 / 3)
    for bad in ([], [[]], [1, 0], [[2, 0]]):
        with pytest.raises(ValueError, match="correct"):
            mean_pass_at_k(bad, 1)


def test_plurality_and_ties() -> None:
    assert plurality(["a", "b", "b"]) == "b"
    assert plurality(["a", "b"]) == "a"
    assert plurality([None, None, "b"]) == "b"
    assert plurality([None]) is None
    assert plurality([]) is None
    assert plurality(["a", "b"], [-3.0, -1.0]) == "b"
    # over the whole class, not by its best sample
    logs = [math.log(p) for p in (0.5, 0.3, 0.01, 0.3)]
    assert plurality(["a", "b", "a", "b"], logs) == "b"
    assert plurality(["a", "a", "b"], [-100.0, -100.0, 0.0]) == "a"
    with pytest.raises(ValueError, match="1 logprobs for 2 keys"):
        plurality(["a", "b"], [0.0])


def test_wilson_interval() -> None:
    z = 1.959963984540054
    for successes, trials in ((0, 10), (5, 10), (81, 263), (10, 10)):
        interval = wilson_interval(successes, trials)
        for bound in (
            interval.low,
            interval.high,
        ):  # the bounds solve |share - p| = z sqrt(p (1 - p) / n)
            if 0 < bound < 1:
                assert abs(successes / trials - bound) == pytest.approx(
                    z * math.sqrt(bound * (1 - bound) / trials), rel=1e-9
                )
    assert wilson_interval(0, 10).low == 0
    assert wilson_interval(10, 10).high == 1
    assert wilson_interval(0, 10).high == pytest.approx(z * z / (10 + z * z))
    assert wilson_interval(5, 10, level=0.5).low > wilson_interval(5, 10).low
    for arguments, level in (((1, 0), 0.95), ((3, 2), 0.95), ((-1, 2), 0.95), ((1, 2), 1.0)):
        with pytest.raises(ValueError, match=r"trials|level"):
            wilson_interval(*arguments, level=level)


def test_bootstrap_interval() -> None:
    values = np.repeat([0.0, 1.0], [150, 250])
    interval = bootstrap_interval(values, resamples=4000)
    spread = 1.96 * math.sqrt(values.var() / values.size)
    assert interval.low == pytest.approx(values.mean() - spread, abs=0.006)
    assert interval.high == pytest.approx(values.mean() + spread, abs=0.006)
    assert bootstrap_interval(values, resamples=50) == bootstrap_interval(values, resamples=50)
    assert bootstrap_interval([0.5] * 4) == Interval(0.5, 0.5)
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval([1.0], resamples=0)


def test_bootstrap_of_two_values_is_a_binomial() -> None:
    """Of n = 2 problems {0, 1}: means 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0.0, 1.0], level=0.4, resamples=4000) == Interval(0.5, 0.5)
    assert bootstrap_interval([0.0, 1.0], level=0.6, resamples=4000) == Interval(0.0, 1.0)


def test_paired_bootstrap() -> None:
    generator = np.random.default_rng(1)
    first = generator.random(300) < 0.6
    better = first | (generator.random(300) < 0.3)
    gain = paired_bootstrap(first, better, resamples=2000)
    assert gain.difference == pytest.approx(better.mean() - first.mean())
    assert gain.interval.low > 0
    assert gain.p_value < 0.01
    same = paired_bootstrap(first, first, resamples=200)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    noise = paired_bootstrap([1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0], resamples=500)
    assert noise.p_value > 0.5
    # pairing matters: the same marginals, unpaired, would be far from significant
    varied = generator.normal(0, 10, 300)
    assert (
        paired_bootstrap(
            varied, varied + 0.1 + generator.normal(0, 0.1, 300), resamples=500
        ).p_value
        < 0.01
    )
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap([1, 0], [1])


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_by_enumeration(gained: int, lost: int) -> None:
    first = [False] * gained + [True] * lost + [True, False]
    second = [True] * gained + [False] * lost + [True, False]
    n = gained + lost
    chance = [math.comb(n, i) / 2**n for i in range(n + 1)]
    expected = min(
        1.0, sum(p for i, p in enumerate(chance) if abs(i - n / 2) >= abs(gained - n / 2))
    )
    assert mcnemar(first, second) == pytest.approx(expected)


def test_mcnemar_of_many_problems() -> None:
    first = np.zeros(5000, dtype=bool)
    assert mcnemar(first, ~first) < 1e-300
    first[:2500] = True
    assert mcnemar(first, ~first) == 1.0
    with pytest.raises(ValueError, match="same problems"):
        mcnemar([True], [True, False])


def test_efficiency() -> None:
    once = [Solution(100, "5", True)]
    twice = [Solution(100, "5", True), Solution(50, "5", True), Solution(50, "5", True)]
    late = [Solution(60, "4", False), Solution(40, "5", True), Solution(100, "4", False)]
    never = [Solution(10, "1", False)]
    assert outcome_efficiency([once]) == 1.0
    assert outcome_efficiency([twice]) == pytest.approx(0.5)
    assert outcome_efficiency([late]) == pytest.approx(0.5)
    assert outcome_efficiency([never]) == 0.0
    assert outcome_efficiency([once, twice, late, never]) == pytest.approx(0.5)
    assert process_efficiency([once]) == 1.0
    assert process_efficiency([twice]) == pytest.approx(0.5)
    assert process_efficiency([late]) == pytest.approx(0.5)
    for bad in ([], [[]], [[Solution(0, "1", True)]]):
        with pytest.raises(ValueError, match="traces"):
            outcome_efficiency(bad)


def test_truncation_rate() -> None:
    assert truncation_rate(["stop", "length", "stop", "length"]) == 0.5
    with pytest.raises(ValueError, match="empty"):
        truncation_rate([])


def test_risk_coverage() -> None:
    curve = risk_coverage([0.9, 0.8, 0.8, 0.1], [True, False, True, False])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.75, 1.0])
    np.testing.assert_allclose(curve.risk, [0.0, 1 / 3, 0.5])
    np.testing.assert_allclose(curve.threshold, [0.9, 0.8, 0.1])
    assert curve.area == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 * 0.5)
    perfect = risk_coverage(np.arange(10), np.arange(10) >= 4)
    assert (np.diff(perfect.risk) >= 0).all()
    assert risk_coverage([1.0], [False]).risk.tolist() == [1.0]
    for scores, right in (([], []), ([1.0], [True, False]), ([math.nan], [True])):
        with pytest.raises(ValueError, match=r"shapes|NaN"):
            risk_coverage(scores, right)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20))
def test_risk_coverage_by_brute_force(answers: list[tuple[int, bool]]) -> None:
    scores, right = zip(*answers, strict=True)
    curve = risk_coverage(scores, right)
    for coverage, risk, threshold in zip(curve.coverage, curve.risk, curve.threshold, strict=True):
        kept = [r for s, r in answers if s >= threshold]
        assert coverage == pytest.approx(len(kept) / len(answers))
        assert risk == pytest.approx(kept.count(False) / len(kept))
    assert len(curve.risk) == len(set(scores))
