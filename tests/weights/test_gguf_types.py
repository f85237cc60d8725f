"""moejet.weights.gguf_types: bit-exact with the gguf package, whatever the bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from moejet.weights import gguf_types
from moejet.weights.gguf_types import (
    GGML_TYPES,
    LAYOUTS,
    SUPPORTED_TYPES,
    dequantize,
    gguf_dtype,
    layout_of,
)

# Type -> byte offsets of its fp16 fields.
HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ4_XS": (0,), "F16": (0,), "BF16": (), "F32": ()},
}


def expected(blocks: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks, GGMLQuantizationType[name])


def random_blocks(name: str, rows: int, per_row: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes]: any bytes, except that scales are finite."""
    rng = np.random.default_rng(seed)
    layout = LAYOUTS[name]
    blocks = rng.integers(0, 256, (rows * per_row, layout.block_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        scales = rng.standard_normal(len(blocks)) * rng.choice([1e-6, 1e-2, 1.0, 60.0])
        blocks[:, at : at + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def same_bits(result: Tensor, want: np.ndarray) -> bool:
    return np.array_equal(
        result.numpy().view(np.uint32), want.view(np.uint32).reshape(result.shape)
    )


def test_layouts_are_those_of_ggml() -> None:
    assert set(GGML_TYPES) == {int(kind) for kind in GGMLQuantizationType}
    for number, layout in GGML_TYPES.items():
        kind = GGMLQuantizationType(number)
        assert layout.name == kind.name
        assert (layout.block_size, layout.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert set(HALVES) == set(SUPPORTED_TYPES)


@pytest.mark.parametrize("name", SUPPORTED_TYPES)
@pytest.mark.parametrize(("rows", "per_row"), [(1, 1), (3, 5), (64, 3), (17, 1)])
def test_random_blocks(name: str, rows: int, per_row: int) -> None:
    blocks = random_blocks(name, rows, per_row, seed=rows)
    shape = (rows, per_row * LAYOUTS[name].block_size)
    result = dequantize(torch.from_numpy(blocks), name, shape)
    assert result.dtype == torch.float32
    assert result.shape == shape
    want = expected(blocks, name)
    if name in ("BF16", "F32"):  # any bytes at all, so NaN too: their payload is not a weight
        assert np.array_equal(np.isnan(want), result.isnan().numpy())
        want = np.where(np.isnan(want), 0, want).astype(np.float32)
        result = result.nan_to_num(0.0, float("inf"), -float("inf"))
    assert same_bits(result, want)


@pytest.mark.parametrize("name", [n for n in SUPPORTED_TYPES if LAYOUTS[n].block_size > 1])
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x0F, 0xF0, 0x55, 0xAA, 0x80, 0x7F])
def test_extremes(name: str, fill: int) -> None:
    """All codes and scales at their ends, times the largest, smallest, denormal and signed zero halves."""
    layout = LAYOUTS[name]
    halves = np.array([65504.0, -65504.0, 6e-8, -6.1e-5, 0.0, -0.0, 1.0], np.float16)
    blocks = np.full((len(halves), layout.block_bytes), fill, np.uint8)
    for at in HALVES[name]:
        blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
    result = dequantize(torch.from_numpy(blocks), name, (len(halves), layout.block_size))
    assert same_bits(result, expected(blocks, name))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q3_K"])
def test_chunks_and_leading_dimensions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(name, 21, 3)
    shape = (7, 3, 3 * LAYOUTS[name].block_size)
    want = expected(blocks, name)
    monkeypatch.setattr(gguf_types, "_CHUNK_WEIGHTS", 1024)
    assert same_bits(dequantize(torch.from_numpy(blocks), name, shape), want)
    rounded = dequantize(torch.from_numpy(blocks), name, shape, torch.bfloat16)
    assert torch.equal(rounded, torch.from_numpy(want).view(shape).bfloat16())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"IQ2_XXS is not supported; supported: F32, F16, Q4_0"):
        dequantize(torch.zeros(66, dtype=torch.uint8), "IQ2_XXS", (1, 256))
    with pytest.raises(ValueError, match="takes 34 bytes"):
        dequantize(torch.zeros(33, dtype=torch.uint8), "Q8_0", (1, 32))
    with pytest.raises(ValueError, match="Q8_0"):
        dequantize(torch.zeros(34, dtype=torch.uint8), "Q8_0", (2, 16))


def test_names_in_tensor_infos() -> None:
    assert gguf_dtype("Q4_K") == "GGUF:Q4_K"
    assert gguf_dtype("BF16") == "BF16"
    assert layout_of("BF16") is None
    assert layout_of("F8_E4M3") is None
    assert layout_of("GGUF:Q4_K") == LAYOUTS["Q4_K"]
