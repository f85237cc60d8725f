"""Multi-head latent attention over the paged latent cache (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one row [c_kv | k_pe] per token. With k_nope = W_UK c_kv and v = W_UV c_kv per head, the scores are
    q_nope . W_UK c_kv + q_pe . k_pe  =  (W_UK^T q_nope) . c_kv + q_pe . k_pe
so attention may run either way:
  absorbed   queries move into latent space once, all heads share the latent rows as keys and as values; per
             query-key pair and head 2C + R multiply-adds
  expanded   keys and values of all heads are rebuilt from the latents once per step: C (N + V) per token and head,
             then only N + R + V per pair
Few queries (decode) favour absorbed, long chunks of prefill expanded; `prefers_expanded` compares the two counts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# Query rows are processed in blocks whose fp32 scores stay below this size.
_MAX_SCORE_BYTES = 64 << 20


def prefers_expanded(
    query_len: int,
    *,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
) -> bool:
    """Whether rebuilding keys and values costs less than absorbed attention, per context token and head."""
    absorbed = query_len * (2 * kv_lora_rank + qk_rope_head_dim)
    expanded = query_len * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)
    expanded += kv_lora_rank * (qk_nope_head_dim + v_head_dim)
    return expanded < absorbed


class UpProjections(Protocol):
    """W_UK and W_UV of all heads; `moejet.layers.mla` has them in torch and packed."""

    def absorb_query(self, q_nope: Tensor) -> Tensor:
        """[T, H, N] to [T, H, C]."""

    def value(self, mixed: Tensor) -> Tensor:
        """[T, H, C] to [T, H, V]."""

    def expand(self, c_kv: Tensor) -> tuple[Tensor, Tensor]:
        """[S, C] to keys [S, H, N] and values [S, H, V]."""


def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    up: UpProjections,
    latent_cache: Tensor,
    block_tables: Tensor,
    *,
    query_lens: list[int],
    context_lens: list[int],
    v_head_dim: int,
    scale: float,
) -> Tensor:
    """Causal attention of each request's last query_lens[i] tokens over its context.

    Shapes: T query tokens of B requests, H heads, N nope, R rope, V value dims, C latent rank, blocks of S tokens.
      q_nope [T, H, N], q_pe [T, H, R] fp32 · latent_cache [blocks, S, C + R], fp32 or bf16
      block_tables [B, max_blocks] i64, -1 padded
    Returns [T, H, V] fp32.
    """
    query_len_total, heads, nope = q_nope.shape
    rope = q_pe.shape[2]
    rank = latent_cache.shape[2] - rope
    # Requests with few queries share one absorption and one value projection: fewer, larger calls.
    out = q_nope.new_empty(query_len_total, heads, v_head_dim)
    absorbed_rows: list[int] = []
    mixed: list[Tensor] = []
    queries: Tensor | None = None
    start = 0
    spans = []
    for query_len, context_len in zip(query_lens, context_lens, strict=True):
        expanded = prefers_expanded(
            query_len,
            kv_lora_rank=rank,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=v_head_dim,
        )
        spans.append((start, start + query_len, context_len, expanded))
        if not expanded:
            absorbed_rows += range(start, start + query_len)
        start += query_len
    everything = len(absorbed_rows) == query_len_total
    if absorbed_rows:
        chosen = q_nope if everything else q_nope[absorbed_rows]
        queries = up.absorb_query(chosen)
    done = 0
    for i, (low, high, context_len, expanded) in enumerate(spans):
        latent = gather_latent(latent_cache, block_tables[i], context_len).to(q_nope.dtype)
        if expanded:
            out[low:high] = _attend_expanded(
                q_nope[low:high], q_pe[low:high], up, latent, rank=rank, scale=scale
            )
            continue
        assert queries is not None
        part = queries[done : done + high - low]
        done += high - low
        mixed.append(_attend_absorbed(part, q_pe[low:high], latent, rank=rank, scale=scale))
    if absorbed_rows:
        values = up.value(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        if everything:
            return values
        out[absorbed_rows] = values
    return out


def gather_latent(latent_cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """One request's latent rows in order: [context_len, C + R]."""
    block_size = latent_cache.shape[1]
    blocks = block_table[: -(-context_len // block_size)]
    return latent_cache[blocks].flatten(0, 1)[:context_len]


def _attend_absorbed(
    q_latent: Tensor, q_pe: Tensor, latent: Tensor, *, rank: int, scale: float
) -> Tensor:
    """Mixed latents [T, H, C] of queries [T, H, C] and [T, H, R] over latent [S, C + R]."""
    query_len, heads = q_latent.shape[:2]
    context_len = latent.shape[0]
    query = torch.cat((q_latent, q_pe), dim=-1)  # [T, H, C + R]
    out = q_latent.new_empty(query_len, heads, rank)
    block = max(1, _MAX_SCORE_BYTES // (4 * heads * context_len))
    for low in range(0, query_len, block):
        high = min(low + block, query_len)
        scores = query[low:high].reshape(-1, query.shape[-1]) @ latent.T
        scores = scores.view(high - low, heads, context_len)
        probs = _causal_softmax(scores, context_len - query_len + low, scale, query_dim=0)
        out[low:high] = (probs.view(-1, context_len) @ latent[:, :rank]).view(-1, heads, rank)
    return out


def _attend_expanded(
    q_nope: Tensor, q_pe: Tensor, up: UpProjections, latent: Tensor, *, rank: int, scale: float
) -> Tensor:
    query_len, heads = q_nope.shape[:2]
    context_len = latent.shape[0]
    keys, values = up.expand(latent[:, :rank].contiguous())
    keys, values = keys.permute(1, 2, 0), values.transpose(0, 1)  # [H, N, S], [H, S, V]
    k_pe = latent[:, rank:]
    out = q_nope.new_empty(query_len, heads, values.shape[2])
    block = max(1, _MAX_SCORE_BYTES // (4 * heads * context_len))
    for low in range(0, query_len, block):
        high = min(low + block, query_len)
        scores = torch.bmm(q_nope[low:high].transpose(0, 1), keys)
        scores += torch.matmul(q_pe[low:high].transpose(0, 1), k_pe.T)
        probs = _causal_softmax(scores, context_len - query_len + low, scale, query_dim=1)
        out[low:high] = torch.bmm(probs, values).transpose(0, 1)
    return out


def _causal_softmax(scores: Tensor, first_position: int, scale: float, *, query_dim: int) -> Tensor:
    """softmax(scores * scale) over the last dimension, query t seeing keys up to first_position + t; in place."""
    rows, context_len = scores.shape[query_dim], scores.shape[2]
    scores *= scale
    if first_position < context_len - 1:
        limits = first_position + torch.arange(rows)
        hidden = torch.arange(context_len) > limits.view(-1, 1, 1)  # [rows, 1, context]
        scores.masked_fill_(hidden.transpose(0, query_dim), float("-inf"))
    return torch.softmax(scores, dim=-1)


def mla_attention_ref(
    q_nope: Tensor,
    q_pe: Tensor,
    up: UpProjections,
    latent_cache: Tensor,
    block_tables: Tensor,
    *,
    query_lens: list[int],
    context_lens: list[int],
    v_head_dim: int,
    scale: float,
) -> Tensor:
    """Reference of `mla_attention`: token by token, keys and values rebuilt, in float64."""
    out = q_nope.new_empty(*q_nope.shape[:2], v_head_dim)
    rank, token = latent_cache.shape[2] - q_pe.shape[2], 0
    for i, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        latent = gather_latent(latent_cache, block_tables[i], context_len).float()
        keys, values = (t.double() for t in up.expand(latent[:, :rank].contiguous()))
        k_pe = latent[:, rank:].double()
        for end in range(context_len - query_len + 1, context_len + 1):
            scores = torch.einsum("hn,shn->hs", q_nope[token].double(), keys[:end])
            scores = scores + q_pe[token].double() @ k_pe[:end].T
            probs = torch.softmax(scores * scale, dim=-1)
            out[token] = torch.einsum("hs,shv->hv", probs, values[:end]).to(out.dtype)
            token += 1
    return out
