"""Argmax, the k largest, log-sum-exp and sampling of rows of logits, against torch in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.ops.sample_ref import sample_tokens_ref
from moejet.ops.top_logits import top_logits_ref
from moejet.request import SamplingParams

INF = float("inf")
SIZES = (1, 2, 15, 17, 100, 1023, 1025, 4096, 4097, 20011, 129280)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _first_max(row: Tensor) -> int:
    return int(torch.nonzero(row == row.max())[0])


@pytest.mark.parametrize("size", SIZES)
def test_argmax(isa: str, size: int) -> None:
    logits = _randn(3, size + 2)[:, 1:-1]
    assert _C.argmax(logits, isa=isa) == [_first_max(row) for row in logits]
    ties = (logits * 2).round()
    assert _C.argmax(ties, isa=isa) == [_first_max(row) for row in ties]
    masked = torch.full((1, size), -INF)
    assert _C.argmax(masked, isa=isa) == [0]
    masked[0, -1] = -3e38
    assert _C.argmax(masked, isa=isa) == [size - 1]
    for place in {0, size // 3, size - 1}:
        for bad in (float("nan"), -float("nan"), INF):
            broken = logits.clone()
            broken[1, place] = bad
            tokens = _C.argmax(broken, isa=isa)
            assert [t == _C.BAD_LOGITS for t in tokens] == [False, True, False]


def test_argmax_of_zeros_of_both_signs(isa: str) -> None:
    row = torch.full((1, 2000), -1.0)
    row[0, 1500] = -0.0
    row[0, 1700] = 0.0
    assert _C.argmax(row, isa=isa) == [1500]


def _top(logits: Tensor, k: int, isa: str) -> tuple[Tensor, Tensor, list[float]]:
    ids = torch.full((logits.shape[0], k + 1), -7, dtype=torch.int32)
    values = torch.full(ids.shape, -7.0)
    log_sums = _C.top_logits(logits, ids[:, :k], values[:, :k], isa=isa)
    assert bool((ids[:, k] == -7).all())
    return values[:, :k], ids[:, :k], log_sums


def _shapes_of(size: int) -> dict[str, Tensor]:
    row = _randn(size)
    few = row.clone()
    few[torch.randperm(size, generator=torch.Generator().manual_seed(size))[size // 9 :]] = -INF
    zeros = torch.where(row > 0, 0.0, -0.0)
    return {
        "random": row,
        "ascending": row.sort().values,
        "descending": row.sort(descending=True).values,
        "all equal": torch.full((size,), -3.25),
        "few values": (row * 2).round(),
        "both zeros": zeros,
        "mostly masked": few if size > 8 else row,
        "huge": row * 5e37,
        "subnormal": row * 1e-40,
    }


@pytest.mark.parametrize("size", SIZES)
def test_top_logits(isa: str, size: int) -> None:
    shapes = _shapes_of(size)
    logits = torch.stack(list(shapes.values()))
    expected_values, expected_ids, expected_sums = top_logits_ref(logits, min(size, 1024))
    for k in sorted({0, 1, 2, 20, 63, 1024} & set(range(size + 1)) | {min(size, 1024)}):
        values, ids, log_sums = _top(logits, k, isa)
        for i, name in enumerate(shapes):
            assert torch.equal(ids[i], expected_ids[i, :k]), f"{name} {k=}"
            assert torch.equal(values[i], expected_values[i, :k]), f"{name} {k=}"
            error = abs(log_sums[i] - expected_sums[i])
            assert error <= 2e-7 + 1e-7 * abs(expected_sums[i]), f"{name} {error=}"


def test_top_logits_of_broken_rows_stay_in_range(isa: str) -> None:
    for size, bad in ((100, 50), (20011, 15000), (20011, 3)):
        row = _randn(1, size)
        row[0, ::7] = float("nan")
        row[0, bad:] = -float("nan")
        row.view(torch.int32)[0, -1] = -1
        _, ids, _ = _top(row, 64, isa)
        assert len(set(ids[0].tolist())) == 64
        assert 0 <= int(ids.min()) <= int(ids.max()) < size


# No top_p at which equal probabilities would end exactly: rounding would decide.
RULES = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=0.6, top_p=0.9513),
    SamplingParams(temperature=0.3, top_p=0.5137, min_p=0.02),
    SamplingParams(temperature=1.3, top_k=50),
    SamplingParams(top_k=1),
    SamplingParams(temperature=0.8, top_k=1024, top_p=0.9017),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.8019, min_p=0.1),
    SamplingParams(temperature=0.5, min_p=0.05),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=1.0),
]


def _sample(logits: Tensor, params: list[SamplingParams], u: list[float], isa: str) -> list[int]:
    return _C.sample(
        logits,
        [p.temperature for p in params],
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        u,
        isa=isa,
    )


@pytest.mark.parametrize("size", [1, 3, 70, 1500, 30001])
def test_samples_match_float64(isa: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = len(RULES)
    for scale in (0.0, 1.0, 4.0):
        logits = torch.randn(rows, size, generator=generator) * scale
        logits[:, 1::5] = -INF
        for _ in range(4):
            u = torch.rand(rows, generator=generator, dtype=torch.float64).tolist()
            got = _sample(logits, RULES, u, isa)
            expected = sample_tokens_ref(logits, RULES, u)
            for i, token in enumerate(got):
                if token != _C.UNDECIDED:
                    assert token == expected[i], f"{scale=} {RULES[i]}"
                else:
                    assert size > _C.MAX_TOP_LOGITS
                    assert RULES[i].top_k == 0


def test_draws_follow_the_distribution_over_the_whole_row(isa: str) -> None:
    """An even grid of u picks every token in proportion, the ends of the row included."""
    logits = torch.full((1, 5000), -INF)
    places = [0, 1, 2047, 2048, 2500, 4095, 4999]
    weights = torch.tensor([1.0, 4.0, 2.0, 3.0, 0.5, 5.0, 4.5])
    logits[0, places] = torch.log(weights)
    counts = dict.fromkeys(places, 0)
    steps = 2000
    rows = logits.expand(steps, -1).contiguous()
    u = [(i + 0.5) / steps for i in range(steps)]
    tokens = _sample(rows, [SamplingParams()] * steps, u, isa)
    assert tokens == sorted(tokens)
    for token in tokens:
        counts[token] += 1
    for place, weight in zip(places, weights.tolist(), strict=True):
        assert counts[place] == pytest.approx(steps * weight / 20, abs=1.01)
    assert _sample(logits, [SamplingParams()], [0.0], isa) == [0]
    assert _sample(logits, [SamplingParams()], [1 - 2**-53], isa) == [4999]


def test_extreme_temperatures(isa: str) -> None:
    logits = torch.tensor([[1.0, 3.0, -INF, 2.0, -50.0]])
    for cut in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        for temperature in (5e-324, 1e-307, 1e-5):
            params = [SamplingParams(temperature=temperature, **cut)]  # type: ignore[arg-type]
            for u in (0.0, 0.5, 1 - 2**-53):
                assert _sample(logits, params, [u], isa) == [1]
    for temperature in (1e30, 1e308):
        tokens = [
            _C.sample(logits, [temperature], [0], [1.0], [0.0], [u / 8], isa=isa)[0]
            for u in range(8)
        ]
        assert tokens == [0, 0, 1, 1, 3, 3, 4, 4]


def test_bad_rows(isa: str) -> None:
    logits = torch.zeros(4, 40)
    logits[1, 39] = float("nan")
    logits[2] = -INF
    logits[3, 0] = INF
    for params in RULES:
        tokens = _sample(logits, [params] * 4, [0.5] * 4, isa)
        assert tokens[0] >= 0
        assert tokens[1:] == [_C.BAD_LOGITS] * 3


def test_threads_and_instruction_sets_do_not_change_samples(isa: str, pool: _C.ThreadPool) -> None:
    logits = _randn(len(RULES), 30001) * 3
    u = [(0.37 * i) % 1.0 for i in range(len(RULES))]
    expected = _sample(logits, RULES, u, "scalar")
    assert _sample(logits, RULES, u, isa) == expected
    columns = [
        [getattr(p, field) for p in RULES] for field in ("temperature", "top_k", "top_p", "min_p")
    ]
    assert _C.sample(logits, *columns, u, pool, isa) == expected
    assert _C.argmax(logits, pool, isa) == _C.argmax(logits, isa="scalar")
    sums = _top(logits, 5, "scalar")[2]
    ids, values = torch.empty(len(RULES), 5, dtype=torch.int32), torch.empty(len(RULES), 5)
    assert _C.top_logits(logits, ids, values, pool, isa) == sums
    assert all(math.isfinite(s) for s in sums)
    assert _C.argmax(torch.empty(0, 7), isa=isa) == []


_X = torch.zeros(1, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.sample(_X, [-1.0], [0], [1.0], [0.0], [0.5]), ValueError, "temperature"),
        (lambda: _C.sample(_X, [math.nan], [0], [1.0], [0.0], [0.5]), ValueError, "temperature"),
        (lambda: _C.sample(_X, [1.0], [-1], [1.0], [0.0], [0.5]), ValueError, "top_k"),
        (lambda: _C.sample(_X, [1.0], [0], [0.0], [0.0], [0.5]), ValueError, "top_p"),
        (lambda: _C.sample(_X, [1.0], [0], [1.0], [1.5], [0.5]), ValueError, "min_p"),
        (lambda: _C.sample(_X, [1.0], [0], [1.0], [0.0], [1.0]), ValueError, r"u\[0\]=1"),
        (lambda: _C.sample(_X, [1.0], [0], [1.0], [0.0], []), ValueError, "one entry for each"),
        (lambda: _C.argmax(torch.zeros(2, 0)), ValueError, r"logits.shape\[1\]=0"),
        (lambda: _C.argmax(_X.bfloat16()), TypeError, "logits has dtype"),
        (lambda: _C.argmax(_X[0]), ValueError, "logits has shape"),
        (
            lambda: _C.top_logits(_X, torch.zeros(1, 9, dtype=torch.int32), torch.zeros(1, 9)),
            ValueError,
            r"ids.shape\[1\]=9 must be at most 8",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
