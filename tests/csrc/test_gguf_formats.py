"""GGUF's formats: values as the gguf package has them, layers and matrices against float64, refusals."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from moejet import _C
from moejet.config import EXPERT_FORMATS, FORMAT_BITS, GGUF_FORMATS
from moejet.experts.cpu_experts import CpuExperts
from moejet.ops.linear import PackedMatrices, linear
from moejet.testing.moe_layers import (
    Layer,
    activations,
    check_bad_values,
    relative_error,
    routing,
    run,
    tolerance,
)

# Weights and bytes of a block, and where its fp16 values lie.
BLOCKS = {
    "q4_0": (32, 18, (0,)),
    "q8_0": (32, 34, (0,)),
    "q4_k": (256, 144, (0, 2)),
    "q5_k": (256, 176, (0, 2)),
    "q6_k": (256, 210, (208,)),
}
# What d is for weights of size one, and dmin.
SIZES = {"q4_0": (4.6, 0), "q8_0": (74, 0), "q4_k": (258, 34), "q5_k": (527, 34), "q6_k": (1366, 0)}
# fp16 bits: the largest, the smallest, subnormal numbers, and zeros of both signs.
EXTREMES = (0x7BFF, 0xFBFF, 0x0001, 0x8001, 0x03FF, 0x0400, 0x8000, 0x0000)
SHAPES = ((96, 256), (33, 768), (1, 256), (47, 1280))
MIXES = (
    ("q4_k", "q6_k"),
    ("q4_k", "q8_0"),
    ("q5_k", "q4_0"),
    ("q6_k", "int8"),
    ("int4_g32", "q5_k"),
)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 33, 70)


def shape_of(format: str, rows: int, cols: int) -> tuple[int, int]:
    """Shapes for formats with short blocks end in a half block of ours."""
    return (rows, cols + 32) if format in ("q4_0", "q8_0") else (rows, cols)


def blocks(format: str, rows: int, cols: int, seed: int = 0, *, extreme: bool = False) -> Tensor:
    """uint8 [rows, bytes of a row]: random bits, scales for weights of about 1 / sqrt(cols)."""
    rng = np.random.default_rng(1000 * rows + cols + seed)
    inputs, size, places = BLOCKS[format]
    raw = rng.integers(0, 256, (rows, cols // inputs, size), dtype=np.uint8)
    for place, per_unit in zip(places, SIZES[format], strict=False):
        spread = rng.uniform(0.75, 1.25, raw.shape[:2]) * rng.choice([-1, 1], raw.shape[:2])
        halves = (spread * cols**-0.5 / per_unit).astype(np.float16)
        if extreme:
            halves = rng.choice(np.array(EXTREMES, np.uint16), raw.shape[:2]).view(np.float16)
        raw[:, :, place : place + 2] = halves[:, :, None].view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


def values(raw: Tensor, format: str) -> Tensor:
    """fp32 [rows, cols], as the gguf package computes them."""
    result = quants.dequantize(raw.numpy(), GGMLQuantizationType[format.upper()])
    return torch.from_numpy(result)


def bits(w: Tensor) -> Tensor:
    return w.contiguous().view(torch.int32)


def bf16_away(w: Tensor) -> Tensor:
    """Rounded to bf16, ties away from zero: what tiles multiply."""
    return ((bits(w) + 0x8000) & -0x10000).view(torch.float32)


def matrices_of(
    raws: list[Tensor], format: str, cols: int, pool: _C.ThreadPool, isa: str
) -> PackedMatrices:
    packed = PackedMatrices(len(raws), raws[0].shape[0], cols, format=format, pool=pool, isa=isa)
    for g, raw in enumerate(raws):
        packed.set(g, raw, source_format=format)
    return packed


def exact_activations(tokens: int, cols: int, seed: int) -> Tensor:
    """Multiples of a power of two whose int8 form is exact, and so is bf16; one power per group."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (tokens, cols // 32, 32), generator=generator)
    codes[:, :, 7] = 127
    scale = 2.0 ** torch.randint(-9, 3, (tokens, cols // 32, 1), generator=generator)
    return (codes * scale).reshape(tokens, cols)


@pytest.mark.parametrize("format", GGUF_FORMATS)
@pytest.mark.parametrize("extreme", [False, True])
def test_values_are_those_of_the_gguf_package(
    isa: str, format: str, extreme: bool, pool: _C.ThreadPool
) -> None:
    for rows, cols in (shape_of(format, *shape) for shape in SHAPES):
        raw = blocks(format, rows, cols, extreme=extreme)
        packed = matrices_of([raw], format, cols, pool, isa)
        assert torch.equal(bits(packed.dequantize(0)), bits(values(raw, format))), f"{rows=}"


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_rows_apart_and_numpy(isa: str, format: str) -> None:
    raw = blocks(format, 45, 512)
    wide = torch.zeros(45, raw.shape[1] + 37, dtype=torch.uint8)
    wide[:, 5 : 5 + raw.shape[1]] = raw
    weights = _C.LinearWeights(1, 45, 512, format)
    for w in (wide[:, 5 : 5 + raw.shape[1]], raw.numpy()):
        weights.set(0, w, None, isa, source_format=format)
        assert torch.equal(torch.from_numpy(weights.dequantize(0)), values(raw, format))


@pytest.mark.parametrize("format", GGUF_FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_products_are_exact(
    isa: str, format: str, rows: int, cols: int, pool: _C.ThreadPool
) -> None:
    # Activations that int8 and bf16 hold exactly leave the rounding of fp32 sums only.
    rows, cols = shape_of(format, rows, cols)
    raw = blocks(format, rows, cols)
    packed = matrices_of([raw], format, cols, pool, isa)
    w = values(raw, format)
    tile_rows = _C.min_tile_rows(format, isa)
    for tokens in TOKENS:
        x = exact_activations(tokens, cols, tokens)
        tiled = 0 < tile_rows <= tokens
        expected = x.double() @ (bf16_away(w) if tiled else w).double().T
        error = relative_error(linear(x, packed), expected)
        assert error < 2e-6, f"{tokens=} {error=}"


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_every_place_of_a_block(isa: str, format: str, pool: _C.ThreadPool) -> None:
    # One input at a time: nothing can hide in a sum.
    rows, cols = shape_of(format, 32, 256)
    raw = blocks(format, rows, cols, 3)
    packed = matrices_of([raw], format, cols, pool, isa)
    w = values(raw, format)
    tile_rows = _C.min_tile_rows(format, isa)
    for tokens in (4, 32):
        expected = (bf16_away(w) if 0 < tile_rows <= tokens else w).T
        for first in range(0, cols, tokens):
            x = torch.eye(cols)[first : first + tokens] * 127
            result = linear(x, packed) / 127
            part = expected[first : first + tokens]
            assert (result - part).abs().max() < 1e-5 * part.abs().max(), f"{first=}"


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_extreme_scales(isa: str, format: str, pool: _C.ThreadPool) -> None:
    rows, cols = shape_of(format, 64, 512)
    raw = blocks(format, rows, cols, 1, extreme=True)
    packed = matrices_of([raw], format, cols, pool, isa)
    for tokens in (1, 20):
        x = exact_activations(tokens, cols, 5)
        expected = x.double() @ values(raw, format).double().T
        result = linear(x, packed)
        assert result.isfinite().all()
        # Rows differ by many orders of magnitude: each is judged by what was added up.
        size = x.double().abs() @ values(raw, format).double().abs().T + 1e-30
        # Subtracting the minimum at the end costs digits of codes times scale.
        limit = 5e-3 if 0 < _C.min_tile_rows(format, isa) <= tokens else 1e-4
        assert ((result - expected).abs() / size).median() < limit
        assert ((result - expected).abs() / size).max() < 40 * limit


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_matrices_against_float64(isa: str, format: str, pool: _C.ThreadPool) -> None:
    rows, cols = shape_of(format, 47, 512)
    raws = [blocks(format, rows, cols, g) for g in range(3)]
    packed = matrices_of(raws, format, cols, pool, isa)
    w = torch.stack([values(raw, format) for raw in raws]).double()
    for tokens in (0, 1, 5, 19, 70):
        x = torch.randn(tokens, 3, cols + 3, generator=torch.Generator().manual_seed(1))[..., :cols]
        expected = torch.einsum("tgc,grc->tgr", x.double(), w)
        result = linear(x, packed)
        assert result.shape == expected.shape
        if tokens > 0:
            limit = 5e-3 if 0 < _C.min_tile_rows(format, isa) <= tokens else 2e-2
            assert relative_error(result, expected) < limit, f"{tokens=}"


def random_layer(format: str, down: str, hidden: int, inter: int, experts: int = 4) -> Layer:
    """Random packed weights; sizes need not be whole blocks."""
    weights = _C.ExpertWeights(experts, hidden, inter, format, down_format=down)
    weights.fill_random(hidden + inter)
    layer = Layer(weights, [], [])
    for e in range(experts):
        gate, up, down_w = (torch.from_numpy(w).double() for w in weights.dequantize(e))
        layer.dequantized.append((gate, up, down_w))
    return layer


def check_layer(
    layer: Layer, format: str, isa: str, pool: _C.ThreadPool, *, slack: float = 1.0
) -> None:
    for tokens in (1, 2, 7, 16, 33, 70):
        x = activations(tokens, layer.weights.hidden_size, tokens)
        ids, mix = routing(tokens, layer.weights.num_experts, 2, tokens)
        error = relative_error(run(layer, x, ids, mix, pool, isa), layer.truth(x, ids, mix))
        assert error < slack * tolerance(format, isa, ids), f"{tokens=} {error=}"


@pytest.mark.parametrize("format", GGUF_FORMATS)
@pytest.mark.parametrize(("hidden", "inter"), [(256, 512), (96, 80), (257, 300), (640, 320)])
def test_layers(isa: str, format: str, hidden: int, inter: int, pool: _C.ThreadPool) -> None:
    layer = random_layer(format, format, hidden, inter)
    assert 0.5 < float(layer.dequantized[0][0].std() * hidden**0.5) < 2
    check_layer(layer, format, isa, pool)


@pytest.mark.parametrize(("format", "down"), MIXES)
def test_layers_of_two_formats(isa: str, format: str, down: str, pool: _C.ThreadPool) -> None:
    for hidden, inter in ((320, 544), (96, 80)):
        layer = random_layer(format, down, hidden, inter)
        assert (layer.weights.format, layer.weights.down_format) == (format, down)
        check_layer(layer, format, isa, pool)


@pytest.mark.parametrize(("format", "down"), [("fp8", "bf16"), ("bf16", "fp32"), ("fp32", "fp8")])
def test_layers_of_two_float_formats(isa: str, format: str, down: str, pool: _C.ThreadPool) -> None:
    layer = random_layer(format, down, 200, 257)
    for tokens in (1, 4, 5, 6, 40):
        x, (ids, mix) = activations(tokens, 200), routing(tokens, 4, 2)
        error = relative_error(run(layer, x, ids, mix, pool, isa), layer.truth(x, ids, mix))
        rows = [_C.min_tile_rows(f, isa) for f in (format, down)]
        assert error < (5e-3 if min(rows) > 0 else 3e-6), f"{tokens=} {error=}"


@pytest.mark.parametrize("down", ["q6_k", "int8"])
def test_int8_arithmetic_needs_both_formats(isa: str, down: str, pool: _C.ThreadPool) -> None:
    layers = []
    for arithmetic in ("bf16", "int8"):
        weights = _C.ExpertWeights(3, 200, 257, "int4_g32", arithmetic=arithmetic, down_format=down)
        weights.fill_random(1, pool)
        layers.append(Layer(weights, [], []))
    for e in range(3):
        gate, up, down_w = (torch.from_numpy(w).double() for w in layers[0].weights.dequantize(e))
        layers[0].dequantized.append((gate, up, down_w))
    x, (ids, mix) = activations(70, 200), routing(70, 3, 2)
    in_bf16, in_int8 = (run(layer, x, ids, mix, pool, isa) for layer in layers)
    has_tiles = _C.min_tile_rows("int8", isa) > 0
    assert torch.equal(in_bf16, in_int8) == (down == "q6_k" or not has_tiles)
    assert relative_error(in_int8, layers[0].truth(x, ids, mix)) < 3e-2


def test_layer_of_a_file(isa: str, pool: _C.ThreadPool) -> None:
    experts = CpuExperts(3, 512, 256, format="q4_k", down_format="q6_k", pool=pool, isa=isa)
    assert (experts.format, experts.down_format) == ("q4_k", "q6_k")
    layer = Layer(experts.weights, [], [])
    for e in range(3):
        raws = {
            "gate": ("q4_k", blocks("q4_k", 256, 512, 10 + e)),
            "up": ("q4_k", blocks("q4_k", 256, 512, 20 + e)),
            "down": ("q6_k", blocks("q6_k", 512, 256, 30 + e)),
        }
        for name, (format, raw) in raws.items():
            experts.set_projection(e, name, raw, source_format=format)
        gate, up, down = (values(raw, format) for format, raw in raws.values())
        for got, expected in zip(experts.dequantize(e), (gate, up, down), strict=True):
            assert torch.equal(bits(got), bits(expected))
        layer.dequantized.append((gate.double(), up.double(), down.double()))
    # Scales of random signs give activations longer tails than those of a model.
    check_layer(layer, "q4_k", isa, pool, slack=1.5)


@pytest.mark.parametrize(("format", "down"), [*((f, f) for f in GGUF_FORMATS), *MIXES])
def test_bit_exact_on_vectors(isa: str, format: str, down: str, pool: _C.ThreadPool) -> None:
    if isa.startswith("amx"):
        pytest.skip("tiles compute in bf16")
    layer = random_layer(format, down, 320, 257)
    one = _C.ThreadPool([min(os.sched_getaffinity(0))])
    for tokens in (1, 3, 17):
        x, (ids, mix) = activations(tokens, 320), routing(tokens, 4, 3)
        result = run(layer, x, ids, mix, pool, isa)
        assert torch.equal(result, run(layer, x, ids, mix, pool, "scalar"))
        assert torch.equal(result, run(layer, x, ids, mix, one, isa))
        for t in range(tokens):
            alone = run(layer, x[t : t + 1], ids[t : t + 1], mix[t : t + 1], pool, isa)
            assert torch.equal(result[t], alone[0]), f"{tokens=} {t=}"


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_few_rows_on_tile_sets_are_those_of_vectors(
    isa: str, format: str, pool: _C.ThreadPool
) -> None:
    layer = random_layer(format, format, 320, 257)
    x, (ids, mix) = activations(3, 320), routing(3, 4, 2)
    assert torch.equal(run(layer, x, ids, mix, pool, isa), run(layer, x, ids, mix, pool, "scalar"))


@pytest.mark.parametrize(("format", "down"), [*((f, f) for f in GGUF_FORMATS), *MIXES])
def test_lonely_crowded_and_unset_experts(
    isa: str, format: str, down: str, pool: _C.ThreadPool
) -> None:
    layer = random_layer(format, down, 96, 80)
    x, (ids, mix) = activations(20, 96), routing(20, 4, 2)
    ids[3] = -1
    ids[5] = 2
    result = run(layer, x, ids, mix, pool, isa)
    assert relative_error(result, layer.truth(x, ids, mix)) < 2e-2
    assert not result[3].any()
    crowd = torch.full_like(ids, 3)
    result = run(layer, x, crowd, mix, pool, isa)
    assert relative_error(result, layer.truth(x, crowd, mix)) < 2e-2
    unset = Layer(_C.ExpertWeights(4, 96, 80, format, down_format=down), [], [])
    assert not run(unset, x, ids, mix, pool, isa).any()
    none = torch.zeros(0, 2, dtype=torch.int64)
    empty = run(layer, torch.zeros(0, 96), none, torch.zeros(0, 2), pool, isa)
    assert empty.shape == (0, 96)


@pytest.mark.parametrize("format", GGUF_FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_bad_values_stay_in_their_token(
    isa: str, format: str, poison: float, pool: _C.ThreadPool
) -> None:
    layer = random_layer(format, format, 300, 80)
    check_bad_values(layer, 300, 40, poison, pool, isa)


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_bf16_rows_apart_and_long_rows(isa: str, format: str, pool: _C.ThreadPool) -> None:
    # Tiles unpack 2048 inputs at a time and keep sums in memory in between.
    layer = random_layer(format, format, 4200, 40, experts=2)
    for tokens in (1, 40):
        x, (ids, mix) = activations(tokens, 4200).bfloat16(), routing(tokens, 2, 1)
        expected = run(layer, x.float(), ids, mix, pool, isa)
        error = relative_error(expected, layer.truth(x, ids, mix))
        assert error < tolerance(format, isa, ids)
        frame = torch.full((tokens, 4300), 7.0, dtype=torch.bfloat16)
        frame[:, 60:4260] = x
        _C.moe_forward(layer.weights, frame[:, 60:4260], ids, mix, x, pool, isa)
        assert torch.equal(x, expected.bfloat16())


def test_sizes() -> None:
    for format in GGUF_FORMATS:
        weights = _C.ExpertWeights(2, 7168, 2048, format)  # reserved, not resident
        assert weights.expert_nbytes == 3 * 7168 * 2048 * FORMAT_BITS[format] / 8
        mixed = _C.ExpertWeights(2, 7168, 2048, format, down_format="q6_k")
        bits_per_weight = (2 * FORMAT_BITS[format] + FORMAT_BITS["q6_k"]) / 8
        assert mixed.expert_nbytes == 7168 * 2048 * bits_per_weight
    assert not set(GGUF_FORMATS) & set(EXPERT_FORMATS)


@pytest.mark.parametrize("format", GGUF_FORMATS)
@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E00, 0xFFFF])
def test_scales_that_are_no_numbers(isa: str, format: str, bad: int, pool: _C.ThreadPool) -> None:
    _, size, places = BLOCKS[format]
    for place in places:
        raw = blocks(format, 80, 512)
        at = raw.shape[1] - size + place
        raw[79, at], raw[79, at + 1] = bad & 255, bad >> 8
        weights = _C.ExpertWeights(1, 512, 80, format)
        with pytest.raises(ValueError, match=f"{format} scale that is NaN or infinity"):
            weights.set_projection(0, "up", raw, pool, isa, source_format=format)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("gate", torch.zeros(80, 512)), {}, ValueError, "format='q4_k' keeps the bits"),
        (
            ("gate", blocks("q5_k", 80, 512)),
            {"source_format": "q5_k"},
            ValueError,
            "source_format='q5_k' does not fit format='q4_k'",
        ),
        (
            ("down", blocks("q4_k", 512, 256)),
            {"source_format": "q4_k"},
            ValueError,
            "I=80 is no multiple of 256, the block of q4_k",
        ),
        (
            ("gate", blocks("q4_k", 80, 768)),
            {"source_format": "q4_k"},
            ValueError,
            r"w has shape \[80, 432\], expected \[I=80, bytes of a row=288\]",
        ),
        (
            ("gate", blocks("q4_k", 80, 512).to(torch.int32)),
            {"source_format": "q4_k"},
            TypeError,
            "w has dtype int32",
        ),
        (
            ("gate", blocks("q4_k", 80, 512)),
            {"source_format": "q3_k"},
            ValueError,
            "source_format='q3_k' is unknown",
        ),
        (
            ("gate", blocks("q4_k", 80, 512)),
            {"source_format": "int8"},
            ValueError,
            "source_format='int8' is no format of GGUF files",
        ),
        (
            ("gate", blocks("q4_k", 80, 512)),
            {"source_format": "q4_k", "scale_inv": torch.ones(1, 4)},
            ValueError,
            "scale_inv does not go with source_format",
        ),
        (("gate", blocks("q4_k", 80, 512)), {}, TypeError, "w has dtype uint8"),
    ],
)
def test_bad_sources(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    weights = _C.ExpertWeights(2, 512, 80, "q4_k")
    with pytest.raises(error, match=message):
        weights.set_projection(0, *arguments, **options)


def test_blocks_fit_their_own_format_only(pool: _C.ThreadPool) -> None:
    matrices = PackedMatrices(1, 80, 512, format="int8", pool=pool)
    with pytest.raises(ValueError, match="source_format='q6_k' does not fit format='int8'"):
        matrices.set(0, blocks("q6_k", 80, 512), source_format="q6_k")


def test_projections_must_take_the_same_activations(pool: _C.ThreadPool) -> None:
    for format, down in (("q4_k", "bf16"), ("fp8", "int8"), ("fp32", "q6_k")):
        with pytest.raises(ValueError, match=f"down_format='{down}' does not go with"):
            CpuExperts(1, 64, 64, format=format, down_format=down, pool=pool)
    with pytest.raises(ValueError, match="down_format='q9' is unknown"):
        _C.ExpertWeights(1, 64, 64, "q4_k", down_format="q9")
