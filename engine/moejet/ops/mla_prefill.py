"""Expanded multi-head latent attention for prefill: keys and values of all heads, rebuilt from the cached latents.

Rebuilding takes C (N + V) multiply-adds per key and head once per step, and a query-key pair N + R + V, where absorbed
attention takes 2 C + R per pair: for C = 512, N = V = 128, R = 64 the expanded form wins from about 170 queries per
request. Expanded keys and values are large (64 KiB per key in bf16 for 128 heads), so a long context is taken in chunks
of `max_key_chunk` keys; a query's output and log-sum-exp carry over from chunk to chunk (see kernels/mla_prefill.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.ops.gather_latent import gather_latent
from moejet.ops.latent_rows import decode_latents

_CONTINUES, _CONTINUED = 1, 2

# Rows of kv_b_proj per head: N of W_UK, then V of W_UV. A matrix [H * (N + V), C], or what maps c_kv [K, C] to keys
# [K, H * N] and values [K, H * V] in c_kv's dtype.
UpProjection = Tensor | Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KeyChunk:
    """Keys that are expanded together; sizes are what the host must know to launch."""

    pieces: Tensor  # [P, 8] i32 on the device, rows as in kernels/mla_prefill.py
    num_keys: int
    max_keys: int  # of one piece
    max_query_len: int


@dataclass(frozen=True)
class PrefillPlan:
    """The chunks of one step; the same for all layers."""

    chunks: tuple[KeyChunk, ...]
    splits: bool  # whether a request spans chunks


def plan_prefill(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    max_key_chunk: int,
    device: torch.device,
) -> PrefillPlan:
    """Packs whole requests into chunks of at most max_key_chunk keys and splits those that are longer.

    One copy to the device, without waiting for it.
    """
    assert max_key_chunk > 0, f"{max_key_chunk=}"
    chunks: list[list[list[int]]] = [[]]
    used, token = 0, 0
    for request, (queries, keys) in enumerate(zip(query_lens, context_lens, strict=True)):
        assert 0 <= queries <= keys, f"{queries=} {keys=}"
        begin = 0 if queries else keys
        if used and keys - begin > max_key_chunk - used:
            chunks.append([])
            used = 0
        while begin < keys:
            if used == max_key_chunk:
                chunks.append([])
                used = 0
            size = min(keys - begin, max_key_chunk - used)
            flags = _CONTINUES * (begin > 0) + _CONTINUED * (begin + size < keys)
            diagonal = keys - queries - begin
            chunks[-1].append([request, token, queries, used, size, begin, diagonal, flags])
            used += size
            begin += size
        token += queries
    chunks = [chunk for chunk in chunks if chunk]
    rows = torch.tensor(
        [piece for chunk in chunks for piece in chunk],
        dtype=torch.int32,
        pin_memory=device.type == "cuda",
    ).view(-1, 8)
    parts = torch.split(rows.to(device, non_blocking=True), [len(chunk) for chunk in chunks])
    return PrefillPlan(
        tuple(
            KeyChunk(
                part,
                num_keys=sum(piece[4] for piece in chunk),
                max_keys=max(piece[4] for piece in chunk),
                max_query_len=max(piece[2] for piece in chunk),
            )
            for part, chunk in zip(parts, chunks, strict=True)
        ),
        splits=any(piece[7] for chunk in chunks for piece in chunk),
    )


def mla_prefill(
    q: Tensor,
    w_ukv: UpProjection,
    latent_cache: Tensor,
    block_tables: Tensor,
    *,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    rank: int,
    rope_dim: int,
    value_dim: int,
    scale: float,
    max_key_chunk: int = 8192,
    plan: PrefillPlan | None = None,
) -> Tensor:
    """Causal attention of each request's last query_lens[i] tokens over its context, which the cache holds already.

    Shapes: T query tokens of B requests, H heads, N nope, R = rope_dim, V = value_dim, C = rank, blocks of S tokens.
      q [T, H, N + R], the rope part rotated, bf16, fp16 or fp32 · w_ukv see `UpProjection`
      latent_cache [blocks, S, row], rows as in `moejet.latent_layout` · block_tables [B, max_blocks] int, -1 padded
      plan: of these lengths, to share between layers; else made here from max_key_chunk
    Returns [T, H, V] in q's dtype. Memory: about max_key_chunk * H * (N + V) values of q's dtype, and T * H * V of fp32
    where a request spans chunks.
    """
    if not q.is_cuda or use_reference():
        return mla_prefill_ref(
            q,
            w_ukv,
            latent_cache,
            block_tables,
            query_lens=query_lens,
            context_lens=context_lens,
            rank=rank,
            rope_dim=rope_dim,
            value_dim=value_dim,
            scale=scale,
        )
    if plan is None:
        plan = plan_prefill(query_lens, context_lens, max_key_chunk=max_key_chunk, device=q.device)
    return mla_prefill_chunked(
        q,
        w_ukv,
        latent_cache,
        block_tables,
        plan,
        rank=rank,
        rope_dim=rope_dim,
        value_dim=value_dim,
        scale=scale,
    )


def mla_prefill_chunked(
    q: Tensor,
    w_ukv: UpProjection,
    latent_cache: Tensor,
    block_tables: Tensor,
    plan: PrefillPlan,
    *,
    rank: int,
    rope_dim: int,
    value_dim: int,
    scale: float,
) -> Tensor:
    """`mla_prefill` by the Triton kernels, chunk by chunk; no wait for the device."""
    from moejet.kernels import mla_prefill as kernel

    tokens, heads, nope = q.shape[0], q.shape[1], q.shape[2] - rope_dim
    out = torch.empty(tokens, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    state = None
    if plan.splits:
        state = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    for chunk in plan.chunks:
        c_kv, k_pe = gather_latent(
            latent_cache,
            block_tables,
            chunk.pieces,
            rank=rank,
            rope_dim=rope_dim,
            num_keys=chunk.num_keys,
            max_keys=chunk.max_keys,
            dtype=q.dtype,
        )
        keys, values = _expand(c_kv, w_ukv, heads, nope)
        kernel.mla_prefill(
            q,
            keys,
            k_pe,
            values,
            chunk.pieces,
            out,
            scale=scale,
            max_query_len=chunk.max_query_len,
            state=state,
            lse=lse,
        )
    return out


def mla_prefill_ref(
    q: Tensor,
    w_ukv: UpProjection,
    latent_cache: Tensor,
    block_tables: Tensor,
    *,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    rank: int,
    rope_dim: int,
    value_dim: int,
    scale: float,
) -> Tensor:
    """Torch reference of `mla_prefill` in float64."""
    out = torch.empty(*q.shape[:2], value_dim, dtype=q.dtype, device=q.device)
    heads, nope = q.shape[1], q.shape[2] - rope_dim
    block_size, token = latent_cache.shape[1], 0
    for i, (queries, keys) in enumerate(zip(query_lens, context_lens, strict=True)):
        blocks = block_tables[i, : -(-keys // block_size)].long()
        rows = latent_cache[blocks].flatten(0, 1)[:keys]
        c_kv, k_pe = decode_latents(rows, rank, rope_dim)
        k_nope, v = (part.double() for part in _expand(c_kv.double(), w_ukv, heads, nope))
        rows_q = q[token : token + queries].double()
        scores = torch.einsum("thn,shn->hts", rows_q[..., :nope], k_nope)
        scores += torch.einsum("thr,sr->hts", rows_q[..., nope:], k_pe.double())
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(
            keys - queries + 1
        )
        probs = torch.softmax((scores * scale).masked_fill(hidden, -torch.inf), dim=-1)
        values = torch.einsum("hts,shv->thv", probs, v)
        out[token : token + queries] = values.to(q.dtype)
        token += queries
    return out


def _expand(c_kv: Tensor, w_ukv: UpProjection, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """Keys [K, H, N] and values [K, H, V]."""
    if isinstance(w_ukv, Tensor):
        both = (c_kv @ w_ukv.to(c_kv.dtype).T).view(c_kv.shape[0], heads, -1)
        return both[..., :nope], both[..., nope:]
    keys, values = w_ukv(c_kv)
    return keys.view(-1, heads, nope), values.view(c_kv.shape[0], heads, -1)
