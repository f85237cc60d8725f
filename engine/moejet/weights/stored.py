"""Weights as checkpoints hold them: plain, or quantised with scales beside the codes.

fp8    float8_e4m3fn codes [rows, cols] and one scale per 128 x 128 block (DeepSeek-V3: `weight_scale_inv`, fp32, or
       ue8m0 powers of two as in V3.1); blocks at the edges are cut off
int4   codes 0..15, eight in an int32, the first in its lowest bits, and one scale per 32 inputs of a row
       (compressed-tensors' `pack-quantized`, symmetric: `weight_packed`, `weight_scale`); weight = (code - 8) scale
gguf   blocks of a ggml type, codes and scales together (`moejet.weights.gguf_types`)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moejet.weights.gguf_types import dequantize

FP8_BLOCK = 128
INT4_GROUP = 32
Encoding = Literal["plain", "fp8", "int4", "gguf"]
# Larger tensors of GGUF (tables of the largest models) come in bf16, which is what they were made from.
_FP32_WEIGHTS = 1 << 28


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One tensor of a checkpoint in memory, of logical shape `shape`.

    data: plain: that shape, F32, F16 or BF16 · fp8: uint8 [rows, cols] · int4: uint8 [rows, cols / 2], the code of the
    smaller index in the low half of each byte · gguf: the blocks of `ggml_type`, uint8, row after row.
    scale: fp8: fp32 [ceil(rows / 128), ceil(cols / 128)] · int4: bf16, fp16 or fp32 [rows, cols / 32].
    """

    shape: tuple[int, ...]
    data: Tensor
    encoding: Encoding = "plain"
    scale: Tensor | None = None
    ggml_type: str | None = None

    @classmethod
    def plain(cls, values: Tensor) -> StoredWeight:
        return cls(tuple(values.shape), values)

    def split_rows(self, *sizes: int) -> list[StoredWeight]:
        """Matrices of so many rows each, the sizes repeated until the end; leading dimensions count as rows.

        Plain weights and GGUF's blocks stay as they are. Others are dequantised, because blocks of fp8 span rows.
        """
        if self.encoding in ("fp8", "int4"):
            return StoredWeight.plain(self.dequantize()).split_rows(*sizes)
        num_rows, columns = math.prod(self.shape[:-1]), self.shape[-1]
        repeats, rest = divmod(num_rows, sum(sizes))
        if rest:
            raise ValueError(f"{num_rows} rows cannot be divided into parts of {list(sizes)}")
        parts = torch.split(self.data.view(num_rows, -1), list(sizes) * repeats)
        return [
            StoredWeight((len(part), columns), part, self.encoding, ggml_type=self.ggml_type)
            for part in parts
        ]

    def rows(self, first: int, count: int) -> StoredWeight:
        """Some rows of a matrix that is not of GGUF; `first` a multiple of 128."""
        assert self.encoding != "gguf", "its blocks know no rows here"
        assert len(self.shape) == 2, f"{self.shape=}"
        scale = self.scale
        if scale is not None:
            at = slice(first, first + count)
            if self.encoding == "fp8":
                at = slice(first // FP8_BLOCK, math.ceil((first + count) / FP8_BLOCK))
            scale = scale[at]
        data = self.data[first : first + count]
        return StoredWeight((len(data), self.shape[1]), data, self.encoding, scale)

    def dequantize(self) -> Tensor:
        """The values: plain tensors as they are, others in fp32."""
        if self.encoding == "plain":
            return self.data
        if self.encoding == "gguf":
            assert self.ggml_type is not None
            dtype = torch.float32 if math.prod(self.shape) <= _FP32_WEIGHTS else torch.bfloat16
            return dequantize(self.data, self.ggml_type, self.shape, dtype)
        assert self.scale is not None
        if self.encoding == "fp8":
            return dequantize_fp8(self.data, self.scale)
        return dequantize_int4(self.data, self.scale)


def dequantize_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """codes uint8 [rows, cols] times the scales of their blocks, fp32."""
    rows, cols = codes.shape
    values = codes.view(torch.float8_e4m3fn).float()
    wide = scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :cols]
    return values * wide


def dequantize_int4(codes: Tensor, scale: Tensor) -> Tensor:
    """codes uint8 [rows, cols / 2] and scale [rows, cols / 32] to fp32 [rows, cols]."""
    rows = codes.shape[0]
    values = torch.stack((codes & 15, codes >> 4), dim=-1).float() - 8.0
    grouped = values.view(rows, -1, INT4_GROUP) * scale.float().unsqueeze(-1)
    return grouped.view(rows, -1)


def scale_values(raw: Tensor, dtype: str) -> Tensor:
    """Block scales in fp32 from what a file holds: F32, BF16, F16, or F8_E8M0 as uint8 exponents."""
    if dtype != "F8_E8M0":
        return raw.float()
    if bool((raw == 255).any()):
        raise ValueError("its ue8m0 scales hold NaN (code 255)")
    return torch.ldexp(torch.ones(raw.shape), raw.to(torch.int32) - 127)
