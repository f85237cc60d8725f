"""Where and with what a benchmark runs: part of every line that it writes."""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moejet
from moejet import topology

if TYPE_CHECKING:
    from moejet.ceilings import Meter

# What every result line says; `moment` says the first two again for a line that comes later.
PROVENANCE = (
    *("time", "load_average", "commit", "dirty", "cpu", "allowed_cpus", "instruction_sets"),
    *("threads", "memory_read_gbps", "kernel", "versions"),
)
_READ_SECONDS = 0.15


def describe_environment(meter: "Meter | None" = None) -> dict[str, Any]:
    """The fields of PROVENANCE. Reads memory for about a second.

    meter: of the threads that are about to be measured; without one, those that an engine takes by itself are named.
    """
    versions = {"moejet": moejet.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit, is_dirty = git_state(Path(moejet.__file__).resolve().parent)
    return {
        **moment(),  # before the reads, which are a load themselves
        "commit": commit,
        "dirty": is_dirty,
        "cpu": topology.cpu_model(),
        "allowed_cpus": len(topology.allowed_cpus()),
        "instruction_sets": _instruction_sets(),
        **_read_memory(meter),
        "kernel": platform.release(),
        "versions": versions,
    }


def moment() -> dict[str, Any]:
    """The time, and how many threads wanted to run over the last 1, 5 and 15 minutes; None if nobody knows."""
    try:
        load = [round(value, 2) for value in os.getloadavg()]
    except OSError:
        load = None
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "load_average": load}


def _instruction_sets() -> list[str]:
    """Those of the kernels that run on this machine, emulated ones left out."""
    from moejet.extension import load_extension

    isas = load_extension().cpu_info()["isas"]
    return [name for name, state in isas.items() if state["usable"] and "emulated" not in name]


def _read_memory(meter: "Meter | None") -> dict[str, Any]:
    if meter is not None:
        return {"threads": meter.threads, "memory_read_gbps": meter.read(_READ_SECONDS).value}
    from moejet.ceilings import Meter
    from moejet.experts.cpu_experts import create_pool

    pool = create_pool(pin=False)  # children inherit what this thread is pinned to
    try:
        return _read_memory(Meter(pool))
    finally:
        pool.close()


def summary(environment: dict[str, Any]) -> str:
    """The processor, its load, versions and commit in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = "" if not environment["commit"] else f" at {environment['commit'][:10]}"
    dirty = " with local changes" if environment["dirty"] else ""
    load = environment["load_average"]
    busy = "" if load is None else f", load {load[0]:.1f}"
    return (
        f"{environment['cpu']}, {environment['threads']} threads{busy} · {versions}{commit}{dirty}"
    )


def git_state(package: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that `package` is part of; None where it is not.

    A virtual environment often lies inside somebody else's repository: only a checkout that
    tracks the package's own source counts.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None  # no git, or not a checkout
        return done.stdout.strip()

    if not git("ls-files", "--error-unmatch", "__init__.py"):
        return None, None
    # Results of earlier benchmarks do not change what is measured.
    outputs = [f":(top,exclude)bench/{name}" for name in ("results", "figures")]
    status = git("status", "--porcelain", "--", ":/", *outputs)
    return git("rev-parse", "HEAD"), None if status is None else bool(status)
