"""Sampling beside torch: the largest logit, all tokens in order of their ids, and top_p by a sort of the row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from moejet.kernels.card import Card
from moejet.ops.device_sampling import SamplingTensors, sample_on_device
from moejet.request import SamplingParams
from moejet.testing.gpu_bench.case import Case, Run

_VOCABULARY = 129280
_RULES: dict[str, tuple[SamplingParams, Callable[[Tensor, Tensor], Tensor]]] = {
    "greedy": (SamplingParams(temperature=0.0), lambda logits, u: logits.argmax(-1)),
    "plain": (SamplingParams(), lambda logits, u: _inverse(torch.softmax(logits, -1), u)),
    "top_p": (SamplingParams(top_p=0.95), lambda logits, u: _sorted_top_p(logits, u)),
}


def cases(card: Card) -> Iterator[Case]:
    for rule in _RULES:
        for rows in (1, 32):
            size = rows * _VOCABULARY * 4
            yield Case(f"{rule}, {rows} x {_VOCABULARY}", partial(_build, rule, rows), bytes=size)


def _build(rule: str, rows: int) -> tuple[Run, Run]:
    params, peer = _RULES[rule]
    # As a model's: a handful of likely tokens far above the rest.
    logits = torch.randn(rows, _VOCABULARY, device="cuda") * 2
    logits[:, :50] += torch.rand(rows, 50, device="cuda") * 12
    uniforms = [(i + 0.5) / rows for i in range(rows)]
    tensors = SamplingTensors.of([params] * rows, uniforms, device="cuda")
    u = torch.tensor(uniforms, device="cuda")
    return lambda: sample_on_device(logits, tensors)[0], lambda: peer(logits, u)


def _inverse(probs: Tensor, u: Tensor) -> Tensor:
    reached = torch.cumsum(probs, -1)
    return torch.searchsorted(reached, u[:, None] * reached[:, -1:], right=True)[:, 0]


def _sorted_top_p(logits: Tensor, u: Tensor) -> Tensor:
    probs, ids = torch.sort(torch.softmax(logits, -1), dim=-1, descending=True, stable=True)
    before = torch.cumsum(probs, -1) - probs
    place = _inverse(probs.masked_fill(before >= 0.95, 0.0), u)
    return ids.gather(1, place[:, None])[:, 0]
