"""moe_forward against float64, and what must hold whatever the numbers are."""

import os

import numpy as np
import pytest
import torch

from moejet import _C
from moejet.testing.moe_layers import (
    FORMATS,
    Layer,
    activations,
    check_bad_values,
    relative_error,
    routing,
    run,
    tolerance,
)

SIZES = [(96, 80), (200, 257), (257, 48), (31, 1), (640, 320)]
TOKENS = (1, 2, 3, 7, 16, 17, 64, 129)
_layers: dict[tuple[str, int, int], Layer] = {}


def layer_of(format: str, hidden: int, inter: int) -> Layer:
    key = (format, hidden, inter)
    if key not in _layers:
        _layers[key] = Layer.random(format, hidden=hidden, inter=inter)
    return _layers[key]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_matches_float64(
    isa: str, format: str, hidden: int, inter: int, pool: _C.ThreadPool
) -> None:
    layer = layer_of(format, hidden, inter)
    for tokens in TOKENS:
        x = activations(tokens, hidden, tokens)
        ids, mix = routing(tokens, 4, 2, tokens)
        error = relative_error(run(layer, x, ids, mix, pool, isa), layer.truth(x, ids, mix))
        # With one intermediate channel there is nothing to average over.
        limit = tolerance(format, isa, ids) * (3 if inter == 1 else 1)
        assert error < limit, f"{tokens=} {error=}"


@pytest.mark.parametrize("format", ["int4_g32", "int8"])
def test_integer_formats_are_bit_exact_across_vector_sets(
    isa: str, format: str, pool: _C.ThreadPool
) -> None:
    if isa.startswith("amx"):
        pytest.skip("tiles compute in bf16")
    layer = layer_of(format, 200, 257)
    x, (ids, mix) = activations(17, 200), routing(17, 4, 3)
    result = run(layer, x, ids, mix, pool, isa)
    assert torch.equal(result, run(layer, x, ids, mix, pool, "scalar"))


@pytest.mark.parametrize("format", FORMATS)
def test_result_does_not_depend_on_threads(isa: str, format: str, pool: _C.ThreadPool) -> None:
    one = _C.ThreadPool([min(os.sched_getaffinity(0))])
    layer = layer_of(format, 200, 257)
    for tokens in (1, 5, 64, 200):
        x, (ids, mix) = activations(tokens, 200), routing(tokens, 4, 2)
        assert torch.equal(run(layer, x, ids, mix, pool, isa), run(layer, x, ids, mix, one, isa))


@pytest.mark.parametrize("format", FORMATS)
def test_vector_results_do_not_depend_on_the_batch(
    isa: str, format: str, pool: _C.ThreadPool
) -> None:
    if _C.min_tile_rows(format, isa) > 0:
        pytest.skip("the number of rows decides between vectors and tiles")
    layer = layer_of(format, 96, 80)
    x, (ids, mix) = activations(23, 96), routing(23, 4, 2)
    together = run(layer, x, ids, mix, pool, isa)
    for t in range(23):
        alone = run(layer, x[t : t + 1], ids[t : t + 1], mix[t : t + 1], pool, isa)
        assert torch.equal(together[t], alone[0]), f"{t=}"


@pytest.mark.parametrize("format", FORMATS)
def test_skipped_duplicate_and_lonely_experts(isa: str, format: str, pool: _C.ThreadPool) -> None:
    layer = layer_of(format, 96, 80)
    x = activations(20, 96)
    ids, mix = routing(20, 4, 2)
    ids[3] = -1
    ids[4, 0] = -1
    ids[5] = 2  # twice the same expert
    result = run(layer, x, ids, mix, pool, isa)
    assert relative_error(result, layer.truth(x, ids, mix)) < 2e-2
    assert not result[3].any()
    for crowd in (torch.zeros_like(ids), torch.full_like(ids, 3)):  # the other experts get nothing
        result = run(layer, x, crowd, mix, pool, isa)
        assert relative_error(result, layer.truth(x, crowd, mix)) < 2e-2
    assert not run(layer, x, torch.full_like(ids, -1), mix, pool, isa).any()


