"""Times one layer of routed experts: random routing, weights that no cache holds, answer checked first.

A case rotates over several layers of packed random weights. Beside its calls, memory reads and the
arithmetic ceiling are measured again and again, so that a busy machine is not taken for a slow
kernel. The roofline of a call is the longer of (bytes of the experts hit) / (read rate) and
(multiply-adds) / (arithmetic ceiling).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moejet import topology
from moejet.ceilings import Meter, arithmetic_of, bounding_ceiling
from moejet.config import ModelConfig
from moejet.experts.cpu_experts import CpuExperts
from moejet.testing.moe_layers import activations, relative_error, tolerance

_MEMORY_SHARE = 0.6  # of the available memory, for weights
_BURST_SECONDS = 0.03  # of measuring ceilings, between the calls of a case
_BURST_EVERY_SECONDS = 0.4
_MIN_CALLS = 3
_BF16_ROUNDING = 4e-3


class WrongAnswerError(Exception):
    """The kernels' result is not what float64 gives; there is no point in timing it."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """E experts of inner size I over hidden size D, of which each token takes K."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, config: ModelConfig, num_experts: int | None = None) -> LayerShape:
        experts = num_experts or config.num_experts
        if experts < config.num_experts_per_tok:
            raise ValueError(
                f"experts={experts} must be at least the {config.num_experts_per_tok} that each "
                "token takes"
            )
        return cls(
            config.hidden_size,
            config.moe_intermediate_size,
            experts,
            config.num_experts_per_tok,
        )

    def operations(self, num_tokens: int) -> int:
        """Two for each multiply-add of the three matrices."""
        matrices = 3 * self.hidden_size * self.intermediate_size
        return 2 * num_tokens * self.top_k * matrices


def plan_rotation(
    expert_bytes: int, num_experts: int, *, layers: int | None, wanted_bytes: float
) -> int:
    """Number of layers to rotate over: as asked, or enough for `wanted_bytes` and all caches.

    Raises ValueError if that many do not fit into memory.
    """
    caches = topology.all_caches_bytes(topology.allowed_cpus()) or 0
    wanted = max(wanted_bytes, 4 * caches)
    layer_bytes = num_experts * expert_bytes
    available = topology.available_bytes()
    room = float("inf") if available is None else _MEMORY_SHARE * available
    count = layers or max(1, min(math.ceil(wanted / layer_bytes), int(room / layer_bytes)))
    if count * layer_bytes > room:
        raise ValueError(
            f"{count} layers of {num_experts} experts take {count * layer_bytes / 1e9:.1f} GB, and "
            f"{room / 1e9:.1f} GB of memory can be used: choose fewer experts or layers"
        )
    return count


def fitting_experts(expert_bytes: int, num_experts: int) -> int:
    """As many of num_experts as fit into memory in one layer."""
    available = topology.available_bytes()
    if available is None:
        return num_experts
    return max(1, min(num_experts, int(_MEMORY_SHARE * available / expert_bytes)))


def random_routing(shape: LayerShape, num_tokens: int, call: int) -> Tensor:
    """topk_ids [T, K] i32: distinct experts, uniform; single tokens walk through all experts in turn."""
    if num_tokens == 1:
        first = call * shape.top_k
        ids = torch.arange(first, first + shape.top_k).remainder(shape.num_experts).unsqueeze(0)
    else:
        generator = torch.Generator().manual_seed(call)
        keys = torch.rand(num_tokens, shape.num_experts, generator=generator)
        ids = keys.topk(shape.top_k, dim=1).indices
    return ids.int()


def random_weights(shape: LayerShape, num_tokens: int) -> Tensor:
    """topk_weights [T, K] fp32 between 0 and 1."""
    return torch.rand(num_tokens, shape.top_k, generator=torch.Generator().manual_seed(0))


def check(layer: CpuExperts, shape: LayerShape, num_tokens: int) -> float:
    """Relative error of a call against float64 on the same packed weights; raises WrongAnswerError.

    The call is one that will be timed, but all experts except two have weight 0: the one with the
    most rows and the one with the fewest. That takes every token and every path of the kernels at
    the cost of two experts.
    """
    ids = random_routing(shape, num_tokens, 0)
    counts = torch.bincount(ids.flatten().long(), minlength=shape.num_experts)
    order = [int(e) for e in counts.argsort() if counts[e] > 0]
    chosen = sorted({order[0], order[-1]})
    mix = random_weights(shape, num_tokens) * torch.isin(ids, torch.tensor(chosen))
    x = activations(num_tokens, shape.hidden_size).bfloat16()
    truth = _truth(layer, x, ids, mix, chosen)
    out = torch.full((num_tokens, shape.hidden_size), float("nan"))
    layer.run_kernels(x, ids, mix, out)
    rounded = torch.full_like(out, float("nan"), dtype=torch.bfloat16)
    layer.run_kernels(x, ids, mix, rounded)
    error = relative_error(out, truth)
    limit = tolerance(layer.format, layer.isa, ids, layer.arithmetic)
    rounding = relative_error(rounded, out.double())
    if not error <= limit or not rounding <= _BF16_ROUNDING:
        raise WrongAnswerError(
            f"wrong answer with {layer.format} on {layer.isa} for {num_tokens} tokens: relative "
            f"error {error:.3g} (limit {limit:.3g}), bf16 against fp32 output {rounding:.3g}"
        )
    return error


