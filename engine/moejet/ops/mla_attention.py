"""Multi-head latent attention over the paged latent cache (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one row [c_kv | k_pe] per token. With k_nope = W_UK c_kv and v = W_UV c_kv per head, the scores are
    q_nope . W_UK c_kv + q_pe . k_pe  =  (W_UK^T q_nope) . c_kv + q_pe . k_pe
so attention may run either way:
  absorbed   queries move into latent space once, all heads share the latent rows as keys and as values; per
             query-key pair and head 2C + R multiply-adds
  expanded   keys and values of all heads are rebuilt from the latents once per step: C (N + V) per token and head,
             then only N + R + V per pair
Few queries (decode) favour absorbed, long chunks of prefill expanded; each request takes the form with fewer
multiply-adds (csrc/attention.h). Neither holds scores of more than a block of queries and keys.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.ops.latent_rows import decode_latents
from moejet.ops.linear import PackedMatrices, linear_ref
from moejet.ops.native import check_dims, check_tensor


class UpProjections(Protocol):
    """W_UK and W_UV of all heads, one matrix per head; W_UK in both directions."""

    w_uk: PackedMatrices  # [N, C]
    w_uk_transposed: PackedMatrices  # [C, N]
    w_uv: PackedMatrices  # [V, C]


def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    up: UpProjections,
    latent_cache: Tensor,
    block_tables: Tensor,
    *,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
) -> Tensor:
    """Causal attention of each request's last query_lens[i] tokens over its context.

    Shapes: T query tokens of B requests, H heads, N nope, R rope, V value dims, C latent rank, blocks of S tokens.
      q_nope [T, H, N], q_pe [T, H, R] fp32 · latent_cache [blocks, S, row], rows as in `moejet.latent_layout`
      block_tables [B, max_blocks] i64, -1 padded
    Returns [T, H, V] fp32.
    """
    if use_reference():
        return mla_attention_ref(
            q_nope,
            q_pe,
            up,
            latent_cache,
            block_tables,
            query_lens=query_lens,
            context_lens=context_lens,
            scale=scale,
        )
    check_dims("q_nope", q_nope, "T, H, N")
    check_tensor("q_pe", q_pe, (*q_nope.shape[:2], q_pe.shape[-1] if q_pe.dim() else 0), q_nope)
    matrices = up.w_uk
    out = torch.empty(*q_nope.shape[:2], up.w_uv.weights.rows, dtype=torch.float32)
    used = matrices._C.mla_attention(
        up.w_uk_transposed.weights,
        matrices.weights,
        up.w_uv.weights,
        torch.cat((q_nope, q_pe), dim=-1),
        latent_cache,
        block_tables,
        query_lens,
        context_lens,
        scale,
        out,
        matrices.pool,
        matrices.isa,
    )
    assert used == matrices.isa, f"{used=} {matrices.isa=}"
    return out


def mla_attention_ref(
    q_nope: Tensor,
    q_pe: Tensor,
    up: UpProjections,
    latent_cache: Tensor,
    block_tables: Tensor,
    *,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
) -> Tensor:
    """Reference of `mla_attention`: token by token, keys and values rebuilt, in float64."""
    out = torch.empty(*q_nope.shape[:2], up.w_uv.weights.rows, dtype=torch.float32)
    block_size, rank, token = latent_cache.shape[1], up.w_uk.weights.cols, 0
    for i, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        blocks = block_tables[i, : -(-context_len // block_size)]
        latent = latent_cache[blocks].flatten(0, 1)[:context_len]
        c_kv, k_pe = decode_latents(latent, rank, q_pe.shape[-1])
        # [S, H, N] and [S, H, V], also with one head
        keys = linear_ref(c_kv, up.w_uk).view(context_len, q_nope.shape[1], -1).double()
        values = linear_ref(c_kv, up.w_uv).view(context_len, q_nope.shape[1], -1).double()
        for end in range(context_len - query_len + 1, context_len + 1):
            scores = torch.einsum("hn,shn->hs", q_nope[token].double(), keys[:end])
            scores = scores + q_pe[token].double() @ k_pe[:end].double().T
            probs = torch.softmax(scores * scale, dim=-1)
            out[token] = torch.einsum("hs,shv->hv", probs, values[:end]).float()
            token += 1
    return out
