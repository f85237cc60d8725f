"""Gathers rows of the paged latent cache into contiguous c_kv and k_pe, dequantising fp8 rows.

Bound by bandwidth: a row is read once (656 bytes as fp8, 1152 as bf16 for C = 512, R = 64) and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import MAX_GRID_Y, on_own_device
from moejet.latent_layout import GROUP, scales_begin, scales_end

_ROWS = 8  # per program: 16 values per thread for C = 512, four loads of 16 bytes of bf16 in flight


@triton.jit
def decode_e4m3(code):
    """Values of e4m3 codes, fp32; exact for all of them, with integer arithmetic that every card has."""
    code = code.to(tl.int32)
    exponent = (code >> 3) & 15
    fraction = (code & 7) + tl.where(exponent > 0, 8, 0)
    # fraction * 2^(exponent - 10) with the code's sign; a subnormal's exponent counts as 1
    power = ((tl.maximum(exponent, 1) + 117) << 23) | ((code & 128) << 24)
    value = fraction.to(tl.float32) * power.to(tl.float32, bitcast=True)
    return tl.where((code & 127) == 127, float("nan"), value)


@triton.jit(do_not_specialize=["stride_table"])
def _gather_kernel(
    cache_ptr, scales_ptr, pe_ptr, tables_ptr, pieces_ptr, c_kv_ptr, k_pe_ptr,
    stride_block, stride_row, stride_scales_block, stride_scales_row, stride_pe_block, stride_pe_row,
    stride_table, block_size,
    RANK: tl.constexpr, ROPE: tl.constexpr, GROUP: tl.constexpr, FP8: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    piece_ptr = pieces_ptr + tl.program_id(1) * 8
    request = tl.load(piece_ptr)
    first_row = tl.load(piece_ptr + 3)
    num_keys = tl.load(piece_ptr + 4)
    first_key = tl.load(piece_ptr + 5)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < num_keys
    position = first_key + rows
    table = tables_ptr + request.to(tl.int64) * stride_table
    block = tl.load(table + position // block_size, mask=real, other=0).to(tl.int64)
    slot = (position % block_size).to(tl.int64)
    out_row = (first_row + rows).to(tl.int64)

    # [rows, groups, values of a group]: one scale is loaded per group
    WIDTH: tl.constexpr = min(GROUP, BLOCK_C)
    groups = tl.arange(0, BLOCK_C // WIDTH)
    cols = groups[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = real[:, None, None] & (cols[None, :, :] < RANK)
    offset = block * stride_block + slot * stride_row
    c_kv = tl.load(cache_ptr + offset[:, None, None] + cols[None, :, :], mask=mask, other=0)
    if FP8:
        offset = block * stride_scales_block + slot * stride_scales_row
        scale = tl.load(
            scales_ptr + offset[:, None] + groups[None, :],
            mask=real[:, None] & (groups[None, :] * WIDTH < RANK),
            other=0.0,
        )
        c_kv = decode_e4m3(c_kv) * scale[:, :, None]
    c_kv = c_kv.to(c_kv_ptr.dtype.element_ty)
    tl.store(c_kv_ptr + out_row[:, None, None] * RANK + cols[None, :, :], c_kv, mask=mask)

    cols = tl.arange(0, BLOCK_R)
    mask = real[:, None] & (cols[None, :] < ROPE)
    offset = block * stride_pe_block + slot * stride_pe_row
    k_pe = tl.load(pe_ptr + offset[:, None] + cols[None, :], mask=mask, other=0.0)
    k_pe = k_pe.to(k_pe_ptr.dtype.element_ty)
    tl.store(k_pe_ptr + out_row[:, None] * ROPE + cols[None, :], k_pe, mask=mask)


@on_own_device
def gather_latent(
    latent_cache: Tensor,
    block_tables: Tensor,
    pieces: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    *,
    max_keys: int,
) -> None:
    """Fills c_kv [K, C] and k_pe [K, R] (contiguous, one dtype) with the keys of P pieces.

    latent_cache [blocks, S, row], rows as in `moejet.latent_layout` with adjacent elements
    block_tables [B, max_blocks] i32 or i64 · pieces [P, 8] i32 as for `mla_prefill`, P <= 65535 ·
    max_keys >= all of their column 4
    """
    rank, rope = c_kv.shape[1], k_pe.shape[1]
    assert c_kv.is_contiguous(), f"{c_kv.stride()=}"
    assert k_pe.is_contiguous(), f"{k_pe.stride()=}"
    assert latent_cache.stride(2) == 1, f"{latent_cache.stride()=}"
    assert block_tables.stride(1) == 1, f"{block_tables.stride()=}"
    assert pieces.is_contiguous(), f"{pieces.stride()=}"
    assert pieces.shape[0] <= MAX_GRID_Y, f"{pieces.shape=}"
    if max_keys == 0 or pieces.shape[0] == 0:
        return
    fp8 = latent_cache.dtype == torch.uint8
    if fp8:
        scales = latent_cache.view(torch.float32)[..., scales_begin(rank) // 4 :]
        pe = latent_cache.view(torch.bfloat16)[..., scales_end(rank) // 2 :]
    else:
        scales, pe = latent_cache, latent_cache[..., rank:]
    _gather_kernel[(triton.cdiv(max_keys, _ROWS), pieces.shape[0])](
        latent_cache, scales, pe, block_tables, pieces, c_kv, k_pe,
        latent_cache.stride(0), latent_cache.stride(1), scales.stride(0), scales.stride(1),
        pe.stride(0), pe.stride(1), block_tables.stride(0), latent_cache.shape[1],
        RANK=rank, ROPE=rope, GROUP=GROUP, FP8=fp8,
        BLOCK_C=triton.next_power_of_2(rank), BLOCK_R=triton.next_power_of_2(rope), ROWS=_ROWS,
        num_warps=8,
    )  # fmt: skip