def _truth(layer: CpuExperts, x: Tensor, ids: Tensor, mix: Tensor, chosen: list[int]) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in chosen:
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        gate, up, down = (w.double() for w in layer.dequantize(expert))
        xe = x[rows].double()
        hidden = torch.nn.functional.silu(xe @ gate.T) * (xe @ up.T)
        out[rows] += mix[rows, slots].double().unsqueeze(1) * (hidden @ down.T)
    return out


def time_case(
    layers: list[CpuExperts],
    shape: LayerShape,
    num_tokens: int,
    *,
    meter: Meter,
    seconds: float,
) -> dict[str, Any]:
    """The figures of one case."""
    layer = layers[0]
    arithmetic = arithmetic_of(layer.isa, layer.format, layer.arithmetic)
    bound = bounding_ceiling(layer.isa, arithmetic)
    read_gbps: list[float] = []
    peaks: list[float] = []

    def measure_ceilings() -> None:
        read_gbps.append(meter.read(_BURST_SECONDS).value or 0.0)
        if bound is not None and (peak := meter.arithmetic(bound, _BURST_SECONDS).value):
            peaks.append(peak)

    times_s: list[float] = []
    num_hit: list[int] = []
    measure_ceilings()
    burst = time.perf_counter()
    for took_s, hit in _calls(layers, shape, num_tokens, seconds):
        times_s.append(took_s)
        num_hit.append(hit)
        if time.perf_counter() - burst > _BURST_EVERY_SECONDS:
            measure_ceilings()
            burst = time.perf_counter()
    measure_ceilings()
    low, _, _, high = statistics.quantiles(times_s, n=5, method="inclusive")
    return {
        "calls": len(times_s),
        "ms_p50": 1e3 * statistics.median(times_s),
        "ms_p20": 1e3 * low,
        "ms_p80": 1e3 * high,
        "unique_experts": statistics.fmean(num_hit),
        "read_gbps": statistics.median(read_gbps),
        "ceiling": bound,
        "ceiling_tflops": statistics.median(peaks) if peaks else None,
    }


def _calls(
    layers: list[CpuExperts], shape: LayerShape, num_tokens: int, seconds: float
) -> Iterator[tuple[float, int]]:
    """(seconds, experts hit) of call after call, until the time is up and all weights were read."""
    x = activations(num_tokens, shape.hidden_size).bfloat16()
    out = torch.empty_like(x)
    mix = random_weights(shape, num_tokens)
    unread = sum(layer.nbytes for layer in layers)
    expert_bytes = layers[0].nbytes // shape.num_experts
    calls, total_s = 0, 0.0
    # The first call makes buffers and wakes workers; it does not count.
    layers[-1].run_kernels(x, random_routing(shape, num_tokens, 1 << 20), mix, out)
    while calls < _MIN_CALLS or total_s < seconds or (unread > 0 and total_s < 4 * seconds):
        ids = random_routing(shape, num_tokens, calls // len(layers))
        layer = layers[calls % len(layers)]
        start = time.perf_counter()
        layer.run_kernels(x, ids, mix, out)
        took_s = time.perf_counter() - start
        hit = len(set(ids.flatten().tolist()))
        yield took_s, hit
        unread -= hit * expert_bytes
        total_s += took_s
        calls += 1


def derive(figures: dict[str, Any], expert_bytes: int, operations: int) -> dict[str, Any]:
    """Rates, fractions and roofline of a case, from its times and ceilings; None without a ceiling."""
    num_bytes = figures["unique_experts"] * expert_bytes
    took_s = figures["ms_p50"] / 1e3
    gbps, tflops = num_bytes / took_s / 1e9, operations / took_s / 1e12
    read_s = num_bytes / (1e9 * figures["read_gbps"])
    peak = figures["ceiling_tflops"]
    roofline_s = read_s if peak is None else max(read_s, operations / (1e12 * peak))
    return {
        "bytes": round(num_bytes),
        "operations": operations,
        "gbps": gbps,
        "tflops": tflops,
        "fraction_of_dram": gbps / figures["read_gbps"],
        "fraction_of_peak": None if peak is None else tflops / peak,
        "roofline_ms": 1e3 * roofline_s,
        "over_roofline": took_s / roofline_s,
    }
