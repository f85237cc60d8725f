"""The files of packed weights in their directory, whatever is in them; `packed_cache` writes and reads them."""

from __future__ import annotations

from pathlib import Path

from moejet import atomic_file

SUFFIX = ".packed"


def cache_files(directory: Path) -> list[Path]:
    """Finished cache files, the least recently used first."""
    if not directory.is_dir():
        return []
    return sorted(directory.glob(f"*{SUFFIX}"), key=lambda f: f.stat().st_mtime)


def abandoned_files(directory: Path) -> list[Path]:
    """Temporary files whose writer is dead."""
    return atomic_file.abandoned_files(directory, SUFFIX)


def sweep(directory: Path) -> list[Path]:
    """Removes what dead writers left; returns the files removed."""
    files = abandoned_files(directory)
    for file in files:
        file.unlink(missing_ok=True)
    return files
