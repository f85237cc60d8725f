"""Matrices as the GPU kernels read them: row-major codes, scales beside them, and the rules that quantise them.

With K inputs, N outputs and any leading dimensions (heads, experts):

  format     codes                      scales
  bf16 fp16  [.., N, K]                 none
  fp8        uint8 [.., N, K], e4m3     fp32 [.., ceil(N / 128), ceil(K / 128)]: a checkpoint's own bytes and scales
  int8       int8 [.., N, K]            fp32 [.., N, ceil(K / 128)]
  int4_g32   uint8 [.., N, K / 2]       bf16 [.., N, K / 32], weight = (code - 8) scale, code 0..15

Byte j (0..15) of an int4 group of 32 inputs holds input j in its low half and input j + 16 in its high half: a tile of
bytes makes two tiles of weights, which multiply two tiles of adjacent activations, and nothing is shuffled.

Values and rounding are those of the CPU's formats (csrc/pack-inl.h): one weight, one value, wherever it lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moejet.validation import require_choice
from moejet.weights.stored import FP8_BLOCK, INT4_GROUP, StoredWeight, dequantize_fp8

# Raised when the same weights get other bytes in any of these formats.
GPU_LAYOUT_VERSION = 1
GPU_FORMATS = ("bf16", "fp16", "fp8", "int8", "int4_g32")
_PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CODES = {**_PLAIN, "fp8": torch.uint8, "int8": torch.int8, "int4_g32": torch.uint8}
_INT8_GROUP = 128
_HALF = INT4_GROUP // 2
# As in csrc: e4m3's largest value, and the magnitude below which a block becomes zero.
_FP8_MAX, _FP8_MIN_AMAX = 448.0, 1e-30
_FP8_NAN = 0x7F
# The kernels' arithmetic on int4 scales leaves the range of bf16 from here on (kernels/weight_tiles.py).
_INT4_MAX_SCALE = 2.0**18
# Quantisation works on so many values at a time: its temporaries are a few times as large.
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class GpuWeights:
    """Matrices y = W x of logical shape `shape` = (.., N, K) in one of GPU_FORMATS, on any device."""

    format: str
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor | None = None

    @staticmethod
    def empty(
        format: str, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> GpuWeights:
        """Memory for matrices of that shape, not initialised."""
        check_shape(format, shape)
        *lead, rows, cols = shape
        codes = torch.empty(
            *lead, rows, cols // 2 if format == "int4_g32" else cols,
            dtype=_CODES[format], device=device,
        )  # fmt: skip
        if format in _PLAIN:
            return GpuWeights(format, shape, codes)
        if format == "int4_g32":
            size, dtype = (*lead, rows, cols // INT4_GROUP), torch.bfloat16
        elif format == "int8":
            size, dtype = (*lead, rows, math.ceil(cols / _INT8_GROUP)), torch.float32
        else:
            blocks = (math.ceil(rows / FP8_BLOCK), math.ceil(cols / FP8_BLOCK))
            size, dtype = (*lead, *blocks), torch.float32
        return GpuWeights(format, shape, codes, torch.empty(size, dtype=dtype, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: what a product reads once."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __getitem__(self, index: int) -> GpuWeights:
        """The matrices at this place of the first leading dimension, in the same memory."""
        assert len(self.shape) > 2, f"{self.shape=}"
        scales = None if self.scales is None else self.scales[index]
        return GpuWeights(self.format, self.shape[1:], self.codes[index], scales)

    def rows(self, first: int, count: int) -> GpuWeights:
        """Some rows of one matrix, in the same memory; `first` a multiple of 128."""
        assert len(self.shape) == 2, f"{self.shape=}"
        assert first % FP8_BLOCK == 0, f"{first=}"
        scales = self.scales
        if scales is not None:
            at = slice(first, first + count)
            if self.format == "fp8":
                at = slice(first // FP8_BLOCK, math.ceil((first + count) / FP8_BLOCK))
            scales = scales[at]
        codes = self.codes[first : first + count]
        return GpuWeights(self.format, (codes.shape[0], self.shape[1]), codes, scales)

    def fill_random(self, generator: torch.Generator) -> None:
        """Codes and scales of matrices with variance 1 / K, without quantising anything: for benchmarks."""
        deviation = self.shape[-1] ** -0.5
        if self.format in _PLAIN:
            self.codes.normal_(0.0, deviation, generator=generator)
            return
        assert self.scales is not None
        if self.format == "fp8":
            values = torch.empty(self.codes.shape, device=self.codes.device)
            values.normal_(generator=generator)
            self.codes.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))
            self.scales.fill_(deviation)
        elif self.format == "int8":
            self.codes.random_(-127, 128, generator=generator)
            self.scales.fill_(deviation * math.sqrt(3.0) / 127.0)
        else:
            self.codes.random_(generator=generator)
            self.scales.fill_(deviation / math.sqrt(21.5))  # the mean square of codes -8 to 7

    def copy_(self, other: GpuWeights) -> None:
        """Takes over the values of another of the same format and shape, possibly from another device."""
        assert (self.format, self.shape) == (other.format, other.shape), (
            f"{other.format} {other.shape} into {self.format} {self.shape}"
        )
        self.codes.copy_(other.codes, non_blocking=True)
        if self.scales is not None and other.scales is not None:
            self.scales.copy_(other.scales, non_blocking=True)


def check_shape(format: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError where matrices of this shape have no such format."""
    require_choice("format", format, GPU_FORMATS)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape={shape} is not that of matrices with at least one row and column")
    if format == "int4_g32" and shape[-1] % INT4_GROUP:
        raise ValueError(
            f"int4_g32 has a scale per {INT4_GROUP} inputs, and {shape[-1]} inputs are no multiple of that: "
            "choose int8 or bf16"
        )


