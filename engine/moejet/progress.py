"""A one-line progress display for terminals, and how shares, durations, sizes and counts are written."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class ProgressLine:
    """Redraws one line of `stream` at most ten times a second and wipes it at the end."""

    def __init__(self, *, enabled: bool | None = None, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.enabled = self.stream.isatty() if enabled is None else enabled
        self._drawn_at = 0.0
        self._width = 0

    def update(self, progress: object) -> None:
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


def bar(share: float) -> str:
    """Such as [######..................]  25%."""
    filled = int(share * 24)
    return f"[{'#' * filled}{'.' * (24 - filled)}] {share:4.0%}"


def duration(seconds: float) -> str:
    """Such as 2 h 5 min, 3 min 20 s, 8 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def gib(size: float) -> str:
    """Bytes for people: GiB, or MiB below 0.1 GiB, or KiB below 0.1 MiB."""
    if size >= 2**30 / 10:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"


def counted(number: int, noun: str, plural: str = "s") -> str:
    """Such as 1 file, 2 files."""
    return f"{number} {noun}{'' if number == 1 else plural}"
