"""Rows of the latent cache in torch (`moejet.latent_layout`): the reference of what the kernels store and read.

An fp8 value is code * scale with scale = (largest magnitude of the group) / 448, codes rounded to nearest even. A group
with NaN or infinity gets a NaN scale, so that nothing computed from it is finite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.latent_layout import GROUP, row_bytes, scales_begin, scales_end

CACHE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}

_MAX_CODE = 448.0
_MIN_AMAX = 1e-30  # groups below it are zero


def encode_latents(c_kv: Tensor, k_pe: Tensor, dtype: torch.dtype) -> Tensor:
    """c_kv [..., C] and k_pe [..., R] fp32 as rows of a cache of this dtype."""
    if dtype != torch.uint8:
        return torch.cat((c_kv.to(dtype), k_pe.to(dtype)), dim=-1)
    rank, rope = c_kv.shape[-1], k_pe.shape[-1]
    codes, scales = _quantise(c_kv)
    row = c_kv.new_zeros(*c_kv.shape[:-1], row_bytes(rank, rope, "fp8"), dtype=torch.uint8)
    row[..., :rank] = codes
    begin, end = scales_begin(rank), scales_end(rank)
    row[..., begin:end] = scales.view(torch.uint8)
    row[..., end : end + 2 * rope] = k_pe.bfloat16().contiguous().view(torch.uint8)
    return row


def decode_latents(rows: Tensor, rank: int, rope: int) -> tuple[Tensor, Tensor]:
    """c_kv [..., C] and k_pe [..., R] of cache rows, fp32 for fp8 rows, else as they are."""
    if rows.dtype != torch.uint8:
        return rows[..., :rank], rows[..., rank:]
    begin, end = scales_begin(rank), scales_end(rank)
    codes = rows[..., :rank].contiguous().view(torch.float8_e4m3fn).float()
    scales = rows[..., begin:end].contiguous().view(torch.float32)
    c_kv = codes * scales.repeat_interleave(GROUP, dim=-1)[..., :rank]
    k_pe = rows[..., end : end + 2 * rope].contiguous().view(torch.bfloat16)
    return c_kv, k_pe.float()


def _quantise(c_kv: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., C] as bytes and scales [..., groups] fp32."""
    rank = c_kv.shape[-1]
    groups = F.pad(c_kv.float(), (0, -rank % GROUP)).view(
        *c_kv.shape[:-1], -(-rank // GROUP), GROUP
    )
    largest = groups.abs().amax(dim=-1)
    scales = torch.where(largest < _MIN_AMAX, 0.0, largest / _MAX_CODE)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    ratios = torch.where(scales[..., None] > 0, groups / scales[..., None], 0.0)
    codes = ratios.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten(-2)[..., :rank], scales
