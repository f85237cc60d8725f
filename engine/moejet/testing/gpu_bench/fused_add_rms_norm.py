"""Residual addition with RMSNorm beside the two operations of torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.kernels.card import Card
from moejet.ops.fused_add_rms_norm import fused_add_rms_norm
from moejet.testing.gpu_bench.case import Case, Run


def cases(card: Card) -> Iterator[Case]:
    for tokens in (1, 64, 4096):
        # bf16 in and out, the fp32 residual read and written.
        size = tokens * 7168 * (2 + 2 + 4 + 4)
        yield Case(f"{tokens} x 7168", partial(_build, tokens, 7168), bytes=size)


def _build(tokens: int, dim: int) -> tuple[Run, Run]:
    x = torch.randn(tokens, dim, device="cuda").bfloat16()
    weight = torch.randn(dim, device="cuda")
    ours = torch.randn(tokens, dim, device="cuda")
    theirs = ours.clone()

    def peer() -> Tensor:
        theirs.add_(x)
        return F.rms_norm(theirs, (dim,), weight, 1e-6).bfloat16()

    return lambda: fused_add_rms_norm(x, ours, weight, 1e-6, out_dtype=torch.bfloat16), peer
