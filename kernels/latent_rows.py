"""Rows of the latent cache (`moejet.latent_layout`) and rotated pairs: what the kernels that write them share.

Rounding to bf16 and e4m3 is integer arithmetic: cards before SM89 have no e4m3 conversion, and the codes are then the
same bits on every card, under the interpreter and in `moejet.ops.latent_rows`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.latent_layout import GROUP, scales_begin, scales_end


class RowParts(NamedTuple):
    """Views [slots, ..] of a cache whose columns begin with c_kv, with the scales (fp8 only) and with k_pe.

    bf16 parts are int16: kernels store rounded bits.
    """

    c_kv: Tensor
    scales: Tensor
    k_pe: Tensor

    @property
    def strides(self) -> tuple[int, int, int]:
        """Elements of each part's type from one slot to the next."""
        return self.c_kv.stride(0), self.scales.stride(0), self.k_pe.stride(0)


def row_parts(latent_cache: Tensor, rank: int, rope: int) -> RowParts:
    """latent_cache [N, S, row] contiguous, fp32, bf16 or uint8 (fp8 rows)."""
    assert latent_cache.is_contiguous(), f"{latent_cache.stride()=}"
    rows = latent_cache.view(-1, latent_cache.shape[-1])
    if rows.dtype == torch.uint8:
        end = scales_end(rank)
        scales = rows.view(torch.float32)[:, scales_begin(rank) // 4 :]
        return RowParts(rows, scales, rows.view(torch.int16)[:, end // 2 :])
    assert rows.shape[1] == rank + rope, f"{latent_cache.shape=} {rank=} {rope=}"
    if rows.dtype == torch.bfloat16:
        rows = rows.view(torch.int16)
    return RowParts(rows, rows, rows[:, rank:])


def row_constants(latent_cache: Tensor, rank: int, rope: int) -> dict[str, int | bool]:
    """Constants of `store_c_kv` and of its tile: GAP and TAIL are bytes of padding in an fp8 row, which are zeroed."""
    is_fp8 = latent_cache.dtype == torch.uint8
    used = scales_end(rank) + 2 * rope
    return {
        "RANK": rank,
        "GROUPS": triton.next_power_of_2(triton.cdiv(rank, GROUP)),
        "GROUP": GROUP,
        "IS_FP8": is_fp8,
        "GAP": scales_begin(rank) - rank if is_fp8 else 0,
        "TAIL": latent_cache.shape[-1] - used if is_fp8 else 0,
    }


@triton.jit
def bf16_bits(x):
    """fp32 rounded to nearest even, as int16; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def e4m3_bits(x):
    """Finite fp32 rounded to nearest even e4m3 (exponents biased by 7, no infinity), saturating at 448, as uint8."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 bits of the mantissa go; exponents are rebiased from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count 2^-9, which is the last place of numbers from 2^14 on: the addition rounds.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_wide(ptrs, x, mask):
    """fp32 values as fp32, or as bf16 bits where the pointer is one of int16."""
    if ptrs.dtype.element_ty == tl.int16:
        tl.store(ptrs, bf16_bits(x), mask=mask)
    else:
        tl.store(ptrs, x, mask=mask)


@triton.jit
def store_c_kv(
    row_ptr, scales_ptr, c_kv, slot, stride_cs, stride_ss,
    RANK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, IS_FP8: tl.constexpr,
    GAP: tl.constexpr, TAIL: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """c_kv fp32 [GROUPS, GROUP], zero beyond RANK, to the slot's row of ROW elements."""
    groups = tl.arange(0, GROUPS)
    cols = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row_ptr += slot * stride_cs
    if IS_FP8:
        # Magnitudes as integers order NaN above infinity above the rest.
        bits = tl.max(c_kv.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        largest = bits.to(tl.float32, bitcast=True)
        finite = bits < 0x7F800000
        scales = tl.where(
            largest < 1e-30, 0.0, tl.div_rn(largest, tl.full([GROUPS], 448.0, tl.float32))
        )
        usable = finite & (scales > 0.0)
        divisors = tl.where(usable, scales, 1.0)[:, None]
        ratios = tl.div_rn(c_kv, tl.broadcast_to(divisors, [GROUPS, GROUP]))
        ratios = tl.where(usable[:, None], ratios, 0.0)
        tl.store(row_ptr + cols, e4m3_bits(ratios), mask=cols < RANK)
        scales = tl.where(finite, scales, float("nan"))
        tl.store(scales_ptr + slot * stride_ss + groups, scales, mask=groups * GROUP < RANK)
        padding = tl.arange(0, 16)
        zeros = tl.zeros([16], tl.uint8)
        if GAP > 0:
            tl.store(row_ptr + RANK + padding, zeros, mask=padding < GAP)
        if TAIL > 0:
            tl.store(row_ptr + ROW - TAIL + padding, zeros, mask=padding < TAIL)
    else:
        store_wide(row_ptr + cols, c_kv, cols < RANK)


@triton.jit
def load_pairs(ptrs, pairs, mask, HALF: tl.constexpr, INTERLEAVE: tl.constexpr):
    """Both members of the pairs that a rotation turns, fp32."""
    if INTERLEAVE:
        first, second = ptrs + 2 * pairs, ptrs + 2 * pairs + 1
    else:
        first, second = ptrs + pairs, ptrs + HALF + pairs
    return (
        tl.load(first, mask=mask, other=0.0).to(tl.float32),
        tl.load(second, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def rotate(first, second, cos, sin):
    """One pair turned by one angle; the results are elements i and i + HALF."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotate_heads(
    x_ptr, out_ptr, cos_sin_ptr, stride_xh, stride_oh, first_head, num_heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token; pointers are the token's. In place works: all is read before any is written."""
    pairs = tl.arange(0, BLOCK_HALF)
    heads = first_head + tl.arange(0, BLOCK_H)
    cos = tl.load(cos_sin_ptr + pairs, mask=pairs < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + HALF + pairs, mask=pairs < HALF, other=0.0)[None, :]
    mask = (heads < num_heads)[:, None] & (pairs < HALF)[None, :]
    rows = x_ptr + heads[:, None] * stride_xh
    first, second = load_pairs(rows, pairs[None, :], mask, HALF, INTERLEAVE)
    first, second = rotate(first, second, cos, sin)
    tl.debug_barrier()
    out = out_ptr + heads[:, None] * stride_oh + pairs[None, :]
    tl.store(out, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)
