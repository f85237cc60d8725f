"""Steps of a small model that is nothing but routed experts, through a bridge and without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moejet.experts.bridge import CpuBridge
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.simulated_stream import SimulatedStream
from moejet.testing.fake_cuda import FakeStream

if TYPE_CHECKING:
    from moejet import _C

EXPERTS, HIDDEN, INTER, TOP_K, LAYERS, MAX_TOKENS = 5, 96, 80, 2, 3, 40

AnyStream = SimulatedStream | FakeStream
MakeStream = Callable[..., AnyStream]  # (seed, max_delay_s)


def make_layers(
    pool: _C.ThreadPool, format: str = "int4_g32", isa: str = "auto"
) -> list[CpuExperts]:
    made = []
    for seed in range(LAYERS):
        experts = CpuExperts(EXPERTS, HIDDEN, INTER, format=format, pool=pool, isa=isa)
        experts.fill_random(seed)
        made.append(experts)
    return made


def random_routing(num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids [L, T, K] i32 with some -1, weights [L, T, K])."""
    ids = torch.rand(LAYERS, num_tokens, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    ids[..., 1][torch.rand(ids.shape[:-1], generator=generator) < 0.3] = -1
    return ids.int(), torch.rand(ids.shape, generator=generator)


def chain(layers: Sequence[CpuExperts], x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
    """Each layer's experts on the previous layer's result, without the bridge."""
    for layer, i, m in zip(layers, ids, mix, strict=True):
        out = torch.empty_like(x)
        layer.run_kernels(x, i, m, out)
        x = out
    return x


class Step:
    """`chain` through a bridge, captured for num_tokens tokens."""

    def __init__(
        self, bridge: CpuBridge, stream: AnyStream, num_tokens: int, dtype: torch.dtype
    ) -> None:
        self.bridge, self.stream, self.num_tokens = bridge, stream, num_tokens
        self.x = torch.empty(num_tokens, HIDDEN, dtype=dtype)
        self.ids = torch.empty(LAYERS, num_tokens, TOP_K, dtype=torch.int32)
        self.mix = torch.empty(LAYERS, num_tokens, TOP_K)
        with stream.capture() as graph:
            self.out = self.enqueue()
        self.replay = graph.replay

    def enqueue(self) -> Tensor:
        x = self.x
        for layer in range(LAYERS):
            self.bridge.submit(layer, x, self.ids[layer], self.mix[layer])
            x = self.bridge.collect(layer)
        return x

    def set(self, x: Tensor, ids: Tensor, mix: Tensor) -> None:
        self.x.copy_(x)
        self.ids.copy_(ids)
        self.mix.copy_(mix)

    def launch(self) -> None:
        self.out.fill_(123.0)
        self.replay()

    def run(self) -> Tensor:
        self.launch()
        self.bridge.run_step(self.num_tokens)
        self.stream.synchronize()
        return self.out


def make_bridge(layers: Sequence[CpuExperts], stream: AnyStream, **changes: Any) -> CpuBridge:
    options = {"top_k": TOP_K, "max_tokens": MAX_TOKENS, "dtype": torch.float32, **changes}
    return CpuBridge(layers, stream, **options)


def example(
    layers: Sequence[CpuExperts], num_tokens: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Inputs of a step, and its result."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    inputs = (x, *random_routing(num_tokens, generator))
    return inputs, chain(layers, *inputs)


def make_step(
    layers: Sequence[CpuExperts], stream: AnyStream, num_tokens: int = 3, **changes: Any
) -> tuple[Step, Tensor]:
    """A step that is ready to run, and its result."""
    step = Step(make_bridge(layers, stream, **changes), stream, num_tokens, torch.float32)
    inputs, expected = example(layers, num_tokens, seed=7)
    step.set(*inputs)
    return step, expected
