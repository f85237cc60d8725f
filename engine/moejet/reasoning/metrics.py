"""Figures of an evaluation: accuracy over samples, intervals, paired tests, and what the thinking cost.

Outcomes are arrays [problems, samples] of booleans unless said otherwise. Everything random is seeded.

Sources: pass@k, Chen et al. 2021 (Codex); outcome and process efficiency, Chen et al. 2024 ("Do not think that much");
Wilson 1927; McNemar 1947 in its exact form; bootstrap percentiles, Efron 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedResult:
    """A comparison of two strategies on the same problems; `difference` is second minus first."""

    difference: float
    interval: Interval
    p_value: float


# --- accuracy ------------------------------------------------------------------------------------


def _outcomes(correct: ArrayLike) -> Floats:
    array = np.asarray(correct, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"correct has shape {array.shape}, expected [problems, samples], neither of them 0"
        )
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError("correct must hold booleans")
    return array


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the unbiased chance that one of k samples is right, given c right ones among n."""
    n, c = num_samples, num_correct
    if not 0 <= c <= n:
        raise ValueError(f"num_correct={c} must lie in 0..{n}")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must lie in 1..{n}, the number of samples per problem")
    if n - c < k:
        return 1.0
    # The quotient is the product of (1 - k / i) for i in n-c+1 .. n; log1p and expm1 keep small chances exact.
    factors = k / np.arange(n - c + 1, n + 1, dtype=np.float64)
    return float(-np.expm1(np.log1p(-factors).sum()))


def mean_pass_at_k(correct: ArrayLike, k: int) -> float:
    """pass@k, averaged over problems."""
    outcomes = _outcomes(correct)
    n = outcomes.shape[1]
    return float(np.mean([pass_at_k(n, int(c), k) for c in outcomes.sum(axis=1)]))


def plurality(
    keys: Sequence[Hashable | None], logprobs: Sequence[float] | None = None
) -> Hashable | None:
    """The most frequent key; ties go to the larger summed log-probability, then to the first. None does not vote."""
    if logprobs is not None and len(logprobs) != len(keys):
        raise ValueError(f"{len(logprobs)} logprobs for {len(keys)} keys")
    votes: dict[Hashable, list[float]] = {}
    for index, key in enumerate(keys):
        if key is not None:
            votes.setdefault(key, []).append(0.0 if logprobs is None else float(logprobs[index]))
    if not votes:
        return None
    return max(votes, key=lambda key: (len(votes[key]), sum(votes[key])))


# --- intervals and tests -------------------------------------------------------------------------


def wilson_interval(successes: float, trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"successes={successes} of trials={trials}: need 0 <= successes <= trials, trials >= 1"
        )
    z = _normal_quantile(0.5 + _level(level) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return Interval(max(0.0, low), min(1.0, high))


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, e.g. 0.95")
    return level


def _normal_quantile(p: float) -> float:
    """By bisection of the error function: exact to the last digits, and fast enough."""
    low, high = -40.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean over problems; `values` [problems], e.g. each problem's mean over samples."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values has shape {array.shape}, expected [problems], at least one")
    means = _resampled_means(array, resamples, seed)
    tail = (1 - _level(level)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resampled_means(array: Floats, resamples: int, seed: int) -> Floats:
    """Means of samples with replacement, a block at a time so that memory stays small."""
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1")
    generator = np.random.default_rng(seed)
    block = max(1, 1_000_000 // array.size)
    means = [
        array[generator.integers(0, array.size, (min(block, resamples - start), array.size))].mean(
            axis=1
        )
        for start in range(0, resamples, block)
    ]
    return np.concatenate(means)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedResult:
    """Resamples problems, keeping pairs. p_value: two-sided, of no difference, from the centred distribution."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(
            f"shapes {a.shape} and {b.shape}: both must be [problems], of the same problems"
        )
    differences = b - a
    observed = float(differences.mean())
    means = _resampled_means(differences, resamples, seed)
    tail = (1 - _level(level)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    extreme = np.count_nonzero(np.abs(means - observed) >= abs(observed) - 1e-12)
    return PairedResult(
        observed, Interval(float(low), float(high)), (extreme + 1) / (resamples + 1)
    )


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided p-value for booleans [problems] of two strategies: discordant pairs against Bin(n, 1/2)."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"shapes {a.shape} and {b.shape}: both must be [problems], of the same problems"
        )
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    n, fewer = gained + lost, min(gained, lost)
    tail, ways = 0, 1  # whole numbers: exact for any n
    for i in range(fewer + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * tail / (1 << n))


# --- what the thinking was worth -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Solution:
    """One attempt at the answer within a trace: its tokens, its answer's key, whether it is right."""

    tokens: int
    key: Hashable
    correct: bool


def outcome_efficiency(traces: Sequence[Sequence[Solution]]) -> float:
    """Mean of tokens up to the first right solution / all tokens; 0 for a trace without one. 1: no token wasted."""
    return _mean_share(traces, _tokens_to_first_correct)


def process_efficiency(traces: Sequence[Sequence[Solution]]) -> float:
    """Mean of tokens of solutions that differ from all earlier ones / all tokens. 1: no solution repeated."""
    return _mean_share(traces, _tokens_of_distinct)


def _mean_share(
    traces: Sequence[Sequence[Solution]], useful: Callable[[Sequence[Solution]], int]
) -> float:
    if not traces or any(not trace or sum(s.tokens for s in trace) <= 0 for trace in traces):
        raise ValueError(
            "traces: at least one, and each with at least one solution of at least one token"
        )
    return sum(useful(trace) / sum(s.tokens for s in trace) for trace in traces) / len(traces)


def _tokens_to_first_correct(trace: Sequence[Solution]) -> int:
    tokens = 0
    for solution in trace:
        tokens += solution.tokens
        if solution.correct:
            return tokens
    return 0


def _tokens_of_distinct(trace: Sequence[Solution]) -> int:
    first = {solution.key: solution.tokens for solution in reversed(trace)}
    return sum(first.values())


def truncation_rate(finish_reasons: Sequence[str]) -> float:
    """The share of samples that ran into their length limit."""
    if not finish_reasons:
        raise ValueError("finish_reasons is empty")
    return sum(reason == "length" for reason in finish_reasons) / len(finish_reasons)


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """`risk[i]`: share of wrong answers among those kept when the `coverage[i]` most confident are."""

    coverage: Floats
    risk: Floats
    threshold: Floats  # the smallest confidence kept

    @property
    def area(self) -> float:
        """Mean risk over all coverages: smaller is better."""
        steps = np.diff(self.coverage, prepend=0.0)
        return float((self.risk * steps).sum())


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """The curve over every threshold; answers of equal confidence are kept or dropped together."""
    scores, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    if scores.shape != right.shape or scores.ndim != 1 or not scores.size:
        raise ValueError(
            f"shapes {scores.shape} and {right.shape}: both must be [answers], at least one"
        )
    if np.isnan(scores).any():
        raise ValueError("confidence holds NaN")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), ranked.size - 1)
    wrong = np.cumsum(~right[order])[last]
    kept = last + 1
    return RiskCoverage(kept / ranked.size, wrong / kept, ranked[last])
