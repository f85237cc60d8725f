"""The 20 largest logits and the log-sum-exp beside torch.topk and logsumexp."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from moejet.kernels.card import Card
from moejet.ops.top_logits import top_logits_on_device
from moejet.testing.gpu_bench.case import Case, Run

_VOCABULARY = 129280


def cases(card: Card) -> Iterator[Case]:
    for rows in (1, 32):
        size = rows * _VOCABULARY * 4
        yield Case(f"20 of {rows} x {_VOCABULARY}", partial(_build, rows), bytes=size)


def _build(rows: int) -> tuple[Run, Run]:
    logits = torch.randn(rows, _VOCABULARY, device="cuda") * 3

    def run() -> Tensor:
        values, _, sums = top_logits_on_device(logits, 20)
        return values - sums[:, None]

    return run, lambda: logits.topk(20).values - logits.logsumexp(-1, keepdim=True)
