"""Routed experts out of a table of slots, all of them resident: decode with few tokens, and prefill.

Bytes count the weights of every expert that is asked, once, with activations and results; FLOPs those of the pairs.
The peer is torch in bf16, one expert after the other over its tokens (their numbers are known on the host, which a
real step would have to wait for).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.kernels.card import Card
from moejet.ops.gpu_experts import gpu_experts
from moejet.testing.gpu_bench.case import Case, Run
from moejet.testing.gpu_bench.linear import random_weights
from moejet.weights.gpu_weights import GpuWeights, dequantize

# Experts in slots, chosen per token, hidden size, inner size. A layer of V3 is cut to what 24 GB hold in bf16.
MODELS = {"V3": (64, 8, 7168, 2048), "V2-Lite": (64, 6, 2048, 1408)}


def cases(card: Card) -> Iterator[Case]:
    for name, model in MODELS.items():
        experts, top_k, dim, inner = model
        for format in ("int4_g32", "fp8"):
            one = GpuWeights.empty(format, (3, inner, dim), "meta").nbytes
            for tokens in (1, 4, 16, 512, 4096):
                asked = len(set(routing(tokens, experts, top_k)[0].flatten().tolist()))
                yield Case(
                    name=f"{name} {format} T={tokens}",
                    build=partial(build, format, model, tokens),
                    bytes=asked * one + 4 * tokens * dim,
                    flops=6 * tokens * top_k * dim * inner,
                )


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """topk_ids int32 and weights, on the CPU, the same every time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].int()
    return ids, torch.rand(tokens, top_k, generator=generator)


def build(format: str, model: tuple[int, int, int, int], tokens: int) -> tuple[Run, Run]:
    experts, top_k, dim, inner = model
    gate_up = random_weights(format, (experts, 2, inner, dim))
    down = random_weights(format, (experts, dim, inner))
    slot_of_expert = torch.randperm(experts).int().cuda()
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    ids, mix = (part.cuda() for part in routing(tokens, experts, top_k))
    slots = slot_of_expert.tolist()
    chosen = plan(ids, experts)
    plain = {
        expert: (
            dequantize(gate_up[slots[expert]]).bfloat16(),
            dequantize(down[slots[expert]]).bfloat16(),
        )
        for expert, _, _ in chosen
    }

    def peer() -> Tensor:
        out = torch.zeros(x.shape, device="cuda")
        for expert, rows, column in chosen:
            w_gate_up, w_down = plain[expert]
            gate, up = F.linear(x[rows], w_gate_up.flatten(0, 1)).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, w_down)
            out.index_add_(0, rows, result.float() * mix[rows, column, None])
        return out

    return lambda: gpu_experts(x, ids, mix, slot_of_expert, gate_up, down), peer


def plan(ids: Tensor, experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, the places among their choices) for every expert that is asked."""
    found = []
    for expert in range(experts):
        rows, columns = (ids == expert).nonzero(as_tuple=True)
        if rows.numel():
            found.append((expert, rows, columns))
    return found
