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


def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    latent_cache: Tensor,
    block_tables: Tensor,
    *,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
) -> Tensor:
    """Causal attention of each request's last query_lens[i] tokens over its context.

    Shapes: T query tokens of B requests, H heads, N nope, R rope, V value dims, C latent rank, blocks of S tokens.
      q_nope [T, H, N], q_pe [T, H, R] · w_uk [H, N, C] · w_uv [H, C, V], all of one dtype
      latent_cache [blocks, S, C + R] · block_tables [B, max_blocks] i64, -1 padded
    Returns [T, H, V] in q_nope's dtype. Softmax runs in fp32.
    """
    heads, nope = q_nope.shape[1], q_nope.shape[2]
    rank, v_dim = w_uv.shape[1], w_uv.shape[2]
    out = q_nope.new_empty(q_nope.shape[0], heads, v_dim)
    start = 0
    for i, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        rows = slice(start, start + query_len)
        start += query_len
        latent = gather_latent(latent_cache, block_tables[i], context_len).to(q_nope.dtype)
        expanded = prefers_expanded(
            query_len,
            kv_lora_rank=rank,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=q_pe.shape[2],
            v_head_dim=v_dim,
        )
        attend = _attend_expanded if expanded else _attend_absorbed
        out[rows] = attend(q_nope[rows], q_pe[rows], w_uk, w_uv, latent, scale=scale)
    return out


def gather_latent(latent_cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """One request's latent rows in order: [context_len, C + R]."""
    block_size = latent_cache.shape[1]
    blocks = block_table[: -(-context_len // block_size)]
    return latent_cache[blocks].flatten(0, 1)[:context_len]


def _attend_absorbed(
    q_nope: Tensor, q_pe: Tensor, w_uk: Tensor, w_uv: Tensor, latent: Tensor, *, scale: float
) -> Tensor:
    query_len, heads = q_nope.shape[:2]
    rank = w_uv.shape[1]
    q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk)  # [H, T, C]
    query = torch.cat((q_latent, q_pe.transpose(0, 1)), dim=-1)  # [H, T, C + R]
    out = q_nope.new_empty(heads, query_len, w_uv.shape[2])
    context_len = latent.shape[0]
    block = max(1, _MAX_SCORE_BYTES // (4 * heads * context_len))
    for low in range(0, query_len, block):
        high = min(low + block, query_len)
        part = query[:, low:high].reshape(-1, query.shape[-1])
        scores = (part @ latent.T).view(heads, high - low, context_len)
        probs = _causal_softmax(scores, context_len - query_len + low, scale)
        mixed = probs.view(-1, context_len) @ latent[:, :rank]
        out[:, low:high] = torch.bmm(mixed.view(heads, high - low, rank), w_uv)
    return out.transpose(0, 1)


def _attend_expanded(
    q_nope: Tensor, q_pe: Tensor, w_uk: Tensor, w_uv: Tensor, latent: Tensor, *, scale: float
) -> Tensor:
    query_len, heads = q_nope.shape[:2]
    rank, context_len = w_uv.shape[1], latent.shape[0]
    c_kv, k_pe = latent[:, :rank], latent[:, rank:]
    keys = torch.matmul(w_uk, c_kv.T)  # [H, N, context]
    values = torch.matmul(c_kv, w_uv)  # [H, context, V]
    out = q_nope.new_empty(heads, query_len, w_uv.shape[2])
    block = max(1, _MAX_SCORE_BYTES // (4 * heads * context_len))
    for low in range(0, query_len, block):
        high = min(low + block, query_len)
        scores = torch.bmm(q_nope[low:high].transpose(0, 1), keys)
        scores = scores + torch.matmul(q_pe[low:high].transpose(0, 1), k_pe.T)
        probs = _causal_softmax(scores, context_len - query_len + low, scale)
        out[:, low:high] = torch.bmm(probs, values)
    return out.transpose(0, 1)


def _causal_softmax(scores: Tensor, first_position: int, scale: float) -> Tensor:
    """softmax(scores * scale) of scores [H, T, context], row t seeing keys up to first_position + t."""
    wide = scores.float() * scale
    rows, context_len = wide.shape[1:]
    if first_position < context_len - 1:
        visible = torch.arange(context_len) <= first_position + torch.arange(rows).unsqueeze(1)
        wide.masked_fill_(~visible, float("-inf"))
    return torch.softmax(wide, dim=-1).to(scores.dtype)


def mla_attention_ref(
    q_nope: Tensor,
    q_pe: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    latent_cache: Tensor,
    block_tables: Tensor,
    *,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
) -> Tensor:
    """Reference of `mla_attention`: token by token, keys and values rebuilt, in float64."""
    out = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], w_uv.shape[2])
    rank, token = w_uv.shape[1], 0
    for i, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        latent = gather_latent(latent_cache, block_tables[i], context_len).double()
        for position in range(context_len - query_len, context_len):
            c_kv, k_pe = latent[: position + 1, :rank], latent[: position + 1, rank:]
            keys = torch.einsum("hnc,sc->shn", w_uk.double(), c_kv)
            values = torch.einsum("hcv,sc->shv", w_uv.double(), c_kv)
            scores = torch.einsum("hn,shn->hs", q_nope[token].double(), keys)
            scores = scores + q_pe[token].double() @ k_pe.T
            probs = torch.softmax(scores * scale, dim=-1)
            out[token] = torch.einsum("hs,shv->hv", probs, values).to(out.dtype)
            token += 1
    return out
