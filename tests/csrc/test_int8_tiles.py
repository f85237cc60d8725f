"""arithmetic="int8": the integer formats on int8 tiles, against float64 and against exact integers.

Measured on Gaussian inputs and weights: a layer of experts is off by 1.3 to 1.6 % in int8 and by 1.7
to 2.0 % in int4_g32, where requantising the weights adds 0.6 % to each of three matrices; a single
matrix by 0.6 % and 0.9 %. bf16 tiles: 0.4 % and 0.2 %.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.ops.linear import PackedMatrices, linear, linear_ref
from moejet.testing.moe_layers import (
    Layer,
    activations,
    check_bad_values,
    relative_error,
    routing,
    run,
    tolerance,
)

FORMATS = ("int4_g32", "int8")
SIZES = [(96, 80), (200, 257), (257, 48), (31, 1), (640, 320), (1300, 160)]
TOKENS = (1, 5, 6, 7, 16, 17, 33, 64, 129)
LINEAR_LIMIT = {"int8": 0.009, "int4_g32": 0.012}
_layers: dict[tuple[str, int, int], Layer] = {}


@pytest.fixture(params=["amx", "amx_emulated"])
def tiles(request: pytest.FixtureRequest, usable_isa: Callable[[str], str]) -> str:
    return usable_isa(request.param)


def layer_of(format: str, hidden: int, inter: int) -> Layer:
    key = (format, hidden, inter)
    if key not in _layers:
        _layers[key] = Layer.random(format, hidden=hidden, inter=inter, arithmetic="int8")
    return _layers[key]


def matrices_of(
    num: int, rows: int, cols: int, format: str, pool: _C.ThreadPool, isa: str
) -> PackedMatrices:
    options = {"format": format, "pool": pool, "isa": isa, "arithmetic": "int8"}
    matrices = PackedMatrices(num, rows, cols, **options)
    generator = torch.Generator().manual_seed(rows + cols)
    for g in range(num):
        matrices.set(g, torch.randn(rows, cols, generator=generator) / cols**0.5)
    return matrices


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_experts_match_float64(
    tiles: str, format: str, hidden: int, inter: int, pool: _C.ThreadPool
) -> None:
    layer = layer_of(format, hidden, inter)
    for tokens in TOKENS:
        x, (ids, mix) = activations(tokens, hidden, tokens), routing(tokens, 4, 2, tokens)
        error = relative_error(run(layer, x, ids, mix, pool, tiles), layer.truth(x, ids, mix))
        # With one intermediate channel there is nothing to average over.
        limit = tolerance(format, tiles, ids, "int8") * (3 if inter == 1 else 1)
        assert error < limit, f"{tokens=} {error=}"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("num", "rows", "cols"), [(1, 96, 80), (1, 257, 200), (3, 48, 257), (5, 33, 31), (2, 40, 1100)]
)
def test_matrices_match_float64(
    tiles: str, format: str, num: int, rows: int, cols: int, pool: _C.ThreadPool
) -> None:
    matrices = matrices_of(num, rows, cols, format, pool, tiles)
    generator = torch.Generator().manual_seed(1)
    for tokens in (6, 7, 16, 17, 64, 129):
        own = torch.randn(tokens, num, cols + 3, generator=generator)[..., :cols]
        for x in (own, own[:, 0]):
            error = relative_error(linear(x, matrices), linear_ref(x, matrices).double())
            assert error < LINEAR_LIMIT[format], f"{tokens=} {error=}"


def int4_as_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Requantised weights of one group of 128 inputs in float64: codes and scales [rows, up to 128]."""
    largest = scales.abs().amax(1, keepdim=True).double()
    factor = (scales.double() * 32512 / largest).round()
    return ((codes.double() * 16 * factor + 16384) / 32768).floor() * largest * 8 / 127


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cols", [64, 128, 320, 1216])
def test_integers_are_exact(tiles: str, format: str, cols: int, pool: _C.ThreadPool) -> None:
    """Operands that quantise without error: nothing but fp32 rounding is left."""
    rows, tokens = 70, 49
    generator = torch.Generator().manual_seed(cols)
    matrices = matrices_of(1, rows, cols, format, pool, tiles)
    x = torch.randint(-127, 128, (tokens, cols), generator=generator).float()
    if format == "int8":
        weights = torch.randint(-127, 128, (rows, cols), generator=generator).float()
        weights[:, ::64], x[:, ::64] = 127.0, -127.0
        effective = weights.double()
    else:
        codes = torch.randint(-8, 8, (rows, cols), generator=generator).float()
        codes[:, ::32], x[:, ::64] = -8.0, -127.0
        signs = torch.tensor([-1.0, 1.0])[torch.randint(0, 2, (rows, cols // 32))]
        powers = 2.0 ** torch.randint(-3, 1, (rows, cols // 32), generator=generator)
        scales = (signs * powers).repeat_interleave(32, 1)
        weights = codes * scales
        groups = zip(codes.split(128, 1), scales.split(128, 1), strict=True)
        effective = torch.cat([int4_as_int8(*group) for group in groups], 1)
    matrices.set(0, weights)
    assert torch.equal(matrices.dequantize(0), weights)
    # Scales that differ by row and by group of 128 inputs.
    spread = 2.0 ** torch.randint(-9, 9, (tokens, -(-cols // 128)), generator=generator)
    x = x * spread.repeat_interleave(128, 1)[:, :cols]
    assert relative_error(linear(x, matrices), x.double() @ effective.T) < 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_threads_nodes_and_batches_do_not_change_bits(
    tiles: str, format: str, pool: _C.ThreadPool
) -> None:
    one = _C.ThreadPool([min(os.sched_getaffinity(0))])
    whole = layer_of(format, 200, 257)
    divided = _C.ExpertWeights(4, 200, 257, format, [-1, -1, -1], "int8")
    for e, (gate, up, down) in enumerate(whole.source):
        divided.set_expert(e, gate, up, down)
    three = _C.ThreadPool([0, 1], False, [0, 2], [-1, -1, -1])
    for tokens in (1, 5, 64, 300):
        x, (ids, mix) = activations(tokens, 200), routing(tokens, 4, 2)
        expected = run(whole, x, ids, mix, pool, tiles)
        assert torch.equal(run(whole, x, ids, mix, one, tiles), expected)
        on_nodes = Layer(divided, [], [])
        assert torch.equal(run(on_nodes, x, ids, mix, three, tiles), expected)
    matrices = matrices_of(2, 100, 130, format, pool, tiles)
    x = torch.randn(270, 2, 130, generator=torch.Generator().manual_seed(3))
    together = linear(x, matrices)
    assert torch.equal(linear(x[5:40], matrices), together[5:40])
    matrices.pool = one
    assert torch.equal(linear(x, matrices), together)


@pytest.mark.parametrize("format", FORMATS)
def test_arithmetic_changes_nothing_else(format: str, pool: _C.ThreadPool) -> None:
    """The packed bytes are the same, and so are results without tiles or with float formats."""
    bf16, int8 = (
        Layer.random(format, hidden=200, inter=80, arithmetic=a) for a in ("bf16", "int8")
    )
    assert (bf16.weights.arithmetic, int8.weights.arithmetic) == ("bf16", "int8")
    assert bf16.weights.checksum() == int8.weights.checksum()
    assert _C.min_tile_rows(format, "scalar", "int8") == 0
    x, (ids, mix) = activations(40, 200), routing(40, 4, 2)
    vector_sets = ("scalar", "avx2", "avx512", "avx512_bf16")
    isas = [n for n in vector_sets if _C.cpu_info()["isas"][n]["usable"]]
    for isa in isas:
        assert torch.equal(run(bf16, x, ids, mix, pool, isa), run(int8, x, ids, mix, pool, isa))


def test_float_formats_ignore_it(tiles: str, pool: _C.ThreadPool) -> None:
    x, (ids, mix) = activations(40, 96), routing(40, 4, 2)
    for format in ("fp8", "bf16", "fp32"):
        answers = [
            run(Layer.random(format, hidden=96, inter=80, arithmetic=a), x, ids, mix, pool, tiles)
            for a in ("bf16", "int8")
        ]
        assert torch.equal(*answers)


@pytest.mark.parametrize("format", FORMATS)
def test_skipped_and_crowded_experts(tiles: str, format: str, pool: _C.ThreadPool) -> None:
    layer = layer_of(format, 96, 80)
    x, (ids, mix) = activations(40, 96), routing(40, 4, 2)
    ids[3], ids[4, 0], ids[5] = -1, -1, 2
    result = run(layer, x, ids, mix, pool, tiles)
    assert relative_error(result, layer.truth(x, ids, mix)) < tolerance(format, tiles, ids, "int8")
    assert not result[3].any()
    for crowd in (torch.zeros_like(ids), torch.full_like(ids, 3)):  # the other experts get nothing
        error = relative_error(run(layer, x, crowd, mix, pool, tiles), layer.truth(x, crowd, mix))
        assert error < tolerance(format, tiles, crowd, "int8")
    assert not run(layer, x, torch.full_like(ids, -1), mix, pool, tiles).any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_bad_values_stay_in_their_token(
    tiles: str, format: str, poison: float, pool: _C.ThreadPool
) -> None:
    check_bad_values(layer_of(format, 200, 257), 200, 60, poison, pool, tiles)
    x = activations(60, 200)
    x[[11, 29], [33, 199]] = poison
    matrices = matrices_of(1, 40, 200, format, pool, tiles)
    bad = ~linear(x, matrices).isfinite().all(dim=1)
    assert bad.tolist() == [abs(poison) != 3e38 and t in (11, 29) for t in range(60)]


@pytest.mark.parametrize("format", FORMATS)
def test_zero_rows_and_outliers(tiles: str, format: str, pool: _C.ThreadPool) -> None:
    matrices = matrices_of(1, 64, 256, format, pool, tiles)
    x = activations(20, 256)
    x[3] = 0.0
    x[4] = 1e-35
    x[5, 7] = 1e6
    x[6] *= 1e30
    x[7] *= 1e-25
    result, truth = linear(x, matrices), linear_ref(x, matrices)
    assert not result[3:5].any()
    for t in (2, 5, 6, 7):
        assert relative_error(result[t], truth[t].double()) < 0.015, f"{t=}"
    layer = layer_of(format, 96, 80)
    ids, mix = routing(30, 4, 2)
    assert not run(layer, torch.zeros(30, 96), ids, mix, pool, tiles).any()
    assert run(layer, activations(30, 96) * 1e12, ids, mix, pool, tiles).isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_unset_and_random_weights(tiles: str, format: str, pool: _C.ThreadPool) -> None:
    x, (ids, mix) = activations(30, 200), routing(30, 4, 2)
    weights = _C.ExpertWeights(4, 200, 257, format, arithmetic="int8")
    layer = Layer(weights, [], [])
    assert not run(layer, x, ids, mix, pool, tiles).any()
    weights.fill_random(5, pool)
    for e in range(4):
        g, u, d = (torch.from_numpy(w).double() for w in weights.dequantize(e))
        layer.dequantized.append((g, u, d))
    # 257 channels leave padding, which the fill leaves random: it must not reach the result.
    error = relative_error(run(layer, x, ids, mix, pool, tiles), layer.truth(x, ids, mix))
    assert error < tolerance(format, tiles, ids, "int8")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_rows_apart_bf16_and_in_place(
    tiles: str, format: str, tokens: int, pool: _C.ThreadPool
) -> None:
    layer = layer_of(format, 200, 257)
    ids, mix = routing(tokens, 4, 2)
    x = activations(tokens, 300).to(torch.bfloat16)[:, 50:250]
    expected = run(layer, x.float().contiguous(), ids, mix, pool, tiles)
    assert torch.equal(run(layer, x, ids.int(), mix, pool, tiles), expected)
    frame = torch.full((tokens, 232), 7.0, dtype=torch.bfloat16)
    _C.moe_forward(layer.weights, x, ids, mix, frame[:, 16:216], pool, tiles)
    assert torch.equal(frame[:, 16:216], expected.to(torch.bfloat16))
    assert (frame[:, :16] == 7).all()
    assert (frame[:, 216:] == 7).all()
    same = x.float().contiguous()
    _C.moe_forward(layer.weights, same, ids, mix, same, pool, tiles)
    assert torch.equal(same, expected)


def test_empty_calls(tiles: str, pool: _C.ThreadPool) -> None:
    layer = layer_of("int4_g32", 96, 80)
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert run(layer, torch.zeros(0, 96), none, torch.zeros(0, 2), pool, tiles).shape == (0, 96)
    matrices = matrices_of(1, 40, 200, "int4_g32", pool, tiles)
    assert linear(torch.zeros(0, 200), matrices).shape == (0, 40)


def test_many_tokens_run_in_chunks(tiles: str, pool: _C.ThreadPool) -> None:
    layer = Layer.random("int8", experts=3, hidden=40, inter=24, arithmetic="int8")
    x, (ids, mix) = activations(2500, 40), routing(2500, 3, 2)
    error = relative_error(run(layer, x, ids, mix, pool, tiles), layer.truth(x, ids, mix))
    assert error < tolerance("int8", tiles, ids, "int8")


def test_unknown_arithmetic_is_refused() -> None:
    for make in (
        lambda: _C.ExpertWeights(4, 96, 80, "int8", arithmetic="int4"),
        lambda: _C.LinearWeights(1, 96, 80, "int8", arithmetic="int4"),
        lambda: _C.min_tile_rows("int8", "scalar", "int4"),
    ):
        with pytest.raises(ValueError, match="arithmetic='int4' is unknown: use one of bf16, int8"):
            make()
