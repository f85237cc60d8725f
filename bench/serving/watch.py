"""Memory, files, threads and children of processes over time, and whether they grow."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from serving.ledger import Ledger, fallen
from serving.process import Metrics, ServerProcess, Usage, scrape

_SETTLED = 0.5  # of a process's life: its memory is judged from there on
_MOST_GROWTH = 0.02  # of that memory, over the time that is judged, or
_MOST_MB = 2.0  # this, because allocators keep some of what they had; in
_SHORT_S = 600.0  # shorter lives, which are all warm-up,
_MOST_MB_SHORT = 16.0


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Per unit of the first coordinate: the median over all pairs (Theil and Sen), which outliers do not move."""
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if b[0] > a[0]]
    return statistics.median(slopes) if slopes else 0.0


@dataclass(slots=True)
class Life:
    """Of one process: (seconds since the run began, usage)."""

    pid: int
    samples: list[tuple[float, Usage]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.samples[-1][0] - self.samples[0][0] if self.samples else 0.0

    def trend(self) -> dict[str, Any]:
        """Of the memory in the second half of this life: medians of up to 60 parts of it."""
        begin = self.samples[0][0] + _SETTLED * self.seconds
        late = [(t, usage.mb) for t, usage in self.samples if t >= begin]
        size = max(1, -(-len(late) // 60))
        parts = [late[i : i + size] for i in range(0, len(late), size)]
        points = [
            (statistics.median(t for t, _ in part), statistics.median(mb for _, mb in part))
            for part in parts
        ]
        per_s = slope(points)
        growth = per_s * _SETTLED * self.seconds
        typical = statistics.median(mb for _, mb in points)
        most = _MOST_MB if self.seconds >= _SHORT_S else _MOST_MB_SHORT
        return {
            "minutes": round(self.seconds / 60, 2),
            "mb": round(typical, 1),
            "mb_per_hour": round(3600 * per_s, 2),
            "growth_mb": round(growth, 2),
            "is_flat": growth <= max(most, _MOST_GROWTH * typical),
            **self._kinds(),
        }

    def _kinds(self) -> dict[str, list[float]]:
        """MB of each kind of memory at the beginning, in the middle and at the end of this life."""
        last = len(self.samples) - 1
        usages = [self.samples[i][1] for i in (0, last // 2, last)]
        return {
            n: [round(getattr(u, n), 1) for u in usages] for n in ("anon_mb", "file_mb", "shmem_mb")
        }


class Watch:
    """Samples every process that it is told of, and asks the server for its metrics, until it is cancelled."""

    def __init__(self, server: ServerProcess, ledger: Ledger, period_s: float):
        self.lives: dict[str, list[Life]] = {"server": [], "engine": []}
        self.shared: set[str] = set()
        self.num_scrapes = 0
        self.scrape_s: list[float] = []
        self.others: dict[str, Callable[[], int | None]] = {}
        self.asking = asyncio.Lock()  # held while the server is asked, and so has a connection more
        self._server = server
        self._ledger = ledger
        self._period_s = period_s
        self._begin_s = time.perf_counter()

    async def run(self) -> None:
        last: tuple[int, Metrics] = (0, {})
        while True:
            self.sample()
            pid, begin_s = self._server.pid, time.perf_counter()
            try:
                async with self.asking:
                    found = await scrape(self._server.port)
            except (OSError, asyncio.IncompleteReadError):
                found = {}  # it is being started again, or was not: then others notice
            if found:
                self.num_scrapes += 1
                self.scrape_s.append(time.perf_counter() - begin_s)
                if last[0] == pid == self._server.pid:
                    for what in fallen(last[1], found):
                        self._ledger.violate("a counter has fallen", what)
                last = pid, found
            await asyncio.sleep(self._period_s)

    def sample(self) -> None:
        now = time.perf_counter() - self._begin_s
        pids = {"server": self._server.pid, "engine": self._server.engine_pid}
        pids |= {name: pid() for name, pid in self.others.items()}
        for name, pid in pids.items():
            usage = Usage.of(pid)
            if pid is None or usage is None:
                continue
            lives = self.lives.setdefault(name, [])
            if not lives or lives[-1].pid != pid:
                lives.append(Life(pid))
            lives[-1].samples.append((now, usage))
            self.shared |= shared_memory(pid)

    def longest(self, name: str) -> Life | None:
        return max(self.lives.get(name, ()), key=lambda life: life.seconds, default=None)

    def per_minute(self) -> list[dict[str, float]]:
        """Median memory of each process in every minute."""
        found: dict[int, dict[str, list[float]]] = {}
        for name, lives in self.lives.items():
            for life in lives:
                for seconds, usage in life.samples:
                    minute = found.setdefault(int(seconds // 60), {})
                    minute.setdefault(name, []).append(usage.mb)
        return [
            {"minute": minute, **{n: round(statistics.median(v), 1) for n, v in values.items()}}
            for minute, values in sorted(found.items())
        ]


def shared_memory(pid: int) -> set[str]:
    """Files in shared memory that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    paths = {line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}
    return {path for path in paths if not path.endswith(" (deleted)")}


def leftovers(directory: Path, kept: Callable[[Path], bool]) -> list[str]:
    """Files below a directory that should not be there."""
    return sorted(str(p) for p in directory.rglob("*") if p.is_file() and not kept(p))