def test_empty_inputs(isa: str, pool: _C.ThreadPool) -> None:
    layer = layer_of("int8", 96, 80)
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert run(layer, torch.zeros(0, 96), none, torch.zeros(0, 2), pool, isa).shape == (0, 96)
    no_experts = torch.zeros(3, 0, dtype=torch.int64)
    assert not run(layer, torch.ones(3, 96), no_experts, torch.zeros(3, 0), pool, isa).any()


def test_many_tokens_run_in_chunks(isa: str, pool: _C.ThreadPool) -> None:
    layer = Layer.random("int8", experts=3, hidden=40, inter=24)
    x, (ids, mix) = activations(2500, 40), routing(2500, 3, 2)
    error = relative_error(run(layer, x, ids, mix, pool, isa), layer.truth(x, ids, mix))
    assert error < 2e-2


@pytest.mark.parametrize("format", FORMATS)
def test_long_rows_run_in_chunks(isa: str, format: str, pool: _C.ThreadPool) -> None:
    # Tiles unpack 2048 inputs at a time and keep sums in memory in between.
    layer = Layer.random(format, experts=2, hidden=4200, inter=40)
    for tokens in (1, 50):
        x, (ids, mix) = activations(tokens, 4200), routing(tokens, 2, 1)
        error = relative_error(run(layer, x, ids, mix, pool, isa), layer.truth(x, ids, mix))
        assert error < tolerance(format, isa, ids)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_rows_apart_and_bf16(isa: str, format: str, tokens: int, pool: _C.ThreadPool) -> None:
    layer = layer_of(format, 200, 257)
    ids, mix = routing(tokens, 4, 2)
    wide = activations(tokens, 300).to(torch.bfloat16)
    x = wide[:, 50:250]
    expected = run(layer, x.float().contiguous(), ids, mix, pool, isa)
    assert torch.equal(run(layer, x, ids.int(), mix, pool, isa), expected)
    frame = torch.full((tokens, 232), 7.0, dtype=torch.bfloat16)
    _C.moe_forward(layer.weights, x, ids, mix, frame[:, 16:216], pool, isa)
    assert torch.equal(frame[:, 16:216], expected.to(torch.bfloat16))
    assert (frame[:, :16] == 7).all()
    assert (frame[:, 216:] == 7).all()


def test_output_may_be_the_input(isa: str, pool: _C.ThreadPool) -> None:
    layer = layer_of("int8", 96, 80)
    x, (ids, mix) = activations(33, 96), routing(33, 4, 2)
    expected = run(layer, x, ids, mix, pool, isa)
    _C.moe_forward(layer.weights, x, ids, mix, x, pool, isa)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_bad_values_stay_in_their_token(
    isa: str, format: str, poison: float, pool: _C.ThreadPool
) -> None:
    check_bad_values(layer_of(format, 96, 80), 96, 40, poison, pool, isa)


def test_tiny_and_huge_magnitudes(isa: str, pool: _C.ThreadPool) -> None:
    layer = layer_of("int4_g32", 96, 80)
    ids, mix = routing(12, 4, 2)
    for scale in (1e-12, 1e12):
        x = activations(12, 96) * scale
        assert run(layer, x, ids, mix, pool, isa).isfinite().all()
    assert not run(layer, torch.zeros(12, 96), ids, mix, pool, isa).any()
    assert not run(layer, torch.full((12, 96), 1e-40), ids, mix, pool, isa).any()


def test_unset_experts_contribute_zero(isa: str, pool: _C.ThreadPool) -> None:
    ids, mix = routing(20, 4, 2)
    for format in FORMATS:
        weights = _C.ExpertWeights(4, 96, 80, format)
        out = torch.full((20, 96), float("nan"))
        _C.moe_forward(weights, activations(20, 96), ids, mix, out, pool, isa)
        assert not out.any()


@pytest.mark.parametrize("format", FORMATS)
def test_random_fill(isa: str, format: str, pool: _C.ThreadPool) -> None:
    weights = _C.ExpertWeights(4, 200, 257, format)
    weights.fill_random(5, pool)
    layer = Layer(weights, [], [])
    for e in range(4):
        g, u, d = (torch.from_numpy(w).double() for w in weights.dequantize(e))
        assert 0.3 < float(g.std() * 200**0.5) < 3
        layer.dequantized.append((g, u, d))
    x, (ids, mix) = activations(20, 200), routing(20, 4, 2)
    # 257 channels leave padding, which the fill leaves random: it must not reach the result.
    error = relative_error(run(layer, x, ids, mix, pool, isa), layer.truth(x, ids, mix))
    assert error < 2e-2
    again = _C.ExpertWeights(4, 200, 257, format)
    again.fill_random(5)
    assert again.checksum() == weights.checksum(pool) != 0


