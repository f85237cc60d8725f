"""Rotary position embedding (arXiv 2104.09864) with YaRN frequencies (arXiv 2309.00071).

Pair i of a head is rotated by the angle position * inv_freq[i]. Interleaved checkpoints (all of DeepSeek's) keep the
pair in neighbouring elements (2i, 2i+1), the others in (i, i + R/2). Either way the result is written as two halves:
queries and keys share the order, so their dot products do not see it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.extension import load_extension
from moejet.ops.native import check_tensor, cpu_isa, runs_native
from moejet.rope_config import RopeConfig

_MAX_NATIVE_DIM = 512


def rope_inv_freq(rope: RopeConfig, dim: int) -> Tensor:
    """Angular frequency per rotated pair, [dim / 2] fp32.

    YaRN keeps pairs that turn at least beta_fast times within the original context, divides the frequency of those
    below beta_slow turns by `factor`, and blends linearly in between.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    extrapolated = 1.0 / (rope.theta**exponent)
    if rope.type == "default":
        return extrapolated

    def pair_with_turns(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return extrapolated / rope.factor * ramp + extrapolated * (1 - ramp)


def rope_table(rope: RopeConfig, dim: int, num_positions: int) -> Tensor:
    """cos and sin of every position, [num_positions, dim] fp32: cos in the first half of a row, sin in the second."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), rope_inv_freq(rope, dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.cos_sin_scale


def apply_rope(x: Tensor, cos_sin: Tensor, *, interleave: bool) -> Tensor:
    """Rotates x by its tokens' angles, in fp32.

    x [T, R] or [T, H, R] · cos_sin [T, R] rows of `rope_table`. Returns x's shape and dtype, rotated halves in order.
    """
    if x.is_cuda and not use_reference():
        from moejet.kernels.rope import apply_rope as launch

        return launch(x, cos_sin, interleave=interleave)
    if x.dim() not in (2, 3) or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}, expected [T, R] or [T, H, R] with R even")
    if x.shape[-1] > _MAX_NATIVE_DIM or not runs_native(x, cos_sin):
        check_tensor("cos_sin", cos_sin, (x.shape[0], x.shape[-1]), x)
        return apply_rope_ref(x, cos_sin, interleave=interleave)
    out = torch.empty(x.shape, dtype=torch.float32)
    heads = (x, out) if x.dim() == 3 else (x.unsqueeze(1), out.unsqueeze(1))
    load_extension().rope(heads[0], cos_sin, interleave, heads[1], isa=cpu_isa())
    return out


def apply_rope_ref(x: Tensor, cos_sin: Tensor, *, interleave: bool) -> Tensor:
    """Torch reference of `apply_rope`."""
    half = x.shape[-1] // 2
    cos, sin = cos_sin[:, :half], cos_sin[:, half:]
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    wide = x.float()
    if interleave:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide[..., :half], wide[..., half:]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
