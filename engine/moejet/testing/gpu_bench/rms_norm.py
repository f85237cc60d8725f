"""RMSNorm beside torch's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from moejet.kernels.card import Card
from moejet.ops.rms_norm import rms_norm
from moejet.testing.gpu_bench.case import Case, Run


def cases(card: Card) -> Iterator[Case]:
    for tokens in (1, 64, 4096):
        yield Case(f"{tokens} x 7168", partial(_build, tokens, 7168), bytes=2 * 2 * tokens * 7168)


def _build(tokens: int, dim: int) -> tuple[Run, Run]:
    x = torch.randn(tokens, dim, device="cuda").bfloat16()
    weight = torch.randn(dim, device="cuda").bfloat16()
    return (
        lambda: rms_norm(x, weight, 1e-6, out_dtype=torch.bfloat16),
        lambda: F.rms_norm(x, (dim,), weight, 1e-6),
    )
