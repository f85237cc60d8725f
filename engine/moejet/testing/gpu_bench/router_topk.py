"""Router selection beside its torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from moejet.kernels.card import Card
from moejet.ops.router_topk import router_topk, router_topk_ref
from moejet.presets import PRESETS
from moejet.testing.gpu_bench.case import Case, Run


def cases(card: Card) -> Iterator[Case]:
    for name in ("deepseek-v3", "deepseek-v2-lite"):
        config = PRESETS[name]
        for tokens in (1, 64, 4096):
            size = tokens * (config.num_experts * 4 + config.num_experts_per_tok * 8)
            yield Case(f"{name}, {tokens} tokens", partial(_build, tokens, name), bytes=size)


def _build(tokens: int, name: str) -> tuple[Run, Run]:
    config = PRESETS[name]
    logits = torch.randn(tokens, config.num_experts, device="cuda")
    bias = torch.randn(config.num_experts, device="cuda") * 0.1
    bias_or_none = bias if config.scoring_func == "sigmoid" else None
    return (
        lambda: router_topk(logits, bias_or_none, config)[1],
        lambda: router_topk_ref(logits, bias_or_none, config)[1],
    )
