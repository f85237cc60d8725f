"""Random inputs of expanded latent attention, for tests on every device and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moejet.ops.latent_rows import CACHE_TYPES, encode_latents


@dataclass(frozen=True)
class MlaShape:
    """Heads and head dimensions: N nope, R rope, V value, C rank."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int = 512


def random_inputs(
    shape: MlaShape,
    *,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    dtype: torch.dtype,
    cache: str = "fp32",
    block_size: int = 16,
) -> dict[str, Any]:
    """Arguments of `mla_prefill` on the CPU; blocks in random order, the cache's other rows NaN, tables padded with -1.

    Scores have a standard deviation of about 1.
    """
    counts = [-(-keys // block_size) for keys in context_lens]
    order = torch.randperm(sum(counts) + 2)
    tables = torch.full((len(counts), max(counts, default=0) + 1), -1, dtype=torch.int64)
    rows = encode_latents(
        torch.full((len(order), block_size, shape.rank), torch.nan),
        torch.full((len(order), block_size, shape.rope), torch.nan),
        CACHE_TYPES[cache],
    )
    first = 0
    for i, (count, keys) in enumerate(zip(counts, context_lens, strict=True)):
        blocks = order[first : first + count]
        tables[i, :count] = blocks
        latents = encode_latents(
            torch.randn(keys, shape.rank), torch.randn(keys, shape.rope), CACHE_TYPES[cache]
        )
        position = torch.arange(keys)
        rows[blocks[position // block_size], position % block_size] = latents
        first += count
    width = shape.nope + shape.rope
    up = torch.randn(shape.heads * (shape.nope + shape.value), shape.rank) * shape.rank**-0.5
    return {
        "q": torch.randn(sum(query_lens), shape.heads, width).to(dtype),
        "w_ukv": up.to(dtype),
        "latent_cache": rows,
        "block_tables": tables,
        "query_lens": list(query_lens),
        "context_lens": list(context_lens),
        "rank": shape.rank,
        "rope_dim": shape.rope,
        "value_dim": shape.value,
        "scale": width**-0.5,
    }
