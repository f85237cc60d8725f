"""Which experts get slots: hit rates on traces against what is possible, swaps that pay, the bytes of a step."""

import math
from collections import deque

import numpy as np
import pytest

from moejet.experts.cache_policy import CachePolicy, Swap

EXPERTS, TOP_K, SLOTS = 64, 6, 16


def _zipf_trace(steps: int, exponent: float, seed: int, ranks=None) -> np.ndarray:
    """[steps, TOP_K] experts, drawn without replacement, expert ranks[0] most likely."""
    generator = np.random.default_rng(seed)
    ranks = np.arange(EXPERTS) if ranks is None else ranks
    weights = np.empty(EXPERTS)
    weights[ranks] = -exponent * np.log(np.arange(1, EXPERTS + 1))
    noise = generator.gumbel(size=(steps, EXPERTS))
    return np.argsort(-(weights + noise), axis=1)[:, :TOP_K]


def _uses(row: np.ndarray) -> np.ndarray:
    uses = np.zeros((1, EXPERTS), dtype=np.int64)
    uses[0, row] = 1
    return uses


def _run(policy: CachePolicy, trace: np.ndarray, latency: int = 2) -> tuple[np.ndarray, int]:
    """(hits of each step, number of swaps); a fetch takes `latency` steps."""
    hits, count = [], 0
    underway: deque[tuple[int, Swap]] = deque()
    for step, row in enumerate(trace):
        while underway and underway[0][0] <= step:
            policy.finish(underway.popleft()[1])
        hits.append(int(policy.is_cached[0, row].sum()))
        policy.observe(_uses(row))
        swaps = policy.choose()
        count += len(swaps)
        underway.extend((step + latency, swap) for swap in swaps)
        assert policy.is_cached.sum() + len(underway) <= SLOTS
    return np.array(hits) / TOP_K, count


def _policy(**options) -> CachePolicy:
    return CachePolicy(EXPERTS, [SLOTS], [100], **{"bytes_per_step": 100, **options})


def _best_static(trace: np.ndarray) -> float:
    """The experts that are used most, in the slots from the start: what frequencies alone allow."""
    counts = np.bincount(trace.ravel(), minlength=EXPERTS)
    return float(np.sort(counts)[-SLOTS:].sum() / trace.size)


def _belady(trace: np.ndarray) -> float:
    """Everything that is used is fetched at once, and what is used latest again goes: what knows the future."""
    later: list[deque[int]] = [deque() for _ in range(EXPERTS)]
    for step, row in enumerate(trace):
        for expert in row:
            later[expert].append(step)
    cached: set[int] = set()
    hits = 0
    for row in trace:
        hits += len(cached.intersection(row.tolist()))
        for expert in row.tolist():
            later[expert].popleft()
            cached.add(expert)
        while len(cached) > SLOTS:
            cached.remove(max(cached, key=lambda e: (later[e][0] if later[e] else math.inf, e)))
    return hits / trace.size


@pytest.mark.parametrize("exponent", [0.7, 1.2])
def test_steady_traffic_comes_near_the_best_static_choice(exponent):
    ranks = np.random.default_rng(5).permutation(EXPERTS)
    trace = _zipf_trace(1500, exponent, 1, ranks)
    frequent, _ = _run(_policy(kind="lfu"), trace)
    recent, _ = _run(_policy(kind="lru", price=1), trace)
    first = np.isin(trace, np.arange(SLOTS)).mean()  # any fixed choice without knowledge
    late = slice(500, None)
    static, bound = _best_static(trace[late]), _belady(trace[late])
    assert 0.93 * static < frequent[late].mean() <= bound
    assert recent[late].mean() < frequent[late].mean()
    assert recent[late].mean() > 1.2 * first
    assert frequent[late].mean() > 1.5 * first


def test_shifting_traffic_is_followed():
    """After a change to other experts the hits fall, and come back within a few half-lives."""
    generator = np.random.default_rng(3)
    parts = [_zipf_trace(700, 1.2, seed, generator.permutation(EXPERTS)) for seed in range(3)]
    hits, _ = _run(_policy(half_life=64.0), np.concatenate(parts))
    for number, part in enumerate(parts):
        begin = 700 * number
        assert hits[begin + 350 : begin + 700].mean() > 0.88 * _best_static(part[350:])
        if number:
            assert hits[begin : begin + 15].mean() < 0.75 * hits[begin - 300 : begin].mean()
    static = _best_static(np.concatenate(parts))
    assert hits.mean() > 1.1 * static


