"""Rotary position embedding (arXiv 2104.09864); a program per token and block of heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device
from moejet.kernels.latent_rows import rotate_heads


@triton.jit
def _rope_kernel(
    x_ptr, cos_sin_ptr, out_ptr, stride_xt, stride_xh, stride_ct, stride_ot, stride_oh, num_heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    rotate_heads(
        x_ptr + token * stride_xt, out_ptr + token * stride_ot, cos_sin_ptr + token * stride_ct,
        stride_xh, stride_oh, tl.program_id(1) * BLOCK_H, num_heads,
        HALF, BLOCK_HALF, BLOCK_H, INTERLEAVE,
    )  # fmt: skip


def heads_per_program(num_heads: int, rope: int) -> int:
    """1024 elements with 4 warps are four pairs per thread: short programs, so that one token uses several SMs."""
    return min(triton.next_power_of_2(num_heads), max(1, 1024 // triton.next_power_of_2(rope)))


@on_own_device
def apply_rope(x: Tensor, cos_sin: Tensor, *, interleave: bool) -> Tensor:
    """x [T, R] or [T, H, R], any strides, unit in R · cos_sin [T, R] fp32. Returns x's shape and dtype, contiguous."""
    heads = x if x.dim() == 3 else x.unsqueeze(1)
    num_tokens, num_heads, rope = heads.shape
    assert cos_sin.shape == (num_tokens, rope), f"{cos_sin.shape=} {x.shape=}"
    assert rope % 2 == 0, f"{x.shape=}"
    assert x.stride(-1) == cos_sin.stride(-1) == 1, f"{x.stride()=}"
    out = torch.empty(heads.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        block = heads_per_program(num_heads, rope)
        _rope_kernel[(num_tokens, triton.cdiv(num_heads, block))](
            heads, cos_sin, out, heads.stride(0), heads.stride(1), cos_sin.stride(0),
            out.stride(0), out.stride(1), num_heads,
            HALF=rope // 2, BLOCK_HALF=triton.next_power_of_2(rope // 2), BLOCK_H=block,
            INTERLEAVE=interleave,
        )  # fmt: skip
    return out.view(x.shape)