def quantize(weight: Tensor, format: str) -> GpuWeights:
    """Quantises weight [.., N, K] fp32, bf16 or fp16, on its own device.

    ValueError where it has NaN or infinity, or values that the format turns into infinity.
    """
    shape = tuple(weight.shape)
    result = GpuWeights.empty(format, shape, weight.device)
    if format in _PLAIN:
        _check_finite(result.codes.copy_(weight), "weight", format)
        return result
    assert result.scales is not None
    _check_finite(weight, "weight", format)
    # Whole rows, or rows of blocks, are quantised independently of the others.
    step = max(1, _CHUNK // (shape[-1] * FP8_BLOCK)) * FP8_BLOCK
    flat = weight.reshape(-1, *shape[-2:])
    codes = result.codes.view(-1, *result.codes.shape[-2:])
    scales = result.scales.view(-1, *result.scales.shape[-2:])
    rules = {"fp8": _quantize_fp8, "int8": _quantize_int8, "int4_g32": _quantize_int4}
    for matrix in range(flat.shape[0]):
        for row in range(0, shape[-2], step):
            part_codes, part_scales = rules[format](flat[matrix, row : row + step].float())
            at = row // FP8_BLOCK if format == "fp8" else row
            codes[matrix, row : row + step] = part_codes
            scales[matrix, at : at + part_scales.shape[0]] = part_scales
    _check_scales(result)
    return result


def from_stored(weight: StoredWeight, format: str) -> GpuWeights:
    """One matrix of a checkpoint: fp8 and int4 with bf16 scales keep every code and scale in their own format.

    The result is a copy: what is read from a checkpoint lies in memory that is read into again.
    """
    scale = weight.scale
    if weight.encoding == format == "fp8" and scale is not None:
        if bool(((weight.data & _FP8_NAN) == _FP8_NAN).any()):
            raise ValueError("weight has NaN among its fp8 codes")
        _check_finite(scale, "weight's scale", format)
        codes = weight.data.clone(memory_format=torch.contiguous_format)
        scales = scale.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return GpuWeights("fp8", weight.shape, codes, scales)
    keeps_int4 = weight.encoding == "int4" and format == "int4_g32"
    if keeps_int4 and scale is not None and scale.dtype == torch.bfloat16:
        check_shape(format, weight.shape)
        codes = torch.stack((weight.data & 15, weight.data >> 4), dim=-1)
        scales = scale.clone(memory_format=torch.contiguous_format)
        result = GpuWeights(format, weight.shape, pack_nibbles(codes.flatten(-2)), scales)
        _check_scales(result)
        return result
    return quantize(weight.dequantize(), format)


def _check_finite(values: Tensor, name: str, format: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"{name} has NaN, infinity or values beyond the range of {format}: "
            "choose another format, or repair the checkpoint"
        )


def _check_scales(weights: GpuWeights) -> None:
    if weights.format != "int4_g32" or weights.scales is None:
        return
    largest = float(weights.scales.abs().amax())
    if not largest < _INT4_MAX_SCALE:
        raise ValueError(
            f"weight has an int4 scale of {largest:.3g}; it must be below {_INT4_MAX_SCALE:.0f}: choose int8 or bf16"
        )


def dequantize(weights: GpuWeights) -> Tensor:
    """The values, fp32 [.., N, K]."""
    codes, scales = weights.codes, weights.scales
    if weights.format in _PLAIN:
        return codes.float()
    assert scales is not None
    if weights.format == "fp8":
        flat = codes.reshape(-1, *codes.shape[-2:])
        blocks = scales.reshape(-1, *scales.shape[-2:])
        matrices = [dequantize_fp8(c, s) for c, s in zip(flat, blocks, strict=True)]
        return torch.stack(matrices).view(weights.shape)
    if weights.format == "int8":
        wide = scales.repeat_interleave(_INT8_GROUP, -1)[..., : weights.shape[-1]]
        return codes.float() * wide
    pairs = codes.view(*codes.shape[:-1], -1, _HALF)
    values = torch.cat((pairs & 15, pairs >> 4), dim=-1).float() - 8.0
    return (values * scales.float().unsqueeze(-1)).view(weights.shape)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 [.., K] to bytes [.., K / 2] in the order of int4_g32."""
    halves = codes.view(*codes.shape[:-1], -1, 2, _HALF)
    packed = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return packed.view(*codes.shape[:-1], -1)


def _quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] to codes [N, K] and scales [N, ceil(K / 128)]: the largest magnitude becomes 127."""
    rows, cols = w.shape
    groups = _padded(w, 1, _INT8_GROUP).view(rows, -1, _INT8_GROUP)
    scales = groups.abs().amax(-1) / 127.0
    codes = (groups * _reciprocal_or_zero(scales).unsqueeze(-1)).clamp(-127.0, 127.0).round()
    return codes.to(torch.int8).view(rows, -1)[:, :cols], scales


def _quantize_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] to codes [N, K] and scales of blocks: the largest magnitude becomes 448."""
    rows, cols = w.shape
    padded = _padded(_padded(w, 0, FP8_BLOCK), 1, FP8_BLOCK)
    blocks = padded.view(-(-rows // FP8_BLOCK), FP8_BLOCK, -1, FP8_BLOCK)
    amax = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(amax < _FP8_MIN_AMAX, 0.0, amax / _FP8_MAX)
    wide = scales[:, None, :, None]
    codes = torch.where(wide > 0.0, blocks / wide, 0.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.reshape(padded.shape)[:rows, :cols], scales


def _quantize_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] to bytes [N, K / 2] and bf16 scales [N, K / 32]."""
    groups = w.view(w.shape[0], -1, INT4_GROUP)
    scales = _int4_scales(groups.movedim(-1, 0).contiguous())
    codes = (groups * _reciprocal_or_zero(scales).unsqueeze(-1)).clamp(-8.0, 7.0).round() + 8.0
    return pack_nibbles(codes.to(torch.uint8).flatten(-2)), scales.to(torch.bfloat16)


