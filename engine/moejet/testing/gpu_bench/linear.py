"""Products with quantised weights: decode with few tokens, prefill, and one matrix per head.

Bytes count the weights once, activations and results; the peer is torch's product with the same weights in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from moejet.kernels.card import Card
from moejet.ops.gpu_linear import gpu_linear
from moejet.testing.gpu_bench.case import Case, Run
from moejet.weights.gpu_weights import GpuWeights, dequantize

# Leading dimensions (heads), outputs, inputs.
SHAPES = {
    "V3 o_proj": (7168, 16384),
    "V3 q_b": (24576, 1536),
    "V3 kv_a": (576, 7168),
    "V3 lm_head": (129280, 7168),
    "V3 absorbed": (128, 512, 128),
    "V2-Lite o_proj": (2048, 2048),
}


def cases(card: Card) -> Iterator[Case]:
    for name, shape in SHAPES.items():
        for format in ("int4_g32", "fp8", "int8"):
            for tokens in (1, 4, 16, 512, 4096):
                if tokens > 16 and (format == "int8" or name != "V3 o_proj"):
                    continue
                heads = shape[0] if len(shape) == 3 else 1
                activations = 2 * tokens * heads * (shape[-1] + shape[-2])
                yield Case(
                    name=f"{name} {format} T={tokens}",
                    build=partial(build, format, shape, tokens),
                    bytes=GpuWeights.empty(format, shape, "meta").nbytes + activations,
                    flops=2 * tokens * math.prod(shape),
                )


def build(format: str, shape: tuple[int, ...], tokens: int) -> tuple[Run, Run]:
    weights = random_weights(format, shape)
    plain = dequantize(weights).bfloat16()
    x = torch.randn(tokens, *shape[:-2], shape[-1], device="cuda", dtype=torch.bfloat16)

    def peer() -> Tensor:
        if x.dim() == 2:
            return x @ plain.mT
        return torch.bmm(x.transpose(0, 1), plain.mT).transpose(0, 1)

    return lambda: gpu_linear(x, weights), peer


def random_weights(format: str, shape: tuple[int, ...]) -> GpuWeights:
    """Random codes, and scales under which a product keeps the size of its input."""
    weights = GpuWeights.empty(format, shape, "cuda")
    if weights.scales is None:
        weights.codes.normal_(std=shape[-1] ** -0.5)
        return weights
    weights.codes.view(torch.uint8).random_(0, 256)
    spread = {"int4_g32": 4.6, "int8": 74.0, "fp8": 110.0}[format]
    if format == "fp8":
        weights.codes.bitwise_and_(0xF7)  # never NaN
    weights.scales.fill_(shape[-1] ** -0.5 / spread)
    return weights
