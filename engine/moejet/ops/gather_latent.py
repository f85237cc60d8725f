"""Rows of the paged latent cache, gathered and dequantised for expanded attention."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.ops.latent_rows import decode_latents


def gather_latent(
    latent_cache: Tensor,
    block_tables: Tensor,
    pieces: Tensor,
    *,
    rank: int,
    rope_dim: int,
    num_keys: int,
    max_keys: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """c_kv [K, C] and k_pe [K, R] in `dtype` of the keys that the pieces name, K = num_keys.

    latent_cache [blocks, S, row], rows as in `moejet.latent_layout` · block_tables [B, max_blocks], int
    pieces [P, 8] i32, see `moejet.ops.mla_prefill`: request, -, -, first row in the result, keys, position of the first
    key, -, - · max_keys: the most keys of a piece
    """
    if not latent_cache.is_cuda or use_reference():
        return gather_latent_ref(
            latent_cache,
            block_tables,
            pieces,
            rank=rank,
            rope_dim=rope_dim,
            num_keys=num_keys,
            dtype=dtype,
        )
    from moejet.kernels import gather_latent as triton_gather

    c_kv = torch.empty(num_keys, rank, dtype=dtype, device=latent_cache.device)
    k_pe = torch.empty(num_keys, rope_dim, dtype=dtype, device=latent_cache.device)
    triton_gather.gather_latent(latent_cache, block_tables, pieces, c_kv, k_pe, max_keys=max_keys)
    return c_kv, k_pe


def gather_latent_ref(
    latent_cache: Tensor,
    block_tables: Tensor,
    pieces: Tensor,
    *,
    rank: int,
    rope_dim: int,
    num_keys: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Torch reference of `gather_latent`."""
    block_size = latent_cache.shape[1]
    rows = torch.zeros(num_keys, latent_cache.shape[2], dtype=latent_cache.dtype)
    rows = rows.to(latent_cache.device)
    for request, _, _, first_row, keys, first_key, _, _ in pieces.tolist():
        position = torch.arange(first_key, first_key + keys, device=latent_cache.device)
        block = block_tables[request, position // block_size].long()
        rows[first_row : first_row + keys] = latent_cache[block, position % block_size]
    c_kv, k_pe = decode_latents(rows, rank, rope_dim)
    return c_kv.to(dtype), k_pe[:, :rope_dim].to(dtype)
