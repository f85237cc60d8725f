"""Measures what this machine can do at most: memory reads, and multiply-adds of every vector unit.

Benchmarks divide by these figures, measured in the same run and again beside every case, because
shared machines change their speed from minute to minute. A figure is the median of samples of about
10 ms, in the best of a few variants (streams per thread and prefetch distance; number of independent
sums; tile operands in registers or in L1). Operands are random: on zeros, matrix units run faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moejet import topology
from moejet.config import GGUF_FORMATS
from moejet.experts.cpu_experts import create_pool
from moejet.extension import load_extension

if TYPE_CHECKING:
    from moejet._C import ReadProbe, ThreadPool

DRAM_READ = "dram_read"
# Streams per thread and prefetch distance in bytes; 0: the processor's own prefetching only.
_READ_VARIANTS = {
    "1 stream": (1, 0),
    "1 stream, prefetch 2048": (1, 2048),
    "2 streams": (2, 0),
    "2 streams, prefetch 2048": (2, 2048),
    "4 streams": (4, 0),
    "4 streams, prefetch 2048": (4, 2048),
    "4 streams, prefetch 4096": (4, 4096),
    "8 streams, prefetch 2048": (8, 2048),
}
_TRIAL_SECONDS = 0.06
_MIN_BUFFER, _MAX_BUFFER = 512 << 20, 4 << 30

# Instruction set -> arithmetic of a kernel -> the ceiling that bounds it.
_BOUNDS: dict[str, dict[str, str]] = {
    "avx2": {"int8": "avx2_int8", "bf16": "avx2_fma_f32", "fp32": "avx2_fma_f32"},
    "avx512": {"int8": "avx512_vnni_int8", "bf16": "avx512_fma_f32", "fp32": "avx512_fma_f32"},
    "avx512_bf16": {
        "int8": "avx512_vnni_int8",
        "bf16": "avx512_bf16_dot",
        "fp32": "avx512_fma_f32",
    },
    "amx": {"int8": "amx_int8", "bf16": "amx_bf16", "fp32": "avx512_fma_f32"},
}
_INTEGER_FORMATS = ("int4_g32", "int8", "native", *GGUF_FORMATS)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One figure: GB/s, TFLOP/s or (integers) TOP/s; a multiply-add counts as two operations.

    value: median over the best variant's samples, None where `reason` says why it is missing
    low, high: the samples' 20th and 80th percentile · variants: the median of each one tried
    """

    name: str
    unit: str
    threads: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    variant: str | None = None
    variants: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class Meter:
    """Measures the ceilings of one pool, as often as wanted.

    The first measurement of a ceiling tries all variants, later ones use the best. Reading needs
    memory of `num_bytes`, None: `read_buffer_bytes(pool.num_threads)`; it is taken when first used.
    """

    def __init__(
        self, pool: ThreadPool, *, isa: str = "auto", num_bytes: int | None = None
    ) -> None:
        self._C = load_extension()
        self.pool, self.isa = pool, isa
        self.num_bytes = num_bytes or read_buffer_bytes()
        self._probe: ReadProbe | None = None
        self._best: dict[str, str] = {}
        self._tried: dict[str, dict[str, float]] = {}

    @property
    def threads(self) -> int:
        return self.pool.num_threads

    def read(self, seconds: float = 0.3) -> Ceiling:
        """How fast the pool's threads together read memory that no cache holds, in GB/s."""
        if self._probe is None:
            self._probe = self._C.ReadProbe(self.num_bytes, self.pool)
        probe = self._probe

        def sample(variant: str, seconds: float) -> list[float]:
            return probe.measure(*_READ_VARIANTS[variant], seconds, self.pool, self.isa)

        return self._measure(DRAM_READ, "GB/s", 1e9, list(_READ_VARIANTS), sample, seconds)

    def arithmetic(self, name: str, seconds: float = 0.3) -> Ceiling:
        """One of `arithmetic_names()`, in TFLOP/s or TOP/s; without a value where it cannot run."""
        known = self._C.arithmetic_ceilings()
        if name not in known:
            raise ValueError(f"name={name!r} is no ceiling: use one of {', '.join(known)}")
        unit = "TOP/s" if "int8" in name else "TFLOP/s"
        if known[name]["reason"]:
            return Ceiling(name, unit, self.threads, reason=known[name]["reason"])

        def sample(variant: str, seconds: float) -> list[float]:
            samples: list[float] = self._C.measure_arithmetic(name, variant, seconds, self.pool)
            return samples

        return self._measure(name, unit, 1e12, known[name]["variants"], sample, seconds)

    def _measure(
        self,
        name: str,
        unit: str,
        scale: float,
        variants: list[str],
        sample: Callable[[str, float], list[float]],
        seconds: float,
    ) -> Ceiling:
        if name not in self._best:
            tried = {v: statistics.median(sample(v, _TRIAL_SECONDS)) / scale for v in variants}
            self._tried[name] = tried
            self._best[name] = max(tried, key=tried.__getitem__)
        best = self._best[name]
        samples = [s / scale for s in sample(best, seconds)]
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
        value = statistics.median(samples)
        return Ceiling(
            name, unit, self.threads, value, low, high, best, self._tried[name] | {best: value}
        )


def measure_ceilings(
    pool: ThreadPool, *, seconds: float = 0.3, num_bytes: int | None = None
) -> list[Ceiling]:
    """Everything that can be measured, with one thread and with all threads of the pool.

    seconds: for each figure, beside the time for choosing the variant.
    """
    ceilings: list[Ceiling] = []
    single = None if pool.num_threads == 1 else create_pool(1)
    try:
        for some in (single, pool):
            if some is not None:
                meter = Meter(some, num_bytes=num_bytes)
                ceilings.append(meter.read(seconds))
                ceilings += [meter.arithmetic(name, seconds) for name in arithmetic_names()]
    finally:
        if single is not None:
            single.close()
    return ceilings


def arithmetic_names() -> list[str]:
    """The arithmetic ceilings, whether this machine can measure them or not."""
    return list(load_extension().arithmetic_ceilings())


def arithmetic_of(isa: str, weight_format: str, tiles: str) -> str:
    """What the expert kernels multiply in: "int8", "fp32", or "bf16" for bf16 or fp32 multiply-adds.

    AMX multiplies in bf16 unless the weights are fp32, and integer formats in what `tiles` says
    ("bf16" or "int8", as `CpuExperts.arithmetic`), except for a few rows per expert.
    """
    if weight_format == "fp32":
        return "fp32"
    if weight_format not in _INTEGER_FORMATS:
        return "bf16"
    return tiles if isa == "amx" else "int8"


def bounding_ceiling(isa: str, arithmetic: str) -> str | None:
    """The ceiling that bounds kernels of an instruction set, None for scalar and emulated ones."""
    return _BOUNDS.get(isa, {}).get(arithmetic)


def read_buffer_bytes() -> int:
    """Memory to read: far more than all last-level caches, at most 4 GiB and a quarter of what is free."""
    caches = topology.all_caches_bytes(topology.allowed_cpus()) or 0
    wanted = min(_MAX_BUFFER, max(_MIN_BUFFER, 8 * caches))
    available = topology.available_bytes()
    return wanted if available is None else max(1 << 20, min(wanted, available // 4))
