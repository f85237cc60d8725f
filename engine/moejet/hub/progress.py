"""How a download goes: counted bytes, rate, time left, and who is told about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from moejet.hub.listing import HubFile
from moejet.progress import ProgressLine, bar, duration, gib


@dataclass(frozen=True, slots=True)
class TransferProgress:
    """State after some more bytes: `bytes_before` were here when the download began."""

    bytes_done: int
    bytes_total: int
    bytes_before: int
    elapsed_s: float
    verb: str = "fetching"

    @property
    def bytes_per_s(self) -> float:
        return max(0, self.bytes_done - self.bytes_before) / max(self.elapsed_s, 1e-9)

    def __str__(self) -> str:
        share = self.bytes_done / self.bytes_total if self.bytes_total else 1.0
        text = (
            f"{self.verb} {bar(share)} · {gib(self.bytes_done)} of {gib(self.bytes_total)} · "
            f"{self.bytes_per_s / 1e6:.1f} MB/s"
        )
        if self.bytes_per_s > 0:
            left = (self.bytes_total - self.bytes_done) / self.bytes_per_s
            text += f" · {duration(left)} left"
        return text


class Reporter:
    """Told about a download as it goes, from several threads, one call at a time. Says nothing."""

    def plan(self, files: Sequence[HubFile], total: int, present: int) -> None:
        """Before the weights: all files, their bytes, and how many of these are here already."""

    def progress(self, progress: TransferProgress) -> None:
        """Some bytes came, or were checked."""

    def file_done(self, file: HubFile, progress: TransferProgress) -> None:
        """A file is complete and has the hash that it should have."""

    def close(self) -> None:
        """The end, good or bad."""


class LineReporter(Reporter):
    """Redraws one line of stderr, if that is a terminal."""

    def __init__(self) -> None:
        self._line = ProgressLine()

    def progress(self, progress: TransferProgress) -> None:
        self._line.update(progress)

    def close(self) -> None:
        self._line.close()


class Counter:
    """Adds up the bytes of several threads and passes the sum on."""

    def __init__(self, reporter: Reporter, total: int, before: int, verb: str = "fetching"):
        self._reporter = reporter
        self._total = total
        self._before = before
        self._verb = verb
        self._done = before
        self._lock = threading.Lock()
        self._start = time.monotonic()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._reporter.progress(self._state())

    def file_done(self, file: HubFile) -> None:
        with self._lock:
            self._reporter.file_done(file, self._state())

    @property
    def transferred(self) -> int:
        return self._done - self._before

    def _state(self) -> TransferProgress:
        elapsed = time.monotonic() - self._start
        return TransferProgress(self._done, self._total, self._before, elapsed, self._verb)
