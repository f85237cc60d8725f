"""Latent norm, rotations and cache store in one launch, beside the same through separate kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from moejet.kernels.card import Card
from moejet.latent_layout import row_bytes, row_elements
from moejet.ops.latent_rows import CACHE_TYPES
from moejet.ops.mla_prepare import mla_prepare
from moejet.ops.rms_norm import rms_norm
from moejet.ops.rope import apply_rope
from moejet.ops.store_latent import store_latent
from moejet.testing.gpu_bench.case import Case, Run

_HEADS, _NOPE, _ROPE, _RANK = 128, 128, 64, 512


def cases(card: Card) -> Iterator[Case]:
    for kind in ("bf16", "fp8"):
        for tokens in (1, 64, 4096):
            q = 2 * _HEADS * _ROPE * 2
            size = tokens * (q + (_RANK + _ROPE) * 2 + row_bytes(_RANK, _ROPE, kind))
            yield Case(f"{kind}, {tokens} tokens", partial(_build, tokens, kind), bytes=size)


def _build(tokens: int, kind: str) -> tuple[Run, Run]:
    latent = torch.randn(tokens, _RANK + _ROPE, device="cuda").bfloat16()
    q = torch.randn(tokens, _HEADS, _NOPE + _ROPE, device="cuda").bfloat16()
    q_pe, weight = q[..., _NOPE:], torch.randn(_RANK, device="cuda")
    angles = torch.randn(tokens, _ROPE, device="cuda")
    blocks, row = 2 * (tokens // 64 + 1), row_elements(_RANK, _ROPE, kind)
    cache = torch.zeros(blocks, 64, row, dtype=CACHE_TYPES[kind], device="cuda")
    slots = torch.randperm(blocks * 64, device="cuda")[:tokens]

    def peer() -> Tensor:
        k_pe = apply_rope(latent[:, _RANK:], angles, interleave=True)
        c_kv = rms_norm(latent[:, :_RANK], weight, 1e-6, out_dtype=torch.bfloat16)
        store_latent(c_kv, k_pe, cache, slots)
        return apply_rope(q_pe, angles, interleave=True)

    def run() -> Tensor:
        return mla_prepare(latent, q_pe, angles, None, weight, 1e-6, cache, slots, interleave=True)

    return run, peer
