"""Writes [c_kv | k_pe] of new tokens into the paged latent cache, one program per token."""

import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device
from moejet.kernels.latent_rows import row_constants, row_parts, store_c_kv, store_wide


@triton.jit
def _store_latent_kernel(
    c_kv_ptr, k_pe_ptr, slots_ptr, out_ptr, scales_ptr, out_pe_ptr,
    stride_ct, stride_pt, stride_out, stride_scales, stride_out_pe,
    ROPE: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, IS_FP8: tl.constexpr,
    GAP: tl.constexpr, TAIL: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        cols = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        c_kv = tl.load(c_kv_ptr + token * stride_ct + cols, mask=cols < RANK, other=0.0)
        store_c_kv(
            out_ptr, scales_ptr, c_kv.to(tl.float32), slot, stride_out, stride_scales,
            RANK, GROUPS, GROUP, IS_FP8, GAP, TAIL, ROW,
        )  # fmt: skip
        cols = tl.arange(0, BLOCK_R)
        k_pe = tl.load(k_pe_ptr + token * stride_pt + cols, mask=cols < ROPE, other=0.0)
        store_wide(out_pe_ptr + slot * stride_out_pe + cols, k_pe.to(tl.float32), cols < ROPE)


@on_own_device
def store_latent(c_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """c_kv [T, C] and k_pe [T, R], unit stride in the last dimension · slot_mapping [T], negative: not stored."""
    (num_tokens, rank), rope = c_kv.shape, k_pe.shape[1]
    assert c_kv.stride(1) == k_pe.stride(1) == 1, f"{c_kv.stride()=} {k_pe.stride()=}"
    assert slot_mapping.is_contiguous(), f"{slot_mapping.stride()=}"
    if num_tokens == 0:
        return
    parts = row_parts(latent_cache, rank, rope)
    _store_latent_kernel[(num_tokens,)](
        c_kv, k_pe, slot_mapping, *parts, c_kv.stride(0), k_pe.stride(0), *parts.strides,
        ROPE=rope, BLOCK_R=triton.next_power_of_2(rope), ROW=latent_cache.shape[-1],
        **row_constants(latent_cache, rank, rope),
    )  # fmt: skip
