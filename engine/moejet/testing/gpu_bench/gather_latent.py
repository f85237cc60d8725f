"""Gathering latents beside torch's indexing, which knows no fp8 rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from moejet.kernels.card import Card
from moejet.latent_layout import row_elements
from moejet.ops.gather_latent import gather_latent
from moejet.ops.latent_rows import CACHE_TYPES, decode_latents, encode_latents
from moejet.ops.mla_prefill import plan_prefill
from moejet.testing.gpu_bench.case import Case, Run

C, R, BLOCK = 512, 64, 64


def cases(card: Card) -> Iterator[Case]:
    for keys in (2048, 32768):
        for cache in ("bf16", "fp8"):
            row_bytes = row_elements(C, R, cache) * CACHE_TYPES[cache].itemsize
            yield Case(
                f"{keys} keys, {cache}",
                partial(_build, keys, cache),
                bytes=keys * (row_bytes + 2 * (C + R)),
            )


def _build(keys: int, cache: str) -> tuple[Run, Run]:
    blocks = keys // BLOCK
    latents = encode_latents(
        torch.randn(blocks, BLOCK, C), torch.randn(blocks, BLOCK, R), CACHE_TYPES[cache]
    ).cuda()
    table = torch.randperm(blocks, device="cuda").view(1, -1)
    plan = plan_prefill([1], [keys], max_key_chunk=keys, device=latents.device)
    decoded = torch.cat([part.bfloat16() for part in decode_latents(latents, C, R)], dim=-1)
    return (
        lambda: gather_latent(
            latents, table, plan.chunks[0].pieces, rank=C, rope_dim=R,
            num_keys=keys, max_keys=keys, dtype=torch.bfloat16,
        )[0],
        lambda: decoded[table[0]].view(keys, C + R)[:, :C],
    )  # fmt: skip
