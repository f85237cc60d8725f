"""Unpacking streamed experts, which has no peer in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from moejet.experts.resident_experts import expert_slots
from moejet.kernels.card import Card
from moejet.ops.unpack_experts import unpack_experts
from moejet.testing.gpu_bench.case import Case, Run
from moejet.weights.packed_layout import PackedLayout

# (hidden, inner, experts) of DeepSeek-V3 and V2-Lite, as many as stream together.
_MODELS = {"V3": (7168, 2048, 3), "V2-Lite": (2048, 1408, 12)}


def cases(card: Card) -> Iterator[Case]:
    for model, (hidden, inner, experts) in _MODELS.items():
        for format in ("int4_g32", "int8", "fp8", "bf16", "q4_0"):
            layout = PackedLayout(hidden, inner, format, format)
            slots = expert_slots(experts, hidden, inner, format, format, "meta")
            size = experts * layout.expert_bytes + sum(weights.nbytes for weights in slots)
            yield Case(
                f"{experts} of {model}, {format}", partial(_build, layout, experts), bytes=size
            )


def _build(layout: PackedLayout, experts: int) -> tuple[Run, Run | None]:
    shape = (layout.hidden_size, layout.intermediate_size)
    gate_up, down = expert_slots(experts, *shape, layout.format, layout.down_format, "cuda")
    packed = torch.zeros(experts * layout.expert_bytes, dtype=torch.uint8, device="cuda")
    slots = torch.arange(experts, dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        unpack_experts(packed, slots, layout, gate_up, down)
        return gate_up.codes

    return run, None
