"""Routed experts out of a table of slots, all of them resident: decode with few tokens, and prefill.

Bytes count the weights of every expert that is asked, once, with activations and results; FLOPs those of the pairs.
The peer is torch in bf16, one expert after the other over its tokens (their numbers are known on the host, which a
real step would have to wait for).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.kernels.card import Card
from moejet.ops.gpu_experts import gpu_experts
from moejet.weights.gpu_weights import GpuWeights

from .case import Case
from .linear import random_weights

Run = Callable[[], None]
# Experts in slots, chosen per token, hidden size, inner size. A layer of V3 is cut to what 24 GB hold in bf16.
MODELS = {"V3": (64, 8, 7168, 2048), "V2-Lite": (64, 6, 2048, 1408)}


def cases(card: Card) -> Iterator[Case]:
    for name, model in MODELS.items():
        experts, top_k, dim, inner = model
        for format in ("int4_g32", "fp8"):
            one = GpuWeights.empty(format, (3, inner, dim), "meta").nbytes
            for tokens in (1, 4, 16, 512, 4096):
                asked = routing(tokens, experts, top_k)[0].unique().numel()
                yield Case(
                    name=f"experts {name} {format} T={tokens}",
                    build=partial(build, format, model, tokens),
                    bytes=asked * one + 4 * tokens * dim,
                    flops=6 * tokens * top_k * dim * inner,
                )


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """topk_ids int32 and weights, on the CPU, the same every time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].int()
    return ids, torch.rand(tokens, top_k, generator=generator)


def build(format: str, model: tuple[int, int, int, int], tokens: int) -> tuple[Run, Run | None]:
    experts, top_k, dim, inner = model
    gate_up = random_weights(format, (experts, 2, inner, dim))
    down = random_weights(format, (experts, dim, inner))
    slot_of_expert = torch.randperm(experts).int().cuda()
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    ids, mix = routing(tokens, experts, top_k)
    # The same routing with the experts renamed: other weights in every run, in all more than any L2 holds.
    turns = 8 if tokens <= 16 else 1
    renamed = [((ids + turn * experts // turns) % experts).int().cuda() for turn in range(turns)]
    choices, mix = cycle(renamed), mix.cuda()

    def run() -> None:
        gpu_experts(x, next(choices), mix, slot_of_expert, gate_up, down)

    plain_gate_up = random_weights("bf16", (experts, 2 * inner, dim)).codes
    plain_down = random_weights("bf16", (experts, dim, inner)).codes
    turn_plans = cycle([plan(chosen.cpu(), experts) for chosen in renamed])

    def peer() -> None:
        out = torch.zeros_like(x)
        for expert, rows, column in next(turn_plans):
            gate, up = F.linear(x[rows], plain_gate_up[expert]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, plain_down[expert])
            out.index_add_(0, rows, result * mix[rows, column, None].to(result.dtype))

    return run, peer


def plan(ids: Tensor, experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, the places among their choices) for every expert that is asked, on the GPU."""
    found = [(expert, *(ids == expert).nonzero(as_tuple=True)) for expert in range(experts)]
    return [(e, rows.cuda(), columns.cuda()) for e, rows, columns in found if rows.numel()]
