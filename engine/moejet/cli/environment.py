"""Where and with what a benchmark runs: part of every line that it writes."""

import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import moejet
from moejet import topology


def describe_environment() -> dict[str, Any]:
    """Time, commit and dirty flag, processor, kernel and versions."""
    versions = {"moejet": moejet.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit, is_dirty = git_state(Path(moejet.__file__).resolve().parent)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": is_dirty,
        "cpu": topology.cpu_model(),
        "allowed_cpus": len(topology.allowed_cpus()),
        "kernel": platform.release(),
        "versions": versions,
    }


def summary(environment: dict[str, Any]) -> str:
    """The processor, versions and commit in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = "" if not environment["commit"] else f" at {environment['commit'][:10]}"
    dirty = " with local changes" if environment["dirty"] else ""
    return f"{environment['cpu']} · {versions}{commit}{dirty}"


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
    status = git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return git("rev-parse", "HEAD"), None if status is None else bool(status)
