"""Embedding gather beside torch's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from moejet.kernels.card import Card
from moejet.ops.embedding import embedding
from moejet.testing.gpu_bench.case import Case, Run


def cases(card: Card) -> Iterator[Case]:
    for tokens in (1, 64, 4096):
        size = 2 * tokens * 7168 * 2
        yield Case(f"{tokens} x 7168", partial(_build, tokens, 7168), bytes=size)


def _build(tokens: int, dim: int) -> tuple[Run, Run]:
    weight = torch.randn(32768, dim, device="cuda").bfloat16()
    ids = torch.randint(32768, (tokens,), device="cuda")
    return lambda: embedding(ids, weight, out_dtype=torch.bfloat16), lambda: F.embedding(
        ids, weight
    )
