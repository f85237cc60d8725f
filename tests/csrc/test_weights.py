"""Packing: exact round trips, quantisation error, refusals."""

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.testing.moe_layers import FORMATS

SHAPES = [(96, 80), (200, 257), (257, 48), (1, 1), (33, 31)]


def round_trip(w: Tensor, format: str, isa: str = "auto") -> Tensor:
    """w [I, D] through the gate projection."""
    weights = _C.ExpertWeights(1, w.shape[1], w.shape[0], format)
    weights.set_projection(0, "gate", w, None, isa)
    return torch.from_numpy(weights.dequantize(0)[0])


@pytest.mark.parametrize(("hidden", "inter"), SHAPES)
def test_projections_keep_their_places(
    isa: str, hidden: int, inter: int, pool: _C.ThreadPool
) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = _C.ExpertWeights(3, hidden, inter, "bf16")
    source = []
    for e in range(3):
        shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
        source.append([torch.randn(s, generator=generator).bfloat16() for s in shapes])
        weights.set_expert(e, *source[-1], pool, isa)
    for e in range(3):
        for w, packed in zip(source[e], weights.dequantize(e), strict=True):
            assert torch.equal(w.float(), torch.from_numpy(packed))


def test_int4_values_come_back_exactly(isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-8, 8, (48, 3, 32), generator=generator)
    codes[:, :, 0] = -8  # the whole range is used, so the scale is determined
    scale = (torch.rand(48, 3, 1, generator=generator) + 0.5).bfloat16().float()
    w = (codes * scale).reshape(48, 96)
    assert torch.equal(round_trip(w, "int4_g32", isa), w)


