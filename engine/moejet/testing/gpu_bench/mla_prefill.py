"""Expanded latent attention beside torch's, which needs the rope part of the keys once per head.

"tokens": the attention alone, of one prompt, over keys and values already expanded. "on": the whole operation, 2048 new
tokens behind a cached prefix, from the latent cache to the output; its operations include the expansion.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from moejet.kernels.card import Card
from moejet.latent_layout import row_elements
from moejet.ops.latent_rows import CACHE_TYPES, decode_latents, encode_latents
from moejet.ops.mla_prefill import mla_prefill_chunked, plan_prefill
from moejet.testing.gpu_bench.case import Case, Run

N, R, V, C = 128, 64, 128, 512  # DeepSeek-V2-Lite (16 heads) to V3 (128 heads)
SCALE = (N + R) ** -0.5
BLOCK = 64


def cases(card: Card) -> Iterator[Case]:
    # 32K tokens of 128 heads would take a second per run on small cards.
    for tokens, heads in ((2048, 128), (8192, 128), (2048, 16), (8192, 16), (32768, 16)):
        yield Case(
            f"{tokens} tokens, {heads} heads",
            partial(_build_attention, tokens, heads),
            bytes=2 * tokens * (heads * (N + R + N + V + V) + R),
            flops=_attention_flops(tokens, tokens, heads),
        )
    tokens, prefix = 2048, 30720
    keys = tokens + prefix
    for heads in (128, 16):
        for cache in ("bf16", "fp8"):
            row_bytes = row_elements(C, R, cache) * CACHE_TYPES[cache].itemsize
            yield Case(
                f"2048 on {prefix}, {heads} heads, {cache}",
                partial(_build_chunked, tokens, keys, heads, cache),
                bytes=2 * (tokens * heads * (N + R + V) + heads * (N + V) * C) + keys * row_bytes,
                flops=_attention_flops(tokens, keys, heads) + 2 * keys * C * heads * (N + V),
            )


def _attention_flops(tokens: int, keys: int, heads: int) -> int:
    pairs = tokens * keys - tokens * (tokens - 1) // 2
    return 2 * pairs * heads * (N + R + V)


def _build_attention(tokens: int, heads: int) -> tuple[Run, Run]:
    from moejet.kernels.mla_prefill import mla_prefill

    q, expanded, k_pe = (
        torch.randn(tokens, *sizes, dtype=torch.bfloat16, device="cuda")
        for sizes in ((heads, N + R), (heads, N + V), (R,))
    )
    plan = plan_prefill([tokens], [tokens], max_key_chunk=tokens, device=q.device)
    out = torch.empty(tokens, heads, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, device=q.device)

    def run() -> Tensor:
        mla_prefill(
            q, expanded[..., :N], k_pe, expanded[..., N:], plan.chunks[0].pieces, out,
            scale=SCALE, max_query_len=tokens, lse=lse,
        )  # fmt: skip
        return out

    keys = torch.cat((expanded[..., :N], k_pe[:, None].expand(-1, heads, -1)), dim=-1)
    return run, lambda: _torch_attention(q, keys, expanded[..., N:])


def _build_chunked(tokens: int, keys: int, heads: int, cache: str) -> tuple[Run, Run]:
    blocks = keys // BLOCK
    latents = encode_latents(
        torch.randn(blocks, BLOCK, C), torch.randn(blocks, BLOCK, R), CACHE_TYPES[cache]
    ).cuda()
    table = torch.randperm(blocks, device="cuda").view(1, -1)
    q = torch.randn(tokens, heads, N + R, dtype=torch.bfloat16, device="cuda")
    w_ukv = torch.randn(heads * (N + V), C, dtype=q.dtype, device="cuda") * C**-0.5
    plan = plan_prefill([tokens], [keys], max_key_chunk=8192, device=q.device)

    def run() -> Tensor:
        return mla_prefill_chunked(
            q, w_ukv, latents, table, plan, rank=C, rope_dim=R, value_dim=V, scale=SCALE
        )

    # Torch has no kernel for fp8 rows: it starts from bf16.
    c_kv, k_pe = (part.bfloat16() for part in decode_latents(latents, C, R))

    def peer() -> Tensor:
        rows = c_kv[table[0]].view(keys, C)
        rope = k_pe[table[0]].view(keys, 1, R).expand(-1, heads, -1)
        expanded = (rows @ w_ukv.T).view(keys, heads, N + V)
        return _torch_attention(q, torch.cat((expanded[..., :N], rope), dim=-1), expanded[..., N:])

    return run, peer


def _torch_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[T, H, V] of q [T, H, N + R], keys [K, H, N + R], values [K, H, V]: never the form that holds all scores."""
    queries = q.transpose(0, 1).unsqueeze(0)
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    with sdpa_kernel(
        [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    ):
        if queries.shape[2] == keys.shape[2]:
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=SCALE)
        else:
            mask = causal_lower_right(queries.shape[2], keys.shape[2])
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=SCALE)
    return out[0].transpose(0, 1)