def _int4_scales(values: Tensor) -> Tensor:
    """The scale of each group, values [32, ..] fp32: a few positions of the extreme value, the best refined once.

    Sums run over the inputs in order, as the C++ does, so that ties and near ties fall alike.
    """
    extreme = torch.zeros_like(values[0])
    for value in values:
        extreme = torch.where(value.abs() > extreme.abs(), value, extreme)
    best = torch.zeros_like(extreme)
    least = torch.full_like(extreme, math.inf)
    refined = torch.zeros_like(extreme)
    for divisor in (7.0, 7.5, 8.0, 8.5, 9.0):
        scale = _to_bf16(extreme / -divisor)
        error, fit = _try_scale(values, scale)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        refined = torch.where(better, fit, refined)
    scale = _to_bf16(refined)
    error, _ = _try_scale(values, scale)
    return torch.where(error < least, scale, best)


def _try_scale(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of the groups under this scale, and the least-squares scale for the codes that it gives."""
    inverse = _reciprocal_or_zero(scale)
    error, dot, norm = (torch.zeros_like(scale) for _ in range(3))
    for value in values:
        code = (value * inverse).clamp(-8.0, 7.0).round()
        difference = value - code * scale
        error = error + difference * difference
        dot = dot + code * value
        norm = norm + code * code
    return error, torch.where(norm > 0.0, dot / norm, 0.0)


def _reciprocal_or_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() > 1e-37, 1.0 / scale, 0.0)


def _to_bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()


def _padded(w: Tensor, dim: int, multiple: int) -> Tensor:
    """w [N, K] with zeros up to a multiple in one dimension."""
    missing = -w.shape[dim] % multiple
    return torch.nn.functional.pad(w, (0, missing) if dim == 1 else (0, 0, 0, missing))
