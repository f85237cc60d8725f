"""Multi-head latent attention of the newest tokens over the paged cache, absorbed: in latent space on both sides.

(DeepSeek-V2, arXiv 2405.04434, section 2.1; `moejet.ops.mla_attention` has the whole operation.) Queries arrive
multiplied by W_UK^T, results leave before W_UV, and every head sees the same keys [c_kv | k_pe] and values c_kv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.ops.latent_rows import decode_latents
from moejet.prefix_groups import PrefixGroups


def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    query_len: int,
    scale: float,
    max_context: int,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    split_tokens: int | None = None,
    groups: PrefixGroups | None = None,
) -> Tensor:
    """Attention of the last query_len tokens of each sequence over its context, causal among themselves.

    Shapes: B sequences with query_len tokens each, T = B * query_len, H heads, C latent rank, R rope dims, blocks of S.
      q_latent [T, H, C] (times W_UK^T) and q_pe [T, H, R] (rotated), bf16, fp16 or fp32, unit stride last
      latent_cache [blocks, S, row], rows as in `moejet.latent_layout`
      block_tables [B, max_blocks] i32 or i64, -1 padded · context_lens [B] i32, query tokens included; a sequence of
      0 stands for nothing: it reads nothing and its rows of the result are 0
      max_context: the longest context that context_lens may hold; it sizes grid and scratch
      split_tokens: keys per split, a multiple of 64. With None each sequence divides its context by a number of splits
      that depends on the batch, and so do the last bits of its result. With a number they do not, nor on whether
      `groups` are given; on a GPU a batch of 1 then takes as many programs as its context has splits.
    Returns `out`, or a new [T, H, C] in out_dtype (default: q_latent's). Products are in the cache's type (fp8: in
    bf16, or fp16 if q_latent is), sums in fp32.
    """
    if out is None:
        dtype = q_latent.dtype if out_dtype is None else out_dtype
        out = torch.empty(q_latent.shape, dtype=dtype, device=q_latent.device)
    if q_latent.is_cuda and not use_reference():
        from moejet.kernels.mla_decode import mla_decode as mla_decode_triton

        return mla_decode_triton(
            q_latent,
            q_pe,
            latent_cache,
            block_tables,
            context_lens,
            query_len=query_len,
            scale=scale,
            max_context=max_context,
            out=out,
            split_tokens=split_tokens,
            groups=groups,
        )
    return out.copy_(
        mla_decode_ref(
            q_latent,
            q_pe,
            latent_cache,
            block_tables,
            context_lens,
            query_len=query_len,
            scale=scale,
        )
    )


def mla_decode_ref(
    q_latent: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    query_len: int,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Torch reference of `mla_decode`, sequence by sequence in `dtype`, which the result has too."""
    block_size, rank = latent_cache.shape[1], q_latent.shape[-1]
    out = torch.zeros(q_latent.shape, dtype=dtype, device=q_latent.device)
    for i, context_len in enumerate(context_lens.tolist()):
        if context_len == 0:
            continue
        blocks = block_tables[i, : -(-context_len // block_size)].long()
        rows = latent_cache[blocks].flatten(0, 1)[:context_len]
        c_kv, k_pe = (part.to(dtype) for part in decode_latents(rows, rank, q_pe.shape[-1]))
        tokens = slice(i * query_len, (i + 1) * query_len)
        scores = q_latent[tokens].to(dtype) @ c_kv.T + q_pe[tokens].to(dtype) @ k_pe.T
        positions = torch.arange(context_len, device=q_latent.device)
        last = context_len - query_len + torch.arange(query_len, device=q_latent.device)
        hidden = positions[None, :] > last[:, None]
        scores = scores.mul(scale).masked_fill(hidden[:, None, :], float("-inf"))
        # A token before the sequence's begin sees nothing.
        out[tokens] = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ c_kv
    return out
