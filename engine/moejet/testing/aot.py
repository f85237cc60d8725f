"""Compiles for a GPU what a launcher launches, on a machine without one.

    with launches_compiled_for(CARDS[89]) as compiled:
        rms_norm(torch.empty(4, 7168, device="meta"), ...)
    assert compiled[0].shared <= CARDS[89].shared_memory

The launcher runs as it is, on meta tensors: kernel, types, alignments, constants and options are its own choice, so
that what compiles here is what would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moejet.kernels.card import Card, pretend


@dataclass(frozen=True)
class CompiledLaunch:
    """One compiled kernel: shared memory per block in bytes, registers per thread, spilled bytes per thread."""

    name: str
    num_warps: int
    num_stages: int
    shared: int
    registers: int
    spilled: int
    asm: dict[str, Any]


class _NoDevice:
    """Stands in for Triton's driver: knows the target, owns no device."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 1000 + int(self.target.arch)  # a key of Triton's caches which no device has

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches_compiled_for(card: Card) -> Iterator[list[CompiledLaunch]]:
    """Inside, launches compile for the card instead of running; the list grows by one per launch."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[CompiledLaunch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_describe(kernel))
        return kernel

    # No attribute of the driver is looked at before: there may be none on this machine.
    before = vars(driver).get("_active")
    driver.set_active(_NoDevice(card.capability))
    try:
        with patch.object(JITFunction, "run", compile_only), pretend(card):
            yield compiled
    finally:
        driver._active = before


def assert_fits(launch: CompiledLaunch, card: Card) -> None:
    """Raises AssertionError where the card would refuse the launch."""
    assert launch.shared <= card.shared_memory, (
        f"{launch.name}: {launch.shared} bytes of shared memory, "
        f"sm_{card.capability} has {card.shared_memory}"
    )
    registers = launch.registers * launch.num_warps * 32
    assert registers <= 65536, f"{launch.name}: {registers} registers per block, a card has 65536"


def _describe(kernel: Any) -> CompiledLaunch:
    metadata = kernel.metadata
    registers, spilled = _resources(kernel.asm["cubin"])
    return CompiledLaunch(
        name=metadata.name,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared=metadata.shared,
        registers=registers,
        spilled=spilled,
        asm=kernel.asm,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, from cuobjdump which comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"no resource usage in {text!r}"
    return int(found[1]), int(found[2])
