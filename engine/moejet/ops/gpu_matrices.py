"""Dense matrices on a device: what `moejet.ops.linear.PackedMatrices` is on the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moejet.ops.gpu_linear import gpu_linear
from moejet.weights.gpu_weights import GPU_FORMATS, GpuWeights, dequantize
from moejet.weights.gpu_weights import from_stored as gpu_weights_of
from moejet.weights.stored import FP8_BLOCK, INT4_GROUP, StoredWeight


def gpu_format(format: str, *, rows: int, cols: int, num: int = 1) -> str:
    """How a GPU holds `num` matrices, read as one, that the CPU would hold in `format`.

    int8 where it has no such format (blocks of GGUF files), where int4's groups do not divide the inputs, and where
    blocks of fp8 would span two matrices.
    """
    spans = format == "fp8" and num > 1 and rows % FP8_BLOCK != 0
    divides = format != "int4_g32" or cols % INT4_GROUP == 0
    return format if format in GPU_FORMATS and divides and not spans else "int8"


# Values of a weight that are on the device, not quantised yet, at a time: little, beside what the model takes of it.
_CHUNK = 1 << 24


def quantise_into(target: GpuWeights, weight: StoredWeight) -> None:
    """Sets one matrix from a checkpoint's weight, which is quantised on the target's device, some rows at a time."""
    device = target.codes.device
    if weight.encoding == "gguf":
        weight = StoredWeight.plain(weight.dequantize())
    assert tuple(weight.shape) == target.shape, f"{weight.shape=} {target.shape=}"
    rows, cols = target.shape
    step = max(1, _CHUNK // (cols * FP8_BLOCK)) * FP8_BLOCK
    for first in range(0, rows, step):
        part = weight.rows(first, min(step, rows - first))
        scale = None if part.scale is None else part.scale.to(device)
        part = replace(part, data=part.data.to(device), scale=scale)
        target.rows(first, part.shape[0]).copy_(gpu_weights_of(part, target.format))


class GpuMatrices:
    """G matrices [rows, cols], not initialised, on a device."""

    def __init__(self, num: int, rows: int, cols: int, *, format: str, device: torch.device):
        format = gpu_format(format, rows=rows, cols=cols, num=num)
        self.weights = GpuWeights.empty(format, (num, rows, cols), device)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.weights.nbytes

    @property
    def stacked(self) -> GpuWeights:
        """All as one matrix [G * rows, cols], in the same memory."""
        num, rows, cols = self.weights.shape
        codes, scales = self.weights.codes, self.weights.scales
        return GpuWeights(
            self.weights.format,
            (num * rows, cols),
            codes.view(num * rows, -1),
            None if scales is None else scales.view(-1, scales.shape[-1]),
        )

    def set(self, matrix: int, w: Tensor) -> None:
        """Quantises w [rows, cols], fp32, bf16 or fp16."""
        self.set_stored(matrix, StoredWeight.plain(w))

    def set_stored(self, matrix: int, weight: StoredWeight) -> None:
        """Takes a checkpoint's weight, as it is where the format allows."""
        quantise_into(self.weights[matrix], weight)

    def dequantize(self, matrix: int) -> Tensor:
        """The values that the kernels compute with, fp32 [rows, cols]."""
        return dequantize(self.weights[matrix])

    def state(self, prefix: str) -> dict[str, Tensor]:
        """What holds the weights, by name."""
        codes, scales = self.weights.codes, self.weights.scales
        own = {f"{prefix}.codes": codes}
        return own if scales is None else {**own, f"{prefix}.scales": scales}

    def apply(
        self, x: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """x [T, cols] to [T, G * rows], or x [T, G, cols] to [T, G, rows] with a matrix for each."""
        weights = self.stacked if x.dim() == 2 else self.weights
        return gpu_linear(x, weights, bias, out_dtype=out_dtype)
