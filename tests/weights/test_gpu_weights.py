"""Weights for the GPU: the same values as the CPU's packed formats, and checkpoints' own codes."""

import pytest
import torch

from moejet import _C
from moejet.ops import gpu_matrices
from moejet.weights.gpu_weights import GPU_FORMATS, GpuWeights, dequantize, from_stored, quantize
from moejet.weights.stored import StoredWeight


def cpu_values(w: torch.Tensor, format: str) -> torch.Tensor:
    packed = _C.LinearWeights(1, *w.shape, format)
    packed.set(0, w, _C.ThreadPool([0], False, [0], [-1]), "scalar")
    return torch.from_numpy(packed.dequantize(0))


def awkward_weights(rows: int, cols: int) -> torch.Tensor:
    """Rows of very different size, zeros, ties and outliers among Gaussian values."""
    w = torch.randn(rows, cols) * torch.logspace(-20, 4, rows)[:, None]
    w[0] = 0.0
    w[1] = w[1].sign()
    w[2, ::7] *= 30.0
    w[3] = torch.arange(cols) % 9 - 4.0
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("format", "rows", "cols"),
    [
        ("int4_g32", 37, 96),
        ("int4_g32", 160, 256),
        ("int8", 37, 300),
        ("fp8", 150, 300),
        ("bf16", 5, 33),
    ],
)
def test_values_are_those_of_the_cpu(format, rows, cols, dtype):
    torch.manual_seed(rows + cols)
    w = awkward_weights(rows, cols).to(dtype)
    expected = cpu_values(w, format)
    assert torch.equal(dequantize(quantize(w, format)), expected)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("format", GPU_FORMATS)
def test_leading_dimensions_are_matrices_of_their_own(format):
    torch.manual_seed(0)
    w = torch.randn(2, 3, 130, 160)
    whole = quantize(w, format)
    assert whole.shape == w.shape
    for i in range(2):
        for j in range(3):
            one = quantize(w[i, j], format)
            assert torch.equal(whole[i][j].codes, one.codes)
            assert torch.equal(dequantize(whole)[i, j], dequantize(one))
    assert whole.nbytes == 6 * one.nbytes


def test_an_expert_is_copied_into_its_slot():
    slots = GpuWeights.empty("int4_g32", (3, 8, 64))
    expert = quantize(torch.randn(8, 64), "int4_g32")
    slots[1].copy_(expert)
    assert torch.equal(dequantize(slots[1]), dequantize(expert))


def test_a_checkpoint_keeps_its_fp8_codes():
    codes = torch.randint(0, 127, (200, 130), dtype=torch.uint8)
    stored = StoredWeight((200, 130), codes, "fp8", torch.rand(2, 2))
    weights = from_stored(stored, "fp8")
    assert torch.equal(weights.codes, codes)
    assert torch.equal(dequantize(weights), stored.dequantize())
    assert stored.scale is not None
    stored.scale[1, 0] = torch.inf
    with pytest.raises(ValueError, match="scale has NaN, infinity"):
        from_stored(stored, "fp8")
    codes[3, 5] = 0xFF
    with pytest.raises(ValueError, match="NaN"):
        from_stored(stored, "fp8")


def test_a_checkpoint_keeps_its_int4_codes():
    codes = torch.randint(0, 256, (6, 48), dtype=torch.uint8)
    scale = torch.rand(6, 3).bfloat16()
    stored = StoredWeight((6, 96), codes, "int4", scale)
    assert torch.equal(dequantize(from_stored(stored, "int4_g32")), stored.dequantize())
    wide = StoredWeight((6, 96), codes, "int4", scale.float() * 1.001)
    requantized = from_stored(wide, "int4_g32")
    assert requantized.scales is not None
    assert requantized.scales.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("encoding", "format", "scale"),
    [
        ("fp8", "fp8", torch.rand(2, 1)),
        ("int4", "int4_g32", torch.rand(200, 3).bfloat16()),
    ],
)
def test_what_the_loader_reads_next_changes_nothing(encoding, format, scale):
    codes = torch.randint(0, 127, (200, 96 if encoding == "fp8" else 48), dtype=torch.uint8)
    weights = from_stored(StoredWeight((200, 96), codes, encoding, scale), format)
    before = dequantize(weights)
    codes.fill_(1)
    scale.fill_(7.0)
    assert torch.equal(dequantize(weights), before)


