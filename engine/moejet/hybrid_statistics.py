"""What a step of the hybrid runtime was made of: arithmetic on what was read off it (`moejet.hybrid_timing`).

Measured of equal steps:

  wall     from the call of the runner to its result
  span     between two events on the GPU's stream, before the first and after the last operation of the step
  alone    the span of steps in which the CPU answers at once, with zeros: the GPU's share, hand-over included
  cpu      the CPU's time in expert kernels, by the bridge's own clock
  handover of a graph that does nothing but hand rows over and take them back, per layer

and from these, because neither side can see the other at work:

  waiting  span - alone            the GPU waited for experts
  overlap  (cpu - waiting) / cpu   the part of the CPU's time in which the GPU was not waiting
  host     wall - span             before and after the GPU's share: filling inputs, launching, taking the result
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GB = 1e9


@dataclass(frozen=True, slots=True)
class HandOver:
    """Bytes over the bus that every step moves for the CPU's share: of `rows` rows in each of `layers` layers.

    inputs, results: of the step itself, its embeddings and what it gives back.
    """

    rows: int
    layers: int
    hidden_size: int
    top_k: int
    value_bytes: int
    inputs: int = 0
    results: int = 0

    @property
    def to_cpu(self) -> int:
        """Activations, expert ids and weights; and the result."""
        row = self.hidden_size * self.value_bytes + 8 * self.top_k
        return self.rows * self.layers * row + self.results

    @property
    def to_gpu(self) -> int:
        """Sums over experts; and the inputs."""
        return self.rows * self.layers * self.hidden_size * self.value_bytes + self.inputs


@dataclass(frozen=True, slots=True)
class Readings:
    """What was read off a number of equal steps; seconds, bytes. None: not there, or not measured.

    asked_experts: distinct experts of all layers that the steps' tokens asked for, wherever they live · streamed_bytes,
    fetched_bytes: expert weights to the GPU, for prompts and for its cache, copy_s: how long those copies took.
    """

    num_tokens: int
    wall_s: Sequence[float]
    span_s: Sequence[float]
    alone_s: Sequence[float]
    cpu_s: float
    cpu_wait_s: float
    cpu_layers: int
    cpu_experts: int
    cpu_bytes: int
    handover_s: float | None
    hand_over: HandOver
    asked_experts: float | None = None
    streamed_bytes: int = 0
    fetched_bytes: int = 0
    copy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ceilings:
    """GB/s of this machine, measured in the same run: the GPU's copies count bytes read and written."""

    dram_read: float | None = None
    host_to_device: float | None = None
    device_to_host: float | None = None
    device_copy: float | None = None


@dataclass(frozen=True, slots=True)
class Vram:
    """Bytes: what the plan says and may use; the allocator's peaks; what all programs together take of the card."""

    planned: int
    budget: int
    allocated: int | None = None
    reserved: int | None = None
    device_used: int | None = None
    device_total: int | None = None


def derive(readings: Readings, ceilings: Ceilings, vram: Vram | None = None) -> dict[str, Any]:
    """The figures of a step, for JSON; times are medians in milliseconds unless their name says otherwise."""
    r, steps = readings, len(readings.wall_s)
    wall, span = statistics.median(r.wall_s), statistics.median(r.span_s)
    alone = statistics.median(r.alone_s) if r.alone_s else None
    cpu = r.cpu_s / steps
    waiting = None if alone is None else min(max(0.0, span - alone), span)
    overlap = None
    if waiting is not None and cpu > 0.0:
        overlap = min(1.0, max(0.0, (cpu - waiting) / cpu))
    cpu_gbps = _rate(r.cpu_bytes, r.cpu_s)
    copied = (r.streamed_bytes + r.fetched_bytes) / steps
    to_gpu = r.hand_over.to_gpu + copied
    return {
        "steps": steps,
        "num_tokens": r.num_tokens,
        "tokens_per_s": r.num_tokens / wall,
        "wall_ms": 1e3 * wall,
        **_spread(r.wall_s),
        "span_ms": 1e3 * span,
        "alone_ms": None if alone is None else 1e3 * alone,
        "waiting_ms": None if waiting is None else 1e3 * waiting,
        "host_ms": 1e3 * (wall - span),
        "cpu_ms": 1e3 * cpu,
        "cpu_share": cpu / wall,
        "cpu_wait_ms": 1e3 * r.cpu_wait_s / steps,
        "cpu_gbps": cpu_gbps,
        "cpu_of_dram": _fraction(cpu_gbps, ceilings.dram_read),
        "overlap": overlap,
        "handover_us": None if r.handover_s is None else 1e6 * r.handover_s,
        "expert_hit_rate": _hit_rate(r),
        "pcie_to_cpu_bytes": r.hand_over.to_cpu,
        "pcie_to_gpu_bytes": round(to_gpu),
        "pcie_gbps": _rate(to_gpu, wall),
        "pcie_of_ceiling": _fraction(_rate(to_gpu, wall), ceilings.host_to_device),
        "streamed_bytes": round(r.streamed_bytes / steps),
        "fetched_bytes": round(r.fetched_bytes / steps),
        "copy_gbps": _rate(r.streamed_bytes + r.fetched_bytes, r.copy_s),
        "copy_of_ceiling": _fraction(
            _rate(r.streamed_bytes + r.fetched_bytes, r.copy_s), ceilings.host_to_device
        ),
        "ceilings": asdict(ceilings),
        "vram": None if vram is None else {**asdict(vram), **_vram_shares(vram)},
    }


