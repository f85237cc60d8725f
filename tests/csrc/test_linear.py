"""linear_forward against float64, and what must hold whatever the numbers are."""

import os
from collections.abc import Callable

import pytest
import torch

from moejet import _C
from moejet.ops.linear import PackedMatrices, linear, linear_ref
from moejet.testing.moe_layers import FORMATS

TOKENS = (0, 1, 2, 3, 7, 16, 17, 64, 129)


def _matrices(
    num: int, rows: int, cols: int, format: str, pool: _C.ThreadPool, isa: str
) -> PackedMatrices:
    matrices = PackedMatrices(num, rows, cols, format=format, pool=pool, isa=isa)
    generator = torch.Generator().manual_seed(rows + cols)
    for g in range(num):
        matrices.set(g, torch.randn(rows, cols, generator=generator) / cols**0.5)
    return matrices


def _limit(format: str, isa: str, tokens: int) -> float:
    if 0 < _C.min_tile_rows(format, isa) <= tokens:
        return 0.005
    return 1e-6 if format in ("bf16", "fp8", "fp32") else 0.02


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    norm = float(expected.double().norm())
    return float((got.double() - expected.double()).norm()) / norm if norm else 0.0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("num", "rows", "cols"), [(1, 96, 80), (1, 257, 200), (3, 48, 257), (5, 33, 31), (1, 1, 1)]
)
def test_matches_float64(
    isa: str, format: str, num: int, rows: int, cols: int, pool: _C.ThreadPool
) -> None:
    matrices = _matrices(num, rows, cols, format, pool, isa)
    generator = torch.Generator().manual_seed(1)
    for tokens in TOKENS:
        own = torch.randn(tokens, num, cols + 3, generator=generator)[..., :cols]
        shared = own[:, 0]
        for x in (own, shared):
            got = linear(x, matrices)
            expected = linear_ref(x, matrices)
            assert got.shape == expected.shape
            limit = _limit(format, isa, tokens) * (3 if cols < 32 else 1)
            assert _error(got, expected) < limit, f"{tokens=} {x.shape=}"


@pytest.mark.parametrize("format", FORMATS)
def test_bf16_inputs_and_outputs(isa: str, format: str, pool: _C.ThreadPool) -> None:
    matrices = _matrices(1, 64, 96, format, pool, isa)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = torch.empty(5, 64, dtype=torch.bfloat16)
    assert _C.linear_forward(matrices.weights, x, out, pool, isa) == isa
    assert _error(out, linear_ref(x, matrices)) < 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_threads_and_batch_do_not_change_bits(isa: str, format: str, pool: _C.ThreadPool) -> None:
    one = _C.ThreadPool([min(os.sched_getaffinity(0))])
    matrices = _matrices(2, 100, 130, format, pool, isa)
    x = torch.randn(70, 2, 130, generator=torch.Generator().manual_seed(3))
    together = linear(x, matrices)
    matrices.pool = one
    assert torch.equal(linear(x, matrices), together)
    if _C.min_tile_rows(format, isa) == 0:
        assert torch.equal(linear(x[5:6], matrices), together[5:6])


def test_nan_stays_in_its_row(isa: str, pool: _C.ThreadPool) -> None:
    for format in FORMATS:
        matrices = _matrices(1, 40, 64, format, pool, isa)
        x = torch.ones(20, 64)
        x[3, 5] = float("nan")
        bad = linear(x, matrices).isnan().any(dim=1)
        assert bad.tolist() == [t == 3 for t in range(20)]


def test_unset_matrices_are_zero_and_random_ones_plausible(pool: _C.ThreadPool) -> None:
    for format in FORMATS:
        weights = _C.LinearWeights(2, 64, 256, format)
        x, out = torch.randn(3, 256), torch.empty(3, 2, 64)
        _C.linear_forward(weights, x, out, pool)
        assert not out.any()
        weights.fill_random(1, pool)
        _C.linear_forward(weights, x, out, pool)
        assert 0.2 < float(out.std()) < 5.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w, p: _C.linear_forward(w, torch.ones(2, 9), torch.ones(2, 2, 8), p),
            "x has shape",
        ),
        (
            lambda w, p: _C.linear_forward(w, torch.ones(2, 3, 16), torch.ones(2, 2, 8), p),
            "x has shape",
        ),
        (
            lambda w, p: _C.linear_forward(w, torch.ones(2, 16), torch.ones(2, 8), p),
            "out has shape",
        ),
        (
            lambda w, p: _C.linear_forward(w, torch.ones(16, 2).T, torch.ones(2, 2, 8), p),
            "not adjacent",
        ),
        (lambda w, p: w.set(2, torch.ones(8, 16)), "matrix=2 must be between 0 and 1"),
        (lambda w, p: w.set(0, torch.ones(8, 15)), "w has shape"),
        (lambda w, p: w.set(0, torch.full((8, 16), float("nan"))), "NaN or infinity"),
        (lambda w, p: _C.LinearWeights(0, 8, 16, "int8"), "num_matrices=0"),
        (lambda w, p: _C.LinearWeights(1, 8, 16, "int3"), "format='int3'"),
    ],
)
def test_bad_arguments(
    call: Callable[[_C.LinearWeights, _C.ThreadPool], None], message: str, pool: _C.ThreadPool
) -> None:
    with pytest.raises(ValueError, match=message):
        call(_C.LinearWeights(2, 8, 16, "int8"), pool)