def test_uniform_traffic_is_left_alone():
    """No expert is better than another: once the slots are full, swaps would pay nothing."""
    trace = _zipf_trace(2000, 0.0, 4)
    policy = _policy()
    _run(policy, trace[:500])
    _, swaps = _run(policy, trace[500:])
    assert swaps < 1500 * 0.02
    eager = _policy(price=0.0)
    _run(eager, trace[:500])
    _, many = _run(eager, trace[500:])
    assert swaps < many / 2


def test_a_swap_must_pay():
    """Scores 10 and 3: a difference of 7, less two standard deviations of 2.5."""
    for price, count in ((1.9, 1), (2.0, 0)):
        policy = CachePolicy(4, [1], [1], price=price, half_life=1e9, bytes_per_step=1)
        uses = np.array([[3, 0, 0, 0]])
        policy.observe(uses, steps=3)
        [swap] = policy.choose()
        policy.finish(swap)
        assert swap == Swap(0, 0, 0, -1)
        policy.observe(np.array([[0, 10, 0, 0]]), steps=10)
        assert policy.choose() == [Swap(0, 1, 0, 0)] * count


@pytest.mark.parametrize(("limit", "steps_per_fetch"), [(100, 1), (250, 0.5), (40, 3), (1, 100)])
def test_bytes_of_a_step(limit, steps_per_fetch):
    policy = _policy(bytes_per_step=limit, price=0.5)
    uses = np.ones((1, EXPERTS), dtype=np.int64)
    begun = []
    for _ in range(300):
        policy.observe(uses)
        begun.append(len(policy.choose()))
        if sum(begun) == SLOTS:
            break
    assert max(begun) * 100 <= max(limit, 100)
    total = np.cumsum(begun) * 100
    assert (total <= limit * np.arange(1, len(begun) + 1)).all()
    assert sum(begun[: math.ceil(3 * steps_per_fetch)]) >= min(3, SLOTS)


def test_layers_compete_by_what_they_save_for_their_bytes():
    policy = CachePolicy(8, [2, 0, 1], [100, 1, 50], bytes_per_step=100, price=1.0)
    uses = np.zeros((3, 8), dtype=np.int64)
    uses[0, 5] = 6
    uses[1, 1] = 9  # has no slots
    uses[2, 3] = 4
    policy.observe(uses, steps=9)
    # 6 uses for 100 bytes, 4 for 50: the latter first. What is left is not enough for the other.
    policy._credit = 149
    assert policy.choose() == [Swap(2, 3, 0, -1)]
    policy.observe(np.zeros_like(uses))
    assert policy.choose() == [Swap(0, 5, 0, -1)]


def test_fixed_experts_and_those_on_the_way_are_no_candidates():
    policy = CachePolicy(4, [1], [1], fixed=[{0, 1}], price=1.0, bytes_per_step=10)
    policy.observe(np.array([[9, 9, 5, 0]]), steps=9)
    [swap] = policy.choose()
    assert swap == Swap(0, 2, 0, -1)
    policy.observe(np.array([[9, 9, 0, 9]]), steps=9)
    assert policy.choose() == []  # its slot is being written
    policy.give_up(swap)
    assert policy.choose() == [Swap(0, 3, 0, -1)]
    assert not policy.is_cached.any()


@pytest.mark.parametrize("kind", ["lfu", "lru"])
def test_the_same_uses_lead_to_the_same_swaps(kind):
    trace = _zipf_trace(200, 1.0, 6)
    runs = [_run(_policy(kind=kind, price=1), trace) for _ in range(2)]
    assert (runs[0][0] == runs[1][0]).all()
    assert runs[0][1] == runs[1][1] > 0


def test_wrong_options():
    for options, words in (({"kind": "fifo"}, "fifo"), ({"half_life": 0}, "half_life=0")):
        with pytest.raises(ValueError, match=words):
            _policy(**options)