def test_int8_values_come_back_exactly(isa: str) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, (48, 2, 128), generator=generator)
    codes[:, :, 5] = 127
    scale = torch.tensor([2.0**-7, 2.0**-9]).reshape(1, 2, 1)  # 127 * scale / 127 is exact
    w = (codes * scale).reshape(48, 256)
    assert torch.equal(round_trip(w, "int8", isa), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_packing_is_the_same_on_every_set(isa: str, format: str, dtype: torch.dtype) -> None:
    w = torch.randn(45, 200, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert torch.equal(round_trip(w, format, isa), round_trip(w, format, "scalar"))
    assert torch.equal(round_trip(w, format, isa), round_trip(w.float(), format, isa))


def test_fp16_special_values() -> None:
    values = torch.tensor([0.0, -0.0, 6e-8, -6e-5, 1.0, -65504.0, float("inf"), float("nan")])
    w = values.half().reshape(1, 8)
    assert torch.equal(round_trip(w, "bf16").nan_to_num(7), w.bfloat16().float().nan_to_num(7))


def test_int4_search_beats_plain_absmax() -> None:
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(5))
    groups = w.reshape(256, 16, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    plain = ((groups / scale).round().clamp(-8, 7) * scale).reshape(256, 512)
    ours = round_trip(w, "int4_g32")
    error, plain_error = ((a - w).norm() / w.norm() for a in (ours, plain))
    assert error < 0.083
    assert error < 0.92 * plain_error


@pytest.mark.parametrize(
    ("format", "limit"), [("int8", 0.007), ("fp8", 0.028), ("bf16", 0.0018), ("fp32", 1e-12)]
)
def test_quantisation_error(format: str, limit: float) -> None:
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(6))
    assert (round_trip(w, format) - w).norm() / w.norm() < limit


def test_extreme_weights() -> None:
    w = torch.zeros(4, 64)
    w[0] = 1e-40
    w[1] = 1e30
    w[2, 3] = -5.0
    for format in FORMATS:
        if format == "fp8":
            continue  # its rows share a scale: see test_fp8.py
        back = round_trip(w, format)
        assert back.isfinite().all()
        assert not back[3].any()
        assert abs(float(back[2, 3]) + 5) < 0.02
        assert not back[2, :3].any()


def test_rows_apart() -> None:
    wide = torch.randn(40, 300, generator=torch.Generator().manual_seed(7))
    part = wide[:, 70:270]
    assert torch.equal(round_trip(part, "int8"), round_trip(part.contiguous(), "int8"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_integers_cannot_hold(isa: str, bad: float, pool: _C.ThreadPool) -> None:
    w = torch.zeros(80, 96)
    w[79, 95] = bad
    for format in ("int4_g32", "int8", "fp8"):
        weights = _C.ExpertWeights(1, 96, 80, format)
        with pytest.raises(ValueError, match="NaN or infinity"):
            weights.set_projection(0, "up", w, pool, isa)
    assert not round_trip(w, "bf16", isa)[79, 95].isfinite()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2, "gate", torch.zeros(80, 96)), ValueError, "expert=2 must be between 0 and 1"),
        ((-1, "gate", torch.zeros(80, 96)), ValueError, "expert=-1"),
        ((0, "side", torch.zeros(80, 96)), ValueError, "projection='side' is unknown"),
        ((0, "gate", torch.zeros(96, 80)), ValueError, r"w has shape \[96, 80\].*I=80, D=96"),
        ((0, "down", torch.zeros(80, 96)), ValueError, "D=96, I=80"),
        ((0, "up", torch.zeros(80, 96).double()), TypeError, "w has dtype float64"),
        ((0, "up", torch.zeros(96, 80).T), ValueError, "w has strides"),
        ((0, "up", torch.zeros(80, 96), None, "mmx"), ValueError, "isa='mmx'"),
    ],
)
def test_bad_projections(
    arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    weights = _C.ExpertWeights(2, 96, 80, "int8")
    with pytest.raises(error, match=message):
        weights.set_projection(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 96, 80, "int8"), ValueError, "num_experts=0"),
        ((2, -1, 80, "int8"), ValueError, "hidden_size=-1"),
        ((2, 96, 1 << 40, "int8"), ValueError, "intermediate_size="),
        ((2, 96, 80, "int5"), ValueError, "format='int5' is unknown"),
        ((65536, 1 << 20, 1 << 20, "bf16"), MemoryError, "cannot reserve"),
    ],
)
def test_bad_sizes(
    arguments: tuple[int, int, int, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _C.ExpertWeights(*arguments)


def test_sizes() -> None:
    weights = _C.ExpertWeights(3, 7168, 2048, "int4_g32")  # reserved, not resident
    assert weights.expert_nbytes == 3 * 7168 * 2048 * 9 // 16  # 4.5 bits
    assert weights.nbytes == 3 * weights.expert_nbytes
    assert (weights.num_experts, weights.hidden_size, weights.intermediate_size) == (3, 7168, 2048)
    assert weights.format == "int4_g32"


@pytest.mark.parametrize("cols", [32, 64, 96, 352])
@pytest.mark.parametrize("rows", [1, 16, 33, 50])
def test_int4_sources(rows: int, cols: int, isa: str) -> None:
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8)
    scales = torch.randn(rows, cols // 32).to(torch.bfloat16)
    values = (codes.float() - 8) * scales.float().repeat_interleave(32, 1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    for target in ("int4_g32", "fp32", "bf16", "int8", "fp8"):
        weights = _C.LinearWeights(1, rows, cols, target)
        weights.set(0, packed, None, isa, group_scales=scales)
        got = torch.from_numpy(weights.dequantize(0))
        if target in ("int4_g32", "fp32"):
            assert torch.equal(got, values)
            continue
        again = _C.LinearWeights(1, rows, cols, target)
        again.set(0, values, None, isa)
        assert torch.equal(got, torch.from_numpy(again.dequantize(0)))


@pytest.mark.parametrize(
    ("w", "scales", "error", "message"),
    [
        (torch.zeros(4, 16), torch.ones(4, 1).bfloat16(), TypeError, "w has dtype"),
        (torch.zeros(4, 8), torch.ones(4, 1).bfloat16(), TypeError, "w has dtype"),
        (torch.zeros(4, 8).byte(), torch.ones(4, 1).bfloat16(), ValueError, "w has shape"),
        (torch.zeros(4, 16).byte(), torch.ones(4, 1), TypeError, "group_scales has dtype"),
        (torch.zeros(4, 16).byte(), torch.ones(4, 2).bfloat16(), ValueError, "group_scales has"),
        (
            torch.zeros(4, 16).byte(),
            torch.full((4, 1), float("nan")).bfloat16(),
            ValueError,
            r"group_scales\[0, 0\] is NaN or infinite",
        ),
    ],
)
def test_bad_int4_sources(w: Tensor, scales: Tensor, error: type[Exception], message: str) -> None:
    weights = _C.LinearWeights(1, 4, 32, "int4_g32")
    with pytest.raises(error, match=message):
        weights.set(0, w, group_scales=scales)
    with pytest.raises(ValueError, match="cols=40 to be a multiple of 32"):
        _C.LinearWeights(1, 4, 40, "int4_g32").set(0, w, group_scales=scales)
    with pytest.raises(ValueError, match="not both"):
        weights.set(0, w, group_scales=scales, scale_inv=torch.ones(1, 1))