def test_byte_j_of_a_group_holds_inputs_j_and_j_plus_16():
    w = torch.zeros(1, 64)
    w[0, 32 + 5], w[0, 32 + 21] = -8.0, 7.0
    weights = quantize(w, "int4_g32")
    assert weights.codes[0, 16 + 5] == 0 | 15 << 4
    assert weights.codes[0, 16 + 6] == 8 | 8 << 4


@pytest.mark.parametrize("format", GPU_FORMATS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinity_is_refused(format, value):
    w = torch.randn(4, 64)
    w[1, 2] = value
    with pytest.raises(ValueError, match=f"beyond the range of {format}"):
        quantize(w, format)


@pytest.mark.parametrize(("format", "value"), [("fp16", 1e6), ("bf16", 3.4028e38)])
def test_values_that_become_infinity_are_refused(format, value):
    with pytest.raises(ValueError, match=f"beyond the range of {format}"):
        quantize(torch.full((2, 32), value), format)


def test_scales_out_of_the_kernels_range_are_refused():
    with pytest.raises(ValueError, match="int4 scale"):
        quantize(torch.full((2, 32), 4e6), "int4_g32")


def test_shapes_without_a_format_are_refused():
    with pytest.raises(ValueError, match="no multiple"):
        quantize(torch.randn(4, 48), "int4_g32")
    with pytest.raises(ValueError, match="q4_k"):
        quantize(torch.randn(4, 48), "q4_k")


@pytest.mark.parametrize(
    ("encoding", "format"),
    [(e, f) for f in GPU_FORMATS for e in ("plain", "fp8", "int4")],
)
def test_large_weights_are_quantised_some_rows_at_a_time(encoding, format, monkeypatch):
    torch.manual_seed(0)
    rows, cols = 300, 160
    if encoding == "plain":
        weight = StoredWeight.plain(torch.randn(rows, cols).bfloat16())
    elif encoding == "fp8":
        codes = torch.randn(rows, cols).to(torch.float8_e4m3fn).view(torch.uint8)
        weight = StoredWeight((rows, cols), codes, "fp8", torch.rand(3, 2) + 0.5)
    else:
        codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8)
        scale = (torch.rand(rows, cols // 32) + 0.5).bfloat16()
        weight = StoredWeight((rows, cols), codes, "int4", scale)
    expected = from_stored(weight, format)
    pieces = []
    real = gpu_matrices.gpu_weights_of
    monkeypatch.setattr(
        gpu_matrices, "gpu_weights_of", lambda w, f: (pieces.append(w.shape), real(w, f))[1]
    )
    monkeypatch.setattr(gpu_matrices, "_CHUNK", 128 * cols)
    target = GpuWeights.empty(format, (rows, cols))
    target.codes.view(torch.uint8).fill_(255)
    gpu_matrices.quantise_into(target, weight)
    assert pieces == [(128, cols), (128, cols), (44, cols)]
    assert torch.equal(dequantize(target), dequantize(expected))
    assert torch.equal(target.codes, expected.codes)


@pytest.mark.parametrize("format", GPU_FORMATS)
def test_random_weights_have_the_size_of_trained_ones(format):
    weights = GpuWeights.empty(format, (2, 256, 512))
    weights.codes.view(torch.uint8).fill_(255)
    weights.fill_random(torch.Generator().manual_seed(3))
    values = dequantize(weights)
    assert torch.isfinite(values).all()
    assert float(values.std()) == pytest.approx(512**-0.5, rel=0.05)
    assert abs(float(values.mean())) < 0.15 * 512**-0.5
    again = GpuWeights.empty(format, (2, 256, 512))
    again.fill_random(torch.Generator().manual_seed(3))
    assert torch.equal(again.codes, weights.codes)
