"""The process of `moejet serve`, and what /proc and /metrics say of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.clients import ask

ENGINE = Path(__file__).resolve().parents[2] / "engine"


class ServerProcess:
    """`moejet serve` with the embedded reasoner. Its log goes to a file: a pipe that nobody reads would stop it."""

    def __init__(
        self, options: Sequence[str], log: Path, environment: dict[str, str] | None = None
    ):
        self.log = log
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self._options = list(options)
        self._environment = {
            **{**os.environ, "PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"},
            **(environment or {}),
        }

    def start(self) -> None:
        """Returns once it answers; a second time on the same port."""
        command = [sys.executable, "-m", "moejet", "serve", "--port", str(self.port)]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*command, *self._options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for the benchmark
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if ":" not in line:
            raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")
        self.port = int(line.rsplit(":", 1)[1])

    @property
    def pid(self) -> int:
        assert self.process is not None, "it has been started"
        return self.process.pid

    @property
    def engine_pid(self) -> int | None:
        found = children(self.pid)
        return found[0] if found else None

    def stop(self, timeout_s: float = 90.0) -> int:
        """Its exit code."""
        assert self.process is not None, "it has been started"
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()

    def tracebacks(self) -> int:
        return self.log.read_text(errors="replace").count("Traceback")


def children(pid: int) -> list[int]:
    """Those that have not been waited for included."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        found = [(task / "children").read_text() for task in tasks]
    except OSError:
        return []
    return [int(text) for line in found for text in line.split()]


def cpu_s(pid: int | None) -> float:
    """Processor time of a process so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process: open files, threads, children, and resident MB: its own, pages of mapped files, shared memory."""

    anon_mb: float
    file_mb: float
    shmem_mb: float
    files: int
    threads: int
    children: int

    @property
    def mb(self) -> float:
        return self.anon_mb + self.file_mb + self.shmem_mb

    @classmethod
    def of(cls, pid: int | None) -> Usage | None:
        """None if there is no such process."""
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            files = len(os.listdir(f"/proc/{pid}/fd"))
            threads = len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            return None
        lines = dict(line.split(":", 1) for line in status.splitlines())
        if pid is None or "RssAnon" not in lines:  # it has ended, and nobody has waited for it
            return None
        anon, file, shmem = (
            int(lines[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile", "RssShmem")
        )
        return cls(anon, file, shmem, files, threads, len(children(pid)))


Metrics = dict[tuple[str, str], float]


async def scrape(port: int) -> Metrics:
    """Values of /metrics by (name without prefix, labels without the model's name)."""
    _, content = await ask(port, "/metrics")
    found: Metrics = {}
    for line in content.decode().splitlines():
        head, _, value = line.rpartition(" ")
        if line.startswith("moejet:"):
            name, _, labels = head.removeprefix("moejet:").removesuffix("}").partition("{")
            kept = [part for part in labels.split(",") if not part.startswith("model_name=")]
            found[name, ",".join(kept)] = float(value)
    return found


def total(metrics: Metrics, name: str, label: str = "") -> float:
    """Sum over the labels of a name that hold a text."""
    return sum(v for (n, labels), v in metrics.items() if n == name and label in labels)


def quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds."""
    if not seconds:
        return None
    values = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        n: round(1e3 * values[min(len(values) - 1, int(q * len(values)))], 3) for n, q in at.items()
    }
