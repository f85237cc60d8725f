"""The prefix cache's disk: blocks of latents, found by the hash of all tokens up to their end.

    DIRECTORY/MODEL-FINGERPRINT/*.blocks      segments: blocks that were written together (`block_file`)
    DIRECTORY/.lock                           held while segments are removed

A fingerprint stands for everything that decides about the latents, so models and settings never meet. Segments appear
complete, never change, and are checked when read; the index is in memory and comes from their headers. A damaged
segment is removed. Any number of processes may share the directory: they see each other's segments, and one that has
gone is a miss. The segments that were used least recently go when the size limit is reached.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moejet import block_file
from moejet.atomic_file import FREE_BYTES, abandoned_files
from moejet.block_file import BlockHeader, Bytes

logger = logging.getLogger(__name__)

SUFFIX = ".blocks"
_LOCK = ".lock"
_SEGMENT_BYTES = 64 << 20
_SEGMENT_BLOCKS = 256
# Directories change their time in ticks: two changes within one look like one.
_TICK_NS = 50_000_000


@dataclass(slots=True)
class _Segment:
    path: Path
    header: BlockHeader


class PrefixStore:
    """The segments of one fingerprint, within a directory limited to `max_bytes` for all of them.

    Two threads may use it: one that looks up and reads, one that writes.
    """

    def __init__(
        self, root: Path, *, model: str, fingerprint: str, block_bytes: int, max_bytes: int
    ):
        if max_bytes < 2 * block_bytes:
            raise ValueError(
                f"prefix_disk_gib={max_bytes / 2**30:g} does not hold two blocks of "
                f"{block_bytes / 2**20:.2f} MiB: raise it, or set it to 0"
            )
        slug = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-.") or "model"
        self.root = root
        self.directory = root / f"{slug[:60]}-{fingerprint}"
        self.fingerprint = fingerprint
        self.block_bytes = block_bytes
        self.max_bytes = max_bytes
        largest = min(_SEGMENT_BYTES, max_bytes // 8) // block_bytes
        self.segment_blocks = max(1, min(_SEGMENT_BLOCKS, largest))
        self._info = {"model": model}
        self._lock = threading.Lock()
        self._segments: dict[str, _Segment] = {}
        self._index: dict[bytes, tuple[_Segment, int]] = {}
        self._seen_ns = -1
        self.num_evictions = (
            0  # blocks of this fingerprint that this process has removed for want of room
        )
        self._staging = np.empty(block_bytes, np.uint8)
        self.refresh()

    @property
    def num_blocks(self) -> int:
        return len(self._index)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._index

    def refresh(self) -> None:
        """Takes notice of segments that other processes wrote or removed."""
        try:
            now_ns = time.time_ns()
            changed_ns = os.stat(self.directory).st_mtime_ns
        except OSError:
            changed_ns = 0
        if changed_ns == self._seen_ns:
            return
        with self._lock:
            names = self._list()
            for name in self._segments.keys() - names:
                self._forget(name)
            for name in sorted(names - self._segments.keys()):
                self._open(name)
            self._seen_ns = changed_ns if now_ns - changed_ns > _TICK_NS else -1

    def count(self, digests: Sequence[bytes]) -> int:
        """How many of these, from the first on, are here."""
        for i, digest in enumerate(digests):
            if digest not in self._index:
                return i
        return len(digests)

    def read(self, digests: Sequence[bytes], take: Callable[[int, Bytes], None]) -> int:
        """Calls take(i, block) for the blocks of these digests, up to the first that is missing or damaged.

        Returns how many were read. `block` is valid during the call only.
        """
        used: dict[str, _Segment] = {}
        fd, opened = -1, None
        try:
            for i, digest in enumerate(digests):
                place = self._index.get(digest)
                if place is None:
                    return i
                segment, index = place
                try:
                    if segment is not opened:
                        if fd >= 0:
                            os.close(fd)
                        fd, opened = -1, None
                        fd, opened = os.open(segment.path, os.O_RDONLY), segment
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
                    block_file.read_block(fd, segment.header, index, self._staging)
                except (OSError, ValueError) as error:
                    self._discard(segment, error)
                    return i
                used[segment.path.name] = segment
                take(i, self._staging)
            return len(digests)
        finally:
            if fd >= 0:
                os.close(fd)
            self._mark_used(list(used.values()))

    def write(self, digests: Sequence[bytes], blocks: Iterable[Bytes]) -> None:
        """Writes a segment, after making room for it. Raises OSError if the disk is full or refuses."""
        if not digests:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._make_room(len(digests) * self.block_bytes + (64 << 10))
        path = self.directory / f"{time.time_ns():016x}-{secrets.token_hex(4)}{SUFFIX}"
        header = block_file.write_blocks(
            path,
            blocks,
            digests,
            fingerprint=self.fingerprint,
            block_bytes=self.block_bytes,
            info=self._info,
            keep_free=FREE_BYTES,
        )
        with self._lock:
            self._add(_Segment(path, header))

    def mark_used(self, digests: Iterable[bytes]) -> None:
        """Says that a chain was used, wherever it was found: its segments stay longer."""
        places = (self._index.get(digest) for digest in digests)
        used = {place[0].path.name: place[0] for place in places if place is not None}
        self._mark_used(list(used.values()))

    def _mark_used(self, segments: list[_Segment]) -> None:
        """The beginning of a chain stays longest: without it the rest is of no use."""
        now = time.time_ns()
        for i, segment in enumerate(segments):
            # It may have been removed meanwhile, or be another user's, who then decides.
            with suppress(OSError):
                os.utime(segment.path, ns=(now - i, now - i))

    def _list(self) -> set[str]:
        try:
            return {name for name in os.listdir(self.directory) if name.endswith(SUFFIX)}
        except OSError:
            return set()

    def _open(self, name: str) -> None:
        segment_path = self.directory / name
        try:
            fd = os.open(segment_path, os.O_RDONLY)
        except OSError:
            return
        try:
            header = block_file.read_header(fd)
            if (header.fingerprint, header.block_bytes) != (self.fingerprint, self.block_bytes):
                raise ValueError("it belongs to another model or setting")
        except ValueError as error:
            logger.warning("%s is removed: %s", segment_path, error)
            segment_path.unlink(missing_ok=True)
        except OSError:
            pass
        else:
            self._add(_Segment(segment_path, header))
        finally:
            os.close(fd)

    def _add(self, segment: _Segment) -> None:
        self._segments[segment.path.name] = segment
        for i, digest in enumerate(segment.header.digests):
            self._index[digest] = (segment, i)

    def _forget(self, name: str) -> None:
        segment = self._segments.pop(name, None)
        if segment is None:
            return
        for digest in segment.header.digests:
            place = self._index.get(digest)
            if place is not None and place[0] is segment:
                del self._index[digest]

    def _discard(self, segment: _Segment, error: Exception) -> None:
        """Removes a segment that cannot be read. Its other blocks go with it: damage seldom comes alone."""
        if not isinstance(error, FileNotFoundError):
            logger.warning("%s is removed, its tokens are computed again: %s", segment.path, error)
            if isinstance(error, ValueError):
                segment.path.unlink(missing_ok=True)
        with self._lock:
            self._forget(segment.path.name)

    def _make_room(self, num_bytes: int) -> None:
        """Removes segments, the least recently used first, until `num_bytes` more are within the limit."""
        with _locked(self.root) as is_locked:
            if not is_locked:
                return  # another process is at it
            for directory in segment_directories(self.root):
                for file in abandoned_files(directory, SUFFIX):
                    file.unlink(missing_ok=True)
            found = segments(self.root)
            total = sum(size for _, size, _ in found)
            for path, size, _ in found:
                if total + num_bytes <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size
                if path.parent == self.directory:
                    with self._lock:
                        before = len(self._index)
                        self._forget(path.name)
                        self.num_evictions += before - len(self._index)


def segment_directories(root: Path) -> list[Path]:
    """One for each model and setting."""
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return []


def segments(root: Path) -> list[tuple[Path, int, int]]:
    """(path, bytes, time of last use in ns) of all segments, the least recently used first."""
    found = []
    for directory in segment_directories(root):
        for path in directory.glob(f"*{SUFFIX}"):
            try:
                stat = path.stat()
            except OSError:
                continue
            found.append((path, stat.st_size, stat.st_mtime_ns))
    return sorted(found, key=lambda entry: entry[2])


@contextmanager
def _locked(root: Path) -> Iterator[bool]:
    """Whether this process alone removes segments now; the lock of a dead process is free."""
    fd = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
