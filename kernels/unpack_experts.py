"""Packed experts (csrc/pack.h) into slots of the GPU's layout.

A program has one panel of 16 rows and some inputs of one expert. In a panel, 32 bits of each row lie side by side, in
GPU weights the bits of a row do: what changes places is words, four bytes each, wherever rows are whole words. Loads
run along the panel, stores along the rows; the compiler puts shared memory between.

int4_g32: a word of eight codes is made of two, four low or four high halves of each. fp8: the two middle bytes of a
word change places. Formats that a GPU does not have are dequantised and quantised to int8, 128 inputs at a time; all
of it happens in fp32 and with the roundings of `weights.gpu_weights.quantize`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device
from moejet.kernels.weight_tiles import repeat_columns
from moejet.weights.gpu_weights import GpuWeights
from moejet.weights.packed_layout import BLOCKS, PANEL_ROWS, PackedLayout

_TILE_BYTES = 512  # of a row, for one program
# (v + this) - this is v rounded to an integer, half to even.
ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _matrix_row(pair, panel, ALTERNATE: tl.constexpr):
    """(matrix of the expert, its row) where a panel begins."""
    if ALTERNATE:
        return panel, pair * 16
    return panel * 0, pair * 32 + panel * 16


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _rearrange_kernel(
    packed_ptr, words_ptr, codes_ptr, scales_ptr, slots_ptr,
    slice_words, begin_words, first_pair, rows, row_units, row_scales, chunks, pair_words,
    stride_cs, stride_cw, stride_cn, stride_ss, stride_sw, stride_sn,
    FORMAT: tl.constexpr, ALTERNATE: tl.constexpr, UNIT: tl.constexpr,
    ROW_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """packed in units of UNIT bytes, words in 32 bits. ROW_WORDS: of a row in a block, as the GPU has it."""
    chunk = tl.program_id(0) % chunks
    panel = tl.program_id(0) // chunks % 2
    pair = tl.program_id(0) // chunks // 2
    base = (
        tl.program_id(1).to(tl.int64) * slice_words + begin_words + pair.to(tl.int64) * pair_words
    )
    if FORMAT == "fp8":
        base_codes = base + 16 + panel * 512
    else:
        base += panel * BLOCK_WORDS
        base_codes = base
    r = tl.arange(0, 16)
    slot = tl.load(slots_ptr + tl.program_id(1)).to(tl.int64)
    matrix, first_row = _matrix_row(first_pair + pair, panel, ALTERNATE)
    row = first_row + r
    row_mask = (row < rows)[:, None]

    TILE: tl.constexpr = TILE_BLOCKS * ROW_WORDS * 4 // UNIT
    unit = chunk * TILE + tl.arange(0, TILE)
    word = unit * UNIT // 4
    vector = word % ROW_WORDS
    mask = row_mask & (unit < row_units)[None, :]
    if FORMAT == "int4_g32":
        # Of four words of a group, the inputs 4 v .. 4 v + 3 and 16 further.
        at = base + word // ROW_WORDS * (2 * BLOCK_WORDS) + vector % 4 * 16
        low = tl.load(packed_ptr + (at[None, :] + r[:, None]), mask=mask, other=0)
        high = tl.load(packed_ptr + (at[None, :] + r[:, None] + 64), mask=mask, other=0)
        first = (low & 0x0F0F0F0F) | ((high & 0x0F0F0F0F) << 4)
        second = ((low >> 4) & 0x0F0F0F0F) | (high & -0x0F0F0F10)
        codes = tl.where((vector < 4)[None, :], first, second)
    else:
        at = base_codes + word // ROW_WORDS * (2 * BLOCK_WORDS) + vector * 16
        at = (at[None, :] + r[:, None]) * (4 // UNIT)
        if UNIT == 4:
            codes = tl.load(packed_ptr + at, mask=mask, other=0)
            if FORMAT == "fp8":
                middle = ((codes >> 8) & 0x0000FF00) | ((codes << 8) & 0x00FF0000)
                codes = (codes & -0x00FFFF01) | middle
        else:
            byte = unit % 4
            if FORMAT == "fp8":
                byte = 2 * (byte % 2) + byte // 2
            codes = tl.load(packed_ptr + (at + byte[None, :]), mask=mask, other=0)
    to = slot * stride_cs + matrix * stride_cw + row.to(tl.int64) * stride_cn
    tl.store(codes_ptr + (to[:, None] + unit[None, :]), codes, mask=mask)

    block = chunk * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    scales_to = slot * stride_ss + matrix * stride_sw
    if FORMAT == "fp8":
        # One of a whole block of 128 rows: its first panel brings it.
        own = block < tl.where((first_row % 128 == 0) & (first_row < rows), row_scales, 0)
        scale = tl.load(words_ptr + (base + panel * 8 + block * (2 * BLOCK_WORDS)), mask=own)
        tl.store(scales_ptr + (scales_to + first_row // 128 * stride_sn + block), scale, mask=own)
    elif FORMAT == "int8":
        own = row_mask & (block < row_scales)[None, :]
        at = base + 512 + block[None, :] * (2 * BLOCK_WORDS) + r[:, None]
        to = scales_to + row.to(tl.int64)[:, None] * stride_sn + block[None, :]
        tl.store(scales_ptr + to, tl.load(words_ptr + at, mask=own), mask=own)
    elif FORMAT == "int4_g32":
        group = chunk * (2 * TILE_BLOCKS) + tl.arange(0, 2 * TILE_BLOCKS)
        own = row_mask & (group < row_scales)[None, :]
        at = base + 128 + (group // 2)[None, :] * (2 * BLOCK_WORDS) + r[:, None]
        both = tl.load(words_ptr + at, mask=own, other=0)
        scale = (both >> (16 * (group % 2))[None, :]).to(tl.int16)
        to = scales_to + row.to(tl.int64)[:, None] * stride_sn + group[None, :]
        tl.store(scales_ptr + to, scale, mask=own)


@triton.jit
def _halves(bytes_ptr, at, mask):
    """fp16 at these offsets, in fp32."""
    low = tl.load(bytes_ptr + at, mask=mask, other=0).to(tl.uint16)
    high = tl.load(bytes_ptr + at + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scales_45_k(bytes_ptr, at, group, mask):
    """(sc, m) of groups [16, G], the 12 bytes of row r from `at` [16, 1] on in lanes of 64-byte vectors."""
    i = group % 4
    s = tl.load(bytes_ptr + (at + i), mask=mask, other=0).to(tl.int32)
    m = tl.load(bytes_ptr + (at + 64 + i), mask=mask, other=0).to(tl.int32)
    both = tl.load(bytes_ptr + (at + 128 + i), mask=mask, other=0).to(tl.int32)
    scale = tl.where(group < 4, s & 63, (both & 15) | ((s >> 6) << 4))
    least = tl.where(group < 4, m & 63, (both >> 4) | ((m >> 6) << 4))
    return scale.to(tl.float32), least.to(tl.float32)


@triton.jit
def _codes(bytes_ptr, block, r, g, i, mask, FORMAT: tl.constexpr):
    """Codes of the inputs i of group g (both [1, 128]) of rows r [16, 1] of the panel block at `block`."""
    lane = 4 * r + i % 4
    v = i // 4
    if FORMAT == "q8_0":
        at = block + 128 * v + 64 * g + lane
        return tl.load(bytes_ptr + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
    if FORMAT == "q4_0" or FORMAT == "int4_g32":
        at = 64 * v
        shift = 4 * (g % 2)
    elif FORMAT == "q4_k":
        at = 256 + 512 * (g // 2) + 64 * v
        shift = 4 * (g % 2)
    elif FORMAT == "q5_k":
        at = tl.where(g < 2, 320 + 128 * v, 768 + 512 * (g // 2) + 64 * v)
        shift = 4 * (g % 2)
        plane = 256 + 128 * v
        bit = g
    else:
        at = 320 + 1536 * (g // 4) + tl.where(g % 2 == 0, 128 * v, 1024 + 64 * v)
        shift = 4 * (g % 4 // 2)
        plane = 384 + 1536 * (g // 4) + 128 * v
        bit = 2 * (g % 4)
    codes = tl.load(bytes_ptr + (block + at + lane), mask=mask, other=0).to(tl.int32)
    codes = (codes >> shift) & 15
    if FORMAT == "q5_k" or FORMAT == "q6_k":
        upper = tl.load(bytes_ptr + (block + plane + lane), mask=mask, other=0).to(tl.int32)
        upper = (upper >> bit) & (1 if FORMAT == "q5_k" else 3)
        codes |= upper << 4
    return codes


@triton.jit
def _values(
    bytes_ptr, base, r, first, cols, row_mask, FORMAT: tl.constexpr, BLOCK_BYTES: tl.constexpr
):
    """fp32 [16, 128] of the inputs from `first` on, zeros beyond the matrix; base: of the panel's first block."""
    INPUTS: tl.constexpr = (
        256
        if FORMAT == "q4_k" or FORMAT == "q5_k" or FORMAT == "q6_k"
        else 32
        if FORMAT == "fp32"
        else 64
    )
    k = first + tl.arange(0, 128)[None, :]
    mask = row_mask & (k < cols)
    block = base + k // INPUTS * (2 * BLOCK_BYTES)
    if FORMAT == "fp32":
        words_ptr = bytes_ptr.to(tl.pointer_type(tl.float32))
        return tl.load(words_ptr + (block // 4 + k % 32 * 16 + r), mask=mask, other=0.0)
    codes = _codes(bytes_ptr, block, r, k % INPUTS // 32, k % 32, mask, FORMAT)
    group = first // 32 + tl.arange(0, 4)[None, :]
    groups_mask = row_mask & (group * 32 < cols)
    block = base + group * 32 // INPUTS * (2 * BLOCK_BYTES)
    group %= INPUTS // 32
    if FORMAT == "int4_g32":
        at = block + 512 + 4 * r + 2 * group
        low = tl.load(bytes_ptr + at, mask=groups_mask, other=0).to(tl.uint32)
        high = tl.load(bytes_ptr + at + 1, mask=groups_mask, other=0).to(tl.uint32)
        d = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
        values = (codes - 8).to(tl.float32) * repeat_columns(d, 32)
    elif FORMAT == "q4_0" or FORMAT == "q8_0":
        d = _halves(bytes_ptr, block + BLOCK_BYTES - 64 + 32 * group + 2 * r, groups_mask)
        if FORMAT == "q4_0":
            codes -= 8
        values = codes.to(tl.float32) * repeat_columns(d, 32)
    elif FORMAT == "q6_k":
        d = _halves(bytes_ptr, block + 2 * r, groups_mask)
        part = tl.arange(0, 8)[None, :]
        number = (first // 16 + part) % 16
        at = base + first // 256 * (2 * BLOCK_BYTES) + 64 + 64 * (number // 4) + 4 * r + number % 4
        scale = tl.load(bytes_ptr + at, mask=row_mask & (first + 16 * part < cols), other=0)
        scale = scale.to(tl.int8, bitcast=True).to(tl.float32) * repeat_columns(d, 2)
        values = (codes - 32).to(tl.float32) * repeat_columns(scale, 16)
    else:
        scale, least = _scales_45_k(bytes_ptr, block + 64 + 4 * r, group, groups_mask)
        scale *= _halves(bytes_ptr, block + 2 * r, groups_mask)
        least *= _halves(bytes_ptr, block + 32 + 2 * r, groups_mask)
        # Products are exact, so that a fused subtraction rounds alike.
        values = codes.to(tl.float32) * repeat_columns(scale, 32) - repeat_columns(least, 32)
    return tl.where(mask, values, 0.0)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _requantise_kernel(
    bytes_ptr, codes_ptr, scales_ptr, slots_ptr,
    slice_bytes, begin_bytes, first_pair, rows, cols, groups, pair_bytes,
    stride_cs, stride_cw, stride_cn, stride_ss, stride_sw, stride_sn,
    FORMAT: tl.constexpr, ALTERNATE: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % groups
    panel = tl.program_id(0) // groups % 2
    pair = tl.program_id(0) // groups // 2
    base = (
        tl.program_id(1).to(tl.int64) * slice_bytes + begin_bytes + pair.to(tl.int64) * pair_bytes
    )
    base += panel * BLOCK_BYTES
    r = tl.arange(0, 16)
    slot = tl.load(slots_ptr + tl.program_id(1)).to(tl.int64)
    matrix, first_row = _matrix_row(first_pair + pair, panel, ALTERNATE)
    row = first_row + r
    values = _values(
        bytes_ptr, base, r[:, None], group * 128, cols, (row < rows)[:, None], FORMAT, BLOCK_BYTES
    )
    scale = tl.div_rn(tl.max(tl.abs(values), axis=1), 127.0)
    some = scale > 1e-37
    inverse = tl.where(some, tl.div_rn(1.0, tl.where(some, scale, 1.0)), 0.0)
    codes = tl.minimum(tl.maximum(values * inverse[:, None], -127.0), 127.0)
    codes = ((codes + ROUND) - ROUND).to(tl.int32).to(tl.int8)
    k = group * 128 + tl.arange(0, 128)
    to = slot * stride_cs + matrix * stride_cw + row.to(tl.int64) * stride_cn
    mask = (row < rows)[:, None] & (k < cols)[None, :]
    tl.store(codes_ptr + (to[:, None] + k[None, :]), codes, mask=mask)
    to = slot * stride_ss + matrix * stride_sw + row.to(tl.int64) * stride_sn + group
    tl.store(scales_ptr + to, scale, mask=row < rows)


@on_own_device
def unpack_experts(
    packed: Tensor, slots: Tensor, layout: PackedLayout, gate_up: GpuWeights, down: GpuWeights
) -> None:
    """Sets slots from packed bytes; see `moejet.ops.unpack_experts`."""
    assert packed.device.type == "meta" or packed.data_ptr() % 64 == 0, "packed is not aligned"
    count, begin = slots.shape[0], 0
    for part in layout.slices:
        at = begin
        for format, target, (first, end), size in (
            (layout.format, gate_up, part.gate_up, layout.gate_up_pair_bytes),
            (layout.down_format, down, part.down, layout.down_pair_bytes),
        ):
            where = (at, part.nbytes, first, end - first, size)
            if end > first:
                _unpack(packed, slots, format, target, where)
            at += (end - first) * size
        begin += count * part.nbytes


def _unpack(
    packed: Tensor, slots: Tensor, format: str, target: GpuWeights, where: tuple[int, ...]
) -> None:
    """where: the first pair's place and the distance of experts, the pair's number, how many pairs, and their size."""
    begin, slice_bytes, first, pairs, pair_bytes = where
    rows, cols = target.shape[-2:]
    alternate = len(target.shape) == 4
    block = BLOCKS[format]
    if format != target.format:
        groups = triton.cdiv(cols, 128)
        _requantise_kernel[(pairs * 2 * groups, slots.shape[0])](
            packed, target.codes, target.scales, slots,
            slice_bytes, begin, first, rows, cols, groups, pair_bytes,
            *_strides(target.codes), *_strides(target.scales),
            FORMAT=format, ALTERNATE=alternate, BLOCK_BYTES=block.nbytes, num_warps=4,
        )  # fmt: skip
        return
    # Integers of the same size in place of floats: nothing is to be rounded.
    row_bytes = target.codes.shape[-1] * target.codes.element_size()
    unit = 1 if row_bytes % 4 else 4
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    codes, scales = target.codes.view(kinds[unit]), target.scales
    if scales is not None:
        scales = scales.view(kinds[scales.element_size()])
    row_words = {"bf16": 16, "int4_g32": 8}.get(format, 32)
    tile_blocks = _TILE_BYTES // (4 * row_words)
    chunks = triton.cdiv(row_bytes, _TILE_BYTES)
    words = packed.view(torch.int32)
    _rearrange_kernel[(pairs * 2 * chunks, slots.shape[0])](
        packed if unit == 1 else words, words, codes, scales, slots,
        slice_bytes // 4, begin // 4, first, rows, row_bytes // unit,
        0 if scales is None else scales.shape[-1], chunks, pair_bytes // 4,
        *_strides(codes), *_strides(scales),
        FORMAT=format, ALTERNATE=alternate, UNIT=unit,
        ROW_WORDS=row_words, BLOCK_WORDS=block.nbytes // 4, TILE_BLOCKS=tile_blocks, num_warps=4,
    )  # fmt: skip


def _strides(part: Tensor | None) -> tuple[int, int, int]:
    """From slot to slot, from gate to up, and from row to row."""
    if part is None:
        return 0, 0, 0
    strides = part.stride()[:-1]
    return (strides[0], strides[1] if len(strides) == 3 else 0, strides[-1])


assert PANEL_ROWS == 16
