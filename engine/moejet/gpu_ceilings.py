"""What a GPU's memory and its bus can do at most, beside `ceilings` for the CPU: medians of copies of a few ms."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from moejet.hybrid_statistics import GB

_SAMPLES = 7
# Far more than an L2 cache holds, little enough to fit beside a model that fills the card.
_DEVICE_BYTES, _HOST_BYTES = 256 << 20, 64 << 20
_MIN_BYTES = 8 << 20


def measure_gpu(device: torch.device) -> dict[str, float | None]:
    """GB/s of copies from pinned memory and back, and within the GPU's memory, where bytes read and written count.

    None where not even small buffers fit beside what is allocated.
    """

    def empty(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=device)

    def between(count: int, to_device: bool) -> float:
        there = empty(count).random_()
        here = torch.empty(count, dtype=torch.uint8, pin_memory=True).fill_(7)
        source, target = (here, there) if to_device else (there, here)
        return count / _seconds(lambda: target.copy_(source, non_blocking=True)) / GB

    def within(count: int) -> float:
        # Two pairs in turn: what one copy leaves in the cache the next does not find.
        pairs = [(empty(count // 4).random_(), empty(count // 4)) for _ in range(2)]

        def copy() -> None:
            for source, target in pairs:
                target.copy_(source)

        return 2 * 2 * (count // 4) / _seconds(copy) / GB

    try:
        return {
            "host_to_device": _fitting(_HOST_BYTES, lambda count: between(count, True)),
            "device_to_host": _fitting(_HOST_BYTES, lambda count: between(count, False)),
            "device_copy": _fitting(_DEVICE_BYTES, within),
        }
    finally:
        torch.cuda.empty_cache()


def _fitting(count: int, measure: Callable[[int], float]) -> float | None:
    while count >= _MIN_BYTES:
        try:
            return measure(count)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            count //= 2
    return None


def _seconds(run: Callable[[], object]) -> float:
    """Median by events; the first run is a warm-up."""
    run()
    samples: list[float] = []
    for _ in range(_SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)
