"""ggml's tensor types: sizes of all, dequantisation of those that are read, and blocks taken apart for packing.

A quantised matrix stores each row as blocks of 32 or 256 weights; a block holds its own scales. With q the stored code,
d and m halves (fp16), and s small integers:

    Q8_0              w = d q,  q int8                            32 weights per d
    Q4_0, Q5_0        w = d (q - 8) or d (q - 16)                 32
    Q4_1, Q5_1        w = d q + m                                 32
    IQ4_NL            w = d table[q]                              32
    Q4_K, Q5_K        w = (d s) q - (dmin m)                      256 per d, 32 per 6-bit s and m
    Q6_K              w = (d s) (q - 32),  s int8                 256 per d, 16 per s
    Q2_K, Q3_K        w = (d s) q - (dmin m), (d s) (q - 4 or q)  256 per d, 16 per s
    IQ4_XS            w = (d s) table[q]                          256 per d, 32 per 6-bit s

Products are rounded to fp32 in the order of the brackets, as llama.cpp's reference does, so results are bit-exact.
Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TypeLayout:
    """`block_bytes` bytes hold `block_size` consecutive weights of a row."""

    name: str
    block_size: int
    block_bytes: int

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.block_size * self.block_bytes


# Number in the file -> layout, for every type that ggml still defines.
GGML_TYPES: dict[int, TypeLayout] = {
    number: TypeLayout(*layout)
    for number, layout in {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 40),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
    }.items()
}
LAYOUTS: dict[str, TypeLayout] = {layout.name: layout for layout in GGML_TYPES.values()}
_PREFIX = "GGUF:"
_PLAIN = ("F32", "F16", "BF16")
_IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Temporaries of one chunk stay within a few tens of MB.
_CHUNK_WEIGHTS = 1 << 22


def gguf_dtype(type_name: str) -> str:
    """How a ggml type is called in TensorInfo.dtype: "GGUF:Q4_K", but "BF16" where both formats agree."""
    return type_name if type_name in _PLAIN else _PREFIX + type_name


def layout_of(dtype: str) -> TypeLayout | None:
    """The layout behind a TensorInfo.dtype that `gguf_dtype` made; None for a dtype of safetensors."""
    return LAYOUTS[dtype.removeprefix(_PREFIX)] if dtype.startswith(_PREFIX) else None


def is_supported(dtype: str) -> bool:
    return dtype.removeprefix(_PREFIX) in SUPPORTED_TYPES


def dequantize(
    raw: Tensor, type_name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights of whole blocks, rounded once to `dtype` if that is not fp32.

    raw: contiguous uint8 of exactly `shape`'s blocks · returns a new tensor of `shape`. Works in chunks: besides the
    result it needs some tens of MB.
    """
    if type_name not in SUPPORTED_TYPES:
        raise ValueError(
            f"ggml type {type_name} is not supported; supported: {', '.join(SUPPORTED_TYPES)}"
        )
    layout = LAYOUTS[type_name]
    expected = layout.num_bytes(shape)
    if raw.dtype != torch.uint8 or raw.numel() != expected or shape[-1] % layout.block_size:
        raise ValueError(
            f"{type_name} {list(shape)} takes {expected} bytes of uint8 in whole blocks, not "
            f"{raw.numel()} of {raw.dtype}"
        )
    blocks = raw.reshape(-1, layout.block_bytes)
    out = torch.empty((blocks.shape[0], layout.block_size), dtype=dtype)
    decode = _DECODERS[type_name]
    step = _CHUNK_WEIGHTS // layout.block_size
    for first in range(0, blocks.shape[0], step):
        out[first : first + step] = decode(blocks[first : first + step])
    return out.view(shape)


# What a block is made of: codes [N, block_size], d [N, 1] fp16, scales, dmin, mins (None where the type has none).
_Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor, width: int) -> Tensor:
    """Low nibbles of `width` bytes, then their high ones, and so on: [N, B] -> [N, 2 B]."""
    groups = packed.reshape(packed.shape[0], -1, width)
    return torch.stack((groups & 15, groups >> 4), 2).flatten(1)


def _fields(packed: Tensor, width: int, bits: int) -> Tensor:
    """As `_nibbles` for fields of 1 or 2 bits: lowest bits of `width` bytes first."""
    groups = packed.reshape(packed.shape[0], -1, width)
    mask = (1 << bits) - 1
    return torch.stack([(groups >> shift) & mask for shift in range(0, 8, bits)], 2).flatten(1)


def _parts_q8_0(blocks: Tensor) -> _Parts:
    return blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0), None, None, None


def _parts_q4_0(blocks: Tensor) -> _Parts:
    return _nibbles(blocks[:, 2:], 16), _half(blocks, 0), None, None, None


def _parts_q4_k(blocks: Tensor) -> _Parts:
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    return _nibbles(blocks[:, 16:], 32), _half(blocks, 0), scales, _half(blocks, 2), mins


