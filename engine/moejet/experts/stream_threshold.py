"""From how many tokens on experts in RAM had better stream to the GPU than be computed on the CPU.

Streaming a layer takes about as long for one token as for thousands: its bytes have to cross PCIe. The CPU takes a time
per token, once there are enough of them to keep its matrix units busy. Where the two lines meet is the threshold:

    tokens = seconds in which a layer streams / seconds of the CPU per token

Both are measured when the weights are there. The measured stream includes unpacking and the GPU's own products, for as
many tokens as a step takes at most, up to 512. The CPU is given more and more tokens until it takes 0.2 seconds. Where
nothing can be measured, both are guessed: 20 GB/s over PCIe, and half a tera-operation per second on the CPU.
"""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import Tensor

from moejet.config import ModelConfig
from moejet.experts.expert_ring import ExpertRing
from moejet.experts.hybrid_experts import HybridExperts

logger = logging.getLogger(__name__)

_PCIE_BYTES, _CPU_OPERATIONS = 20e9, 0.5e12
_CPU_SECONDS = 0.2
_FIRST_TOKENS, _STREAM_TOKENS = 32, 512


def stream_threshold(
    ring: ExpertRing,
    layer: HybridExperts,
    model: ModelConfig,
    *,
    max_tokens: int,
    dtype: torch.dtype,
) -> int:
    """The number of tokens, at least 1, from which on a step streams.

    layer: the first one with experts in RAM · max_tokens: of a step · dtype: of activations on the device
    """
    if ring.device.type != "cuda":
        return guessed_threshold(ring.layer_bytes, model)
    per_token = cpu_seconds_per_token(layer, model, max_tokens=max_tokens, dtype=dtype)
    streaming = _stream_seconds(ring, model, min(max_tokens, _STREAM_TOKENS), dtype)
    tokens = max(1, math.ceil(streaming / per_token))
    logger.info(
        "a layer's experts stream in %.1f ms (%.1f GB/s), the CPU takes %.1f us per token: streaming from %d tokens on",
        1e3 * streaming,
        ring.layer_bytes / streaming / 1e9,
        1e6 * per_token,
        tokens,
    )  # fmt: skip
    return tokens


def guessed_threshold(layer_bytes: int, model: ModelConfig) -> int:
    """Of a machine that nothing is known about. layer_bytes: packed, of a layer's experts in RAM."""
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    per_token = 2 * expert * model.num_experts_per_tok / _CPU_OPERATIONS
    return max(1, math.ceil(layer_bytes / _PCIE_BYTES / per_token))


def _routing(model: ModelConfig, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Experts drawn at random: ids [T, K] int32, weights [T, K] fp32."""
    chances = torch.rand(tokens, model.num_experts, generator=generator)
    ids = chances.topk(model.num_experts_per_tok).indices.int()
    return ids, torch.full(ids.shape, 1.0 / model.num_experts_per_tok)


def cpu_seconds_per_token(
    layer: HybridExperts, model: ModelConfig, *, max_tokens: int, dtype: torch.dtype
) -> float:
    """Of many tokens, whose experts are drawn at random; those on the GPU are not computed."""
    assert layer.cpu is not None
    generator = torch.Generator().manual_seed(0)
    in_ram = torch.zeros(model.num_experts, dtype=torch.bool)
    in_ram[layer.in_ram] = True
    tokens, seconds = min(_FIRST_TOKENS, max_tokens), math.inf
    is_warm = False
    while True:
        x = torch.randn(tokens, model.hidden_size, generator=generator).to(dtype)
        ids, weights = _routing(model, tokens, generator)
        ids[~in_ram[ids.long()]] = -1
        out = torch.empty_like(x)
        start = time.perf_counter()
        layer.cpu.run_kernels(x, ids, weights, out)
        seconds = time.perf_counter() - start
        if not is_warm:
            is_warm = True
        elif seconds > _CPU_SECONDS or tokens >= max_tokens:
            return seconds / tokens
        else:
            tokens = min(2 * tokens, max_tokens)


def _stream_seconds(ring: ExpertRing, model: ModelConfig, tokens: int, dtype: torch.dtype) -> float:
    """Of the ring's first layer; the second time, when kernels are compiled."""
    device = ring.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, model.hidden_size, generator=generator).to(device, dtype)
    ids, weights = (part.to(device) for part in _routing(model, tokens, generator))
    sums = torch.zeros(x.shape, dtype=torch.float32, device=device)
    seconds = math.inf
    for _ in range(2):
        ring.drain()
        ring.reset()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        with ring.step():
            ring.add(0, x, ids, weights, sums)
            torch.cuda.current_stream(device).synchronize()
        seconds = time.perf_counter() - start
    ring.drain()
    ring.reset()
    return seconds
