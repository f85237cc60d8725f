"""Everything between MLA's projections and its attention, in one launch.

Of each token: RMSNorm of c_kv, rotation of k_pe, both rounded into the token's row of the latent cache; rotation of
the rope part of every query head. The latent is one program and each block of heads another, so that a single token
keeps several multiprocessors busy. Unfused, this is four kernels and two more passes over the latent.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device
from moejet.kernels.latent_rows import (
    load_pairs,
    rotate,
    rotate_heads,
    row_constants,
    row_parts,
    store_c_kv,
    store_wide,
)
from moejet.kernels.rope import heads_per_program


@triton.jit
def _mla_prepare_kernel(
    latent_ptr, q_ptr, cos_sin_ptr, positions_ptr, weight_ptr, slots_ptr, q_out_ptr,
    out_ptr, scales_ptr, out_pe_ptr,
    stride_lt, stride_qt, stride_qh, stride_ct, stride_qot, stride_qoh,
    stride_out, stride_scales, stride_out_pe, num_heads, eps,
    HAS_POSITIONS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, INTERLEAVE: tl.constexpr,
    RANK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, IS_FP8: tl.constexpr,
    GAP: tl.constexpr, TAIL: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    angle_row = token
    if HAS_POSITIONS:
        angle_row = tl.load(positions_ptr + token).to(tl.int64)
    cos_sin_ptr += angle_row * stride_ct
    if block > 0:
        rotate_heads(
            q_ptr + token * stride_qt, q_out_ptr + token * stride_qot, cos_sin_ptr,
            stride_qh, stride_qoh, (block - 1) * BLOCK_H, num_heads,
            HALF, BLOCK_HALF, BLOCK_H, INTERLEAVE,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            latent_ptr += token * stride_lt
            cols = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            mask = cols < RANK
            c_kv = tl.load(latent_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(tl.sum(c_kv * c_kv, axis=1), axis=0)
            c_kv = c_kv * tl.rsqrt(squares / RANK + eps) * weight
            store_c_kv(
                out_ptr, scales_ptr, c_kv, slot, stride_out, stride_scales,
                RANK, GROUPS, GROUP, IS_FP8, GAP, TAIL, ROW,
            )  # fmt: skip
            pairs = tl.arange(0, BLOCK_HALF)
            mask = pairs < HALF
            cos = tl.load(cos_sin_ptr + pairs, mask=mask, other=0.0)
            sin = tl.load(cos_sin_ptr + HALF + pairs, mask=mask, other=0.0)
            first, second = load_pairs(latent_ptr + RANK, pairs, mask, HALF, INTERLEAVE)
            first, second = rotate(first, second, cos, sin)
            out_pe_ptr += slot * stride_out_pe
            store_wide(out_pe_ptr + pairs, first, mask)
            store_wide(out_pe_ptr + HALF + pairs, second, mask)


@on_own_device
def mla_prepare(
    latent: Tensor,
    q_pe: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleave: bool,
    q_pe_out: Tensor | None,
) -> Tensor:
    """See `moejet.ops.mla_prepare`. Unit stride in every last dimension; norm_weight and index tensors contiguous."""
    num_tokens, num_heads, rope = q_pe.shape
    rank = norm_weight.shape[0]
    assert latent.shape == (num_tokens, rank + rope), f"{latent.shape=} {rank=} {q_pe.shape=}"
    assert cos_sin.shape[1] == rope, f"{cos_sin.shape=}"
    assert cos_sin.stride(1) == 1, f"{cos_sin.stride()=}"
    assert positions is not None or cos_sin.shape[0] == num_tokens, f"{cos_sin.shape=}"
    assert latent.stride(1) == q_pe.stride(2) == norm_weight.stride(0) == 1, f"{q_pe.stride()=}"
    assert slot_mapping.is_contiguous(), f"{slot_mapping.stride()=}"
    assert positions is None or positions.is_contiguous(), f"{positions.stride()=}"
    if q_pe_out is None:
        q_pe_out = torch.empty(q_pe.shape, dtype=q_pe.dtype, device=q_pe.device)
    assert q_pe_out.shape == q_pe.shape, f"{q_pe_out.shape=}"
    assert q_pe_out.stride(2) == 1, f"{q_pe_out.stride()=}"
    if num_tokens == 0:
        return q_pe_out
    parts = row_parts(latent_cache, rank, rope)
    block = heads_per_program(num_heads, rope)
    _mla_prepare_kernel[(num_tokens, 1 + triton.cdiv(num_heads, block))](
        latent, q_pe, cos_sin, positions, norm_weight, slot_mapping, q_pe_out, *parts,
        latent.stride(0), q_pe.stride(0), q_pe.stride(1), cos_sin.stride(0),
        q_pe_out.stride(0), q_pe_out.stride(1), *parts.strides, num_heads, eps,
        HAS_POSITIONS=positions is not None, HALF=rope // 2,
        BLOCK_HALF=triton.next_power_of_2(rope // 2), BLOCK_H=block, INTERLEAVE=interleave,
        ROW=latent_cache.shape[-1], **row_constants(latent_cache, rank, rope),
    )  # fmt: skip
    return q_pe_out