def _parts_q5_k(blocks: Tensor) -> _Parts:
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    high = _fields(blocks[:, 16:48], 32, 1)
    codes = _nibbles(blocks[:, 48:], 32) | (high << 4)
    return codes, _half(blocks, 0), scales, _half(blocks, 2), mins


def _parts_q6_k(blocks: Tensor) -> _Parts:
    codes = _nibbles(blocks[:, :128], 64) | (_fields(blocks[:, 128:192], 32, 2) << 4)
    return codes, _half(blocks, 208), blocks[:, 192:208].contiguous().view(torch.int8), None, None


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and mins from 12 bytes: four of each whole, four in nibbles plus two spare bits."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((a & 63, (c & 15) | ((a >> 6) << 4)), 1)
    mins = torch.cat((b & 63, (c >> 4) | ((b >> 6) << 4)), 1)
    return scales, mins


def _grouped(codes: Tensor, scale: Tensor, low: Tensor | None = None) -> Tensor:
    """codes [N, B] times scale [N, G], less low [N, G], each group of B / G with its own; fp32 [N, B]."""
    result = codes.float().view(codes.shape[0], scale.shape[1], -1) * scale[:, :, None]
    return (result if low is None else result.sub_(low[:, :, None])).flatten(1)


def _decode_parts(type_name: str) -> Callable[[Tensor], Tensor]:
    def decode(blocks: Tensor) -> Tensor:
        codes, d, scales, dmin, mins = _PARTS[type_name](blocks)
        if zero := _ZEROS.get(type_name):
            codes = codes.view(torch.int8) - zero
        scale = d.float() if scales is None else d.float() * scales.float()
        low = None if dmin is None or mins is None else dmin.float() * mins.float()
        return _grouped(codes, scale, low)

    return decode


def _decode_q4_1(blocks: Tensor) -> Tensor:
    return (
        _grouped(_nibbles(blocks[:, 4:], 16), _half(blocks, 0).float()) + _half(blocks, 2).float()
    )


def _five_bits(blocks: Tensor, at: int) -> Tensor:
    """Codes of Q5_0 and Q5_1: 32 high bits in four bytes, then nibbles."""
    high = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8)
    return _nibbles(blocks[:, at + 4 :], 16) | ((high & 1).flatten(1) << 4)


def _decode_q5_0(blocks: Tensor) -> Tensor:
    return _grouped(_five_bits(blocks, 2).view(torch.int8) - 16, _half(blocks, 0).float())


def _decode_q5_1(blocks: Tensor) -> Tensor:
    return _grouped(_five_bits(blocks, 4), _half(blocks, 0).float()) + _half(blocks, 2).float()


def _decode_q2_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, :16]
    scale = _half(blocks, 80).float() * (packed & 15).float()
    low = _half(blocks, 82).float() * (packed >> 4).float()
    return _grouped(_fields(blocks[:, 16:80], 32, 2), scale, low)


def _decode_q3_k(blocks: Tensor) -> Tensor:
    """The high bit counts inverted: where it is not set, 4 is subtracted."""
    scales = _nibbles(blocks[:, 96:104], 8) | (_fields(blocks[:, 104:108], 4, 2) << 4)
    absent = _fields(blocks[:, :32], 32, 1) ^ 1
    codes = _fields(blocks[:, 32:96], 32, 2).view(torch.int8) - (absent << 2).view(torch.int8)
    return _grouped(codes, _half(blocks, 108).float() * (scales.view(torch.int8) - 32).float())


def _from_table(codes: Tensor) -> Tensor:
    return torch.tensor(_IQ4_TABLE, dtype=torch.int8)[codes.int()]


def _decode_iq4_nl(blocks: Tensor) -> Tensor:
    return _grouped(_from_table(_nibbles(blocks[:, 2:], 16)), _half(blocks, 0).float())


def _decode_iq4_xs(blocks: Tensor) -> Tensor:
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).flatten(1)
    high = blocks[:, 2:4, None] >> torch.arange(0, 8, 2, dtype=torch.uint8)
    scales = (low | ((high & 3).flatten(1) << 4)).view(torch.int8) - 32
    codes = _from_table(_nibbles(blocks[:, 8:], 16))
    return _grouped(codes, _half(blocks, 0).float() * scales.float())


# What is subtracted from codes.
_ZEROS = {"Q4_0": 8, "Q6_K": 32}
_PARTS: dict[str, Callable[[Tensor], _Parts]] = {
    "Q4_0": _parts_q4_0,
    "Q8_0": _parts_q8_0,
    "Q4_K": _parts_q4_k,
    "Q5_K": _parts_q5_k,
    "Q6_K": _parts_q6_k,
}
_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda blocks: blocks.contiguous().view(torch.float32),
    "F16": lambda blocks: blocks.contiguous().view(torch.float16).float(),
    "BF16": lambda blocks: blocks.contiguous().view(torch.bfloat16).float(),
    **{name: _decode_parts(name) for name in _PARTS},
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "IQ4_NL": _decode_iq4_nl,
    "IQ4_XS": _decode_iq4_xs,
}
SUPPORTED_TYPES: tuple[str, ...] = tuple(n for n in LAYOUTS if n in _DECODERS)
