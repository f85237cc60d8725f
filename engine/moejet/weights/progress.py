"""A one-line progress display for loading: share, bytes, rate, time left; on a terminal only."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """State after one more piece was loaded."""

    bytes_done: int
    bytes_total: int
    elapsed_s: float
    tensor: str

    @property
    def gbps(self) -> float:
        return self.bytes_done / max(self.elapsed_s, 1e-9) / 1e9

    @property
    def remaining_s(self) -> float:
        if self.bytes_done == 0:
            return float("inf")
        return self.elapsed_s * (self.bytes_total - self.bytes_done) / self.bytes_done

    def __str__(self) -> str:
        share = self.bytes_done / self.bytes_total if self.bytes_total else 1.0
        filled = int(share * 24)
        left = "" if self.remaining_s == float("inf") else f" · {_duration(self.remaining_s)} left"
        return (
            f"loading [{'#' * filled}{'.' * (24 - filled)}] {share:4.0%} · "
            f"{self.bytes_done / 2**30:.2f} of {self.bytes_total / 2**30:.2f} GiB · "
            f"{self.gbps:.2f} GB/s{left}"
        )


class ProgressLine:
    """Redraws one line of `stream` at most ten times a second and wipes it at the end."""

    def __init__(self, *, enabled: bool | None = None, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.enabled = self.stream.isatty() if enabled is None else enabled
        self._drawn_at = 0.0
        self._width = 0

    def update(self, progress: LoadProgress) -> None:
        now = time.monotonic()
        if not self.enabled or now - self._drawn_at < 0.1:
            return
        self._drawn_at = now
        text = str(progress)
        self._write("\r" + text.ljust(self._width))
        self._width = len(text)

    def close(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
