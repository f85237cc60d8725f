"""One case of a GPU benchmark: what runs, what it must move and compute, what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moejet.kernels.card import Card

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """`build` makes inputs on the GPU and returns our run and a peer's, or None; both give the same answer.

    bytes must be moved at least (each input read once, each output written once), flops computed.
    """

    name: str
    build: Callable[[], tuple[Run, Run | None]]
    bytes: int
    flops: int = 0


# Largest relative difference (Frobenius norm) between our answer and the peer's in bf16; a kernel that is wrong
# differs by far more.
MAX_DIFFERENCE = 0.05
KERNELS = (
    "rms_norm",
    "linear",
    "moe_experts",
    "unpack_experts",
    "mla_decode",
    "mla_prefill",
    "gather_latent",
    "fused_add_rms_norm",
    "silu_mul",
    "mla_prepare",
    "router_topk",
    "sample",
    "top_logits",
)


def cases_of(kernel: str, card: Card) -> list[Case]:
    """The cases of one kernel of KERNELS on this card."""
    return list(import_module(f"moejet.testing.gpu_bench.{kernel}").cases(card))


@cache
def copy_bandwidth() -> float:
    """Bytes per second of a copy within the GPU's memory, read and written bytes together."""
    free, _ = torch.cuda.mem_get_info()
    source = torch.empty(min(2 << 30, free // 8), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_ms(lambda: target.copy_(source))[0] / 1e3)


@cache
def matmul_rate() -> float:
    """Operations per second of torch's bf16 product of two random 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / (time_ms(lambda: a @ b)[0] / 1e3)


def time_ms(run: Run) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds, from a CUDA graph and with a cold L2."""
    from triton.testing import do_bench

    low, median, high = do_bench(_captured(run), warmup=20, rep=100, quantiles=[0.2, 0.5, 0.8])
    return median, low, high


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of theirs; NaN where either is not finite."""
    ours, theirs = ours.double(), theirs.double()
    return float(((ours - theirs).norm() / theirs.norm()).item())


def _captured(run: Run) -> Callable[[], object]:
    """run as one graph launch: what a launch costs in Python is not the kernel's time."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
