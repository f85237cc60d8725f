"""silu-mul beside torch's two operations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from moejet.kernels.card import Card
from moejet.ops.silu_mul import silu_mul
from moejet.testing.gpu_bench.case import Case, Run


def cases(card: Card) -> Iterator[Case]:
    for tokens, width in ((1, 2048), (64, 2048), (4096, 18432)):
        size = 3 * tokens * width * 2
        yield Case(f"{tokens} x {width}", partial(_build, tokens, width), bytes=size)


def _build(tokens: int, width: int) -> tuple[Run, Run]:
    gate_up = torch.randn(tokens, 2 * width, device="cuda").bfloat16()
    gate, up = gate_up.chunk(2, dim=1)
    return lambda: silu_mul(gate_up, out_dtype=torch.bfloat16), lambda: F.silu(gate) * up
