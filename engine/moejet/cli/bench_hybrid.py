"""What `moejet bench` adds on a GPU: where the time of a step goes, what crosses the bus, and what could at most.

"GPU" is the time between the first and the last operation of a step on the GPU's stream, "alone" the same while the CPU
answers at once with zeros: the GPU's share, hand-over included. "CPU" is the time in expert kernels, "of step" its
share, "of DRAM" its rate beside plain reads. The GPU waits for experts for the difference of GPU and alone; "overlap"
is the part of the CPU's time in which it does not. "hand-over" is what a layer costs in a graph that hands over and
takes back and does nothing else. "hits" are experts asked for that live on the GPU (of single requests).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moejet.cli.table import Column, Row, percent, write_table
from moejet.cli.terminal import note

if TYPE_CHECKING:
    from moejet.hybrid_statistics import Ceilings
    from moejet.llm import LLM

_GIB = 1 << 30
_MAX_STEPS, _MAX_PROMPTS = 32, 3
_WARM_UP = 3  # as in `hybrid_timing`


class HybridBench:
    """The figures of the steps of one model on a GPU."""

    def __init__(self, llm: LLM):
        from moejet.hybrid_statistics import Ceilings
        from moejet.hybrid_timing import Profile

        self._llm = llm
        runner: Any = llm.engine.runner
        measured: dict[str, float | None] = {}
        if runner.device.type == "cuda":
            import torch

            from moejet.gpu_ceilings import measure_gpu

            measured = measure_gpu(runner.device)
            torch.cuda.reset_peak_memory_stats(runner.device)
        self._ceilings: Ceilings = Ceilings(**measured)
        with llm.exclusive() as engine:
            self._profile = Profile(engine)

    def figures(self, test: Any, repetitions: int, read_gbps: float | None) -> Row | None:
        """Of one test of `bench`, whose context the cache holds; None for too few tokens."""
        from moejet.hybrid_statistics import derive

        with self._llm.exclusive():
            if test.kind == "pp":
                count = min(repetitions, _MAX_PROMPTS)
                readings = self._profile.prefill(count, test.num_tokens, test.depth)
            else:
                steps = min(_MAX_STEPS, (test.num_tokens - _WARM_UP) // 2)
                if steps < 1:
                    return None
                readings = self._profile.decode(steps, test.depth, test.batch)
            ceilings = replace(self._ceilings, dram_read=read_gbps)
            return derive(readings, ceilings, self._profile.vram())


def write_report(rows: Sequence[Row]) -> None:
    """The table of all tests that have figures, and what they are compared with."""
    rows = [row for row in rows if row.get("hybrid")]
    last = write_table(_COLUMNS, ({**row["hybrid"], "test": row["test"]} for row in rows))
    if last is not None:
        for line in describe_limits(last):
            note(line)


def describe_limits(figures: Row) -> list[str]:
    """The ceilings, and memory against the plan, in words."""
    ceilings, vram = figures["ceilings"], figures["vram"]
    names = (
        ("memory reads", "dram_read"),
        ("to the GPU", "host_to_device"),
        ("from it", "device_to_host"),
        ("copies within it", "device_copy"),
    )
    rates = [f"{text} {ceilings[key]:.1f} GB/s" for text, key in names if ceilings[key]]
    lines = ["ceilings: " + ", ".join(rates)] if rates else []
    if vram is None:
        return lines
    text = f"GPU memory: {vram['planned'] / _GIB:.2f} GiB planned of {vram['budget'] / _GIB:.2f}"
    if vram["reserved"] is not None:
        text += f", {vram['reserved'] / _GIB:.2f} reserved at most"
    if vram["device_used"] is not None:
        used, total = vram["device_used"] / _GIB, vram["device_total"] / _GIB
        text += f"; the card has {used:.2f} of {total:.2f} in use"
    return [*lines, text]


def _number(key: str, digits: int, unit: float = 1.0) -> Any:
    def text(row: Row) -> str:
        return "" if row[key] is None else f"{row[key] / unit:.{digits}f}"

    return text


def _share(key: str) -> Any:
    return lambda row: percent(row[key])


_COLUMNS: list[Column] = [
    ("test", 14, lambda row: str(row["test"])),
    ("step ms", 9, _number("wall_ms", 3)),
    ("GPU ms", 9, _number("span_ms", 3)),
    ("alone ms", 9, _number("alone_ms", 3)),
    ("CPU ms", 9, _number("cpu_ms", 3)),
    ("of step", 7, _share("cpu_share")),
    ("of DRAM", 7, _share("cpu_of_dram")),
    ("overlap", 7, _share("overlap")),
    ("hand-over us", 12, _number("handover_us", 1)),
    ("to CPU MB", 9, _number("pcie_to_cpu_bytes", 2, 1e6)),
    ("to GPU MB", 9, _number("pcie_to_gpu_bytes", 2, 1e6)),
    ("of PCIe", 7, _share("pcie_of_ceiling")),
    ("hits", 6, _share("expert_hit_rate")),
]