def extrapolate(
    short: tuple[int, float], long: tuple[int, float], num_layers: int
) -> dict[str, Any]:
    """The step of a whole model from two slices of it, (layers, seconds), that differ in MoE layers alone.

    t(L) = t(long) + (L - long) * (t(long) - t(short)) / (long - short)
    """
    (few, few_s), (many, many_s) = short, long
    if not 0 < few < many <= num_layers:
        raise ValueError(
            f"layers {few} and {many} must differ and not exceed num_layers={num_layers}"
        )
    layer_s = (many_s - few_s) / (many - few)
    step_s = many_s + (num_layers - many) * layer_s
    return {
        "extrapolated": True,
        "formula": "t(L) = t(m) + (L - m) * (t(m) - t(n)) / (m - n)",
        "from_layers": [few, many],
        "from_ms": [1e3 * few_s, 1e3 * many_s],
        "layers": num_layers,
        "layer_ms": 1e3 * layer_s,
        "step_ms": 1e3 * step_s,
        "tokens_per_s": 1.0 / step_s if step_s > 0.0 else None,
    }


def drift(step_s: Sequence[float], part: int = 100) -> dict[str, Any]:
    """Medians of each `part` steps in milliseconds, and by how much the last differs from the first."""
    medians = [
        1e3 * statistics.median(step_s[i : i + part])
        for i in range(0, len(step_s) - len(step_s) % part or len(step_s), part)
    ]
    return {
        "steps": len(step_s),
        "part": part,
        "medians_ms": medians,
        "drift": medians[-1] / medians[0] - 1.0,
        "slowest_ms": 1e3 * max(step_s),
    }


def delta(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """What the counters of a bridge counted between two readings; layer_s of all layers together."""

    def total(counters: Mapping[str, Any], name: str) -> float:
        value = counters[name]
        return sum(value) if isinstance(value, list) else value

    return {name: total(after, name) - total(before, name) for name in after}


def _hit_rate(readings: Readings) -> float | None:
    """The part of the experts asked for that live on the GPU."""
    if not readings.asked_experts:
        return None
    return min(1.0, max(0.0, 1.0 - readings.cpu_experts / readings.asked_experts))


def _vram_shares(vram: Vram) -> dict[str, float | None]:
    return {
        "reserved_of_plan": _fraction(vram.reserved, vram.planned),
        "reserved_of_budget": _fraction(vram.reserved, vram.budget),
    }


def _spread(samples: Sequence[float]) -> dict[str, float | None]:
    if len(samples) < 2:
        return {"wall_ms_p20": None, "wall_ms_p80": None}
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return {"wall_ms_p20": 1e3 * low, "wall_ms_p80": 1e3 * high}


def _rate(num_bytes: float, seconds: float) -> float | None:
    """GB/s; None where nothing was moved."""
    return num_bytes / seconds / GB if num_bytes > 0 and seconds > 0.0 else None


def _fraction(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
