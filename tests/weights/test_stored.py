"""Stored weights cut into matrices by rows."""

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from moejet.weights.stored import StoredWeight


def gguf_weight(kind: str, shape: tuple[int, ...]) -> StoredWeight:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).numpy()
    blocks = quants.quantize(values, GGMLQuantizationType[kind])
    return StoredWeight(shape, torch.from_numpy(blocks.reshape(1, -1)), "gguf", ggml_type=kind)


def test_gguf_blocks_stay_with_their_rows():
    whole = gguf_weight("Q8_0", (15, 64))
    parts = whole.split_rows(2, 3)
    assert [part.shape for part in parts] == [(2, 64), (3, 64)] * 3
    assert {(part.encoding, part.ggml_type) for part in parts} == {("gguf", "Q8_0")}
    assert torch.equal(torch.cat([part.data for part in parts]).view(1, -1), whole.data)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


def test_leading_dimensions_are_rows():
    stack = gguf_weight("Q4_0", (3, 5, 32))
    expected = stack.dequantize()
    for i, part in enumerate(stack.split_rows(5)):
        assert torch.equal(part.dequantize(), expected[i])
    plain = StoredWeight.plain(torch.arange(24.0).view(2, 3, 4).bfloat16())
    assert [part.data.tolist() for part in plain.split_rows(1, 2)] == [
        plain.data[i, rows].tolist() for i in range(2) for rows in (slice(1), slice(1, 3))
    ]


def test_fp8_is_dequantised_first():
    codes = torch.randint(0, 120, (192, 130), dtype=torch.uint8)
    fp8 = StoredWeight((192, 130), codes, "fp8", torch.rand(2, 2) + 0.5)
    parts = fp8.split_rows(96)
    assert [part.encoding for part in parts] == ["plain", "plain"]
    assert torch.equal(torch.cat([part.data for part in parts]), fp8.dequantize())


def test_parts_must_fill_the_rows():
    with pytest.raises(ValueError, match=r"10 rows cannot be divided into parts of \[2, 1\]"):
        StoredWeight.plain(torch.zeros(10, 4)).split_rows(2, 1)