def test_numpy_arrays_are_tensors(pool: _C.ThreadPool) -> None:
    layer = layer_of("int8", 96, 80)
    x, (ids, mix) = activations(3, 96), routing(3, 4, 2)
    out = np.zeros((3, 96), dtype=np.float32)
    frozen = x.numpy().copy()
    frozen.setflags(write=False)
    used = _C.moe_forward(layer.weights, frozen, ids.numpy(), mix.numpy(), out, pool)
    assert np.array_equal(out, run(layer, x, ids, mix, pool, used).numpy())


GOOD = {"x": (3, 96), "topk_ids": (3, 2), "topk_weights": (3, 2), "out": (3, 96)}


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("x", torch.zeros(3, 95), ValueError, r"x has shape \[3, 95\], expected \[T, D=96\]"),
        ("x", torch.zeros(96), ValueError, r"x has shape \[96\]"),
        ("x", torch.zeros(3, 96, dtype=torch.float16), TypeError, "x has dtype float16"),
        ("x", torch.zeros(96, 3).T, ValueError, "x has strides"),
        ("x", torch.zeros(1, 96).expand(3, 96), ValueError, "x has strides"),
        ("x", [[0.0]], TypeError, "x must be a tensor"),
        ("x", torch.zeros(3, 96, device="meta"), (ValueError, TypeError), "x"),
        ("topk_ids", torch.zeros(2, 2, dtype=torch.int64), ValueError, r"topk_ids.*T=3"),
        ("topk_ids", torch.zeros(3, 2), TypeError, "topk_ids has dtype float32"),
        ("topk_ids", torch.zeros(3, 4, dtype=torch.int64)[:, ::2], ValueError, "not contiguous"),
        ("topk_ids", torch.full((3, 2), 4), ValueError, r"topk_ids\[0, 0\]=4 must be -1"),
        ("topk_ids", torch.tensor([[0, 1], [2, -2], [0, 0]]), ValueError, r"topk_ids\[1, 1\]=-2"),
        ("topk_ids", torch.full((3, 2), 2**40), ValueError, "topk_ids"),
        ("topk_weights", torch.zeros(3, 1), ValueError, r"topk_weights.*K=2"),
        ("topk_weights", torch.zeros(3, 2).double(), TypeError, "topk_weights has dtype float64"),
        ("out", torch.zeros(2, 96), ValueError, r"out.*T=3"),
        ("out", torch.zeros(3, 96).half(), TypeError, "out has dtype float16"),
        ("out", torch.zeros(96).expand(3, 96), ValueError, "out has strides"),
        ("isa", "sse9", ValueError, "isa='sse9' is unknown"),
    ],
)
def test_bad_arguments_are_named(
    argument: str, value: object, error: type[Exception], message: str, pool: _C.ThreadPool
) -> None:
    layer = layer_of("int8", 96, 80)
    arguments: dict[str, object] = {
        name: torch.zeros(shape, dtype=torch.int64 if name == "topk_ids" else torch.float32)
        for name, shape in GOOD.items()
    }
    arguments[argument] = value
    untouched = torch.full((3, 96), 7.0)
    if argument != "out":
        arguments["out"] = untouched
    with pytest.raises(error, match=message):
        _C.moe_forward(layer.weights, pool=pool, **arguments)
    assert (untouched == 7).all()


def test_read_only_output_is_refused(pool: _C.ThreadPool) -> None:
    layer = layer_of("int8", 96, 80)
    out = np.zeros((3, 96), dtype=np.float32)
    out.setflags(write=False)
    ids, mix = routing(3, 4, 2)
    with pytest.raises(ValueError, match="out"):
        _C.moe_forward(layer.weights, torch.zeros(3, 96), ids, mix, out, pool)
