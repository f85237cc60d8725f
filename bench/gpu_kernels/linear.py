"""Products with quantised weights: decode with few tokens, prefill, and one matrix per head.

Bytes count the weights once, activations and results; the peer is torch.matmul with the same weights in bf16, which
are read from memory just as often: runs rotate over copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch

from moejet.kernels.card import Card
from moejet.ops.gpu_linear import gpu_linear
from moejet.weights.gpu_weights import GpuWeights

from .case import Case

ROTATED = 512 << 20  # bytes of weights that runs rotate over, far beyond any L2
Run = Callable[[], None]
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
                    name=f"linear {name} {format} T={tokens}",
                    build=partial(build, format, shape, tokens),
                    bytes=GpuWeights.empty(format, shape, "meta").nbytes + activations,
                    flops=2 * tokens * math.prod(shape),
                )


def build(format: str, shape: tuple[int, ...], tokens: int) -> tuple[Run, Run | None]:
    def copies(size: int) -> int:
        return max(1, math.ceil(ROTATED / size)) if tokens <= 16 else 1

    first = random_weights(format, shape)
    others = (random_weights(format, shape) for _ in range(copies(first.nbytes) - 1))
    weights = cycle([first, *others])
    x = torch.randn(tokens, *shape[:-2], shape[-1], device="cuda", dtype=torch.bfloat16)
    plain = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for _ in range(copies(2 * math.prod(shape)))
    ]
    transposed = cycle([w.mT for w in plain])

    def run() -> None:
        gpu_linear(x, next(weights))

    def peer() -> None:
        if x.dim() == 2:
            torch.matmul(x, next(transposed))
        else:
            torch.bmm(x.transpose(0, 1), next(transposed))

    return run, peer


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
