"""Packed weights on disk: written after the first load, mapped into memory by every later one.

One file holds a model in the very bytes that the kernels read, framed as `framed_file` says:

    header  {"key": ..., "blobs": [{"name", "offset", "nbytes", "checksum"}, ...], "file_bytes", "root", ...}
    data    blobs, each at a multiple of 65536

The key says what the file was made from and for: sizes, times and samples of the source files, the model's
configuration, formats, number of memory nodes, version of the packed layout; with a GPU also where every expert lives
and the version of the GPU's layout. A file whose key differs in anything is not used. Files appear complete or not at
all: they are written under a temporary name, synced, and renamed. Temporary files are locked while their writer lives;
those of dead writers are swept.

Mapped pages are shared between processes and come from the page cache at the first touch. They are small pages where
the kernel has no huge ones for files, which costs decoding about 4 %.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moejet import atomic_file, framed_file, topology
from moejet.atomic_file import (
    FREE_BYTES,
    Abandoned,
    read_all,
    replace_atomically,
    reserve,
    write_all,
)
from moejet.config import EngineConfig, ModelConfig
from moejet.extension import load_extension
from moejet.weights.device_copies import DeviceCopies
from moejet.weights.gguf import list_shards
from moejet.weights.packed_files import SUFFIX, cache_files, sweep
from moejet.weights.packed_header import (
    ALIGNMENT,
    MAGIC,
    Blob,
    mount_of,
    read_header,
    verify_blobs,
)
from moejet.weights.packed_state import (
    Part,
    State,
    bytes_of,
    checksum_of,
    device_copies,
    is_elsewhere,
    parts_of,
)

logger = logging.getLogger(__name__)

_SAMPLES, _SAMPLE_BYTES = 16, 4096
_WRITE_BYTES = 64 << 20
_READ_AHEAD_BYTES = 2 << 20
_HOLE_BYTES = 1 << 20  # of zeros, that are worth a hole
# Weights that are read and packed in less time than a file is worth.
MIN_BYTES = 256 << 20


class PartlyFilled(Exception):
    """A file could not be read to its end: what was mapped from it stays so as long as the state lives."""


# Of the key: the experts of each layer that live on a GPU.
PLACEMENT = "resident"


class CacheFile:
    """The place of one model's packed weights in the cache directory; the file may not exist.

    sources: where the weights come from, a directory or a file; None if from nowhere · unused_bytes: of packed weights
    that nobody fills, because their experts live elsewhere; they become holes of the file.
    """

    def __init__(
        self,
        directory: Path,
        model: str,
        key: dict[str, Any],
        sources: Path | None = None,
        *,
        unused_bytes: int = 0,
    ):
        digest = framed_file.fingerprint_of(key)
        slug = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-.") or "model"
        self.model, self.key, self.unused_bytes = model, key, unused_bytes
        self.root, self.mount = "", ""
        if sources is not None:
            root = (sources.parent if sources.is_file() else sources).absolute()
            self.root, self.mount = str(root), mount_of(root)
        self.path = directory / f"{slug[:60]}-{digest}{SUFFIX}"

    def load(self, state: State, *, verify: bool = False, maps: bool = True) -> bool:
        """Fills `state` from the file: packed weights become views of it, tensors are read.

        maps: without it packed weights are read, too, as suits memory that will be pinned: pinning a private view
        copies its pages one by one.

        False if there is no file, or none that fits (with a warning; it will be written anew). verify: compare all
        checksums first. Raises PartlyFilled, after a warning, if reading fails in the middle: then the state must be
        thrown away.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.ENOENT:
                logger.warning("packed weights cannot be read: %s", error)
            return False
        is_touched = False
        try:
            header = read_header(fd)
            if header.key != self.key:
                raise ValueError("it belongs to another model or version")
            blobs = {blob.name: blob for blob in header.blobs}
            expected = {name: part.nbytes for name, part in parts_of(state)}
            if {name: blob.nbytes for name, blob in blobs.items()} != expected:
                raise ValueError("its parts are not those of the model")
            if verify:
                verify_blobs(fd, header)
            is_touched = True
            _fill(fd, state, blobs, maps=maps)
        except (ValueError, OSError) as error:
            # As text: whoever keeps the record would keep the error's frames, and with them the state.
            logger.warning("%s is not used, and will be written again: %s", self.path, str(error))
            if is_touched:
                raise PartlyFilled(str(error)) from error
            return False
        finally:
            os.close(fd)
        with suppress(OSError):  # somebody else's file, or a file system that is read only
            os.utime(self.path)
        threading.Thread(target=_read_ahead, args=(self.path,), daemon=True).start()
        return True

    def write(self, state: State, stop: threading.Event | None = None) -> bool:
        """Writes the file; False, with a warning, if the disk has no room or refuses, or if `stop` is set meanwhile."""
        start = time.perf_counter()
        num_bytes = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sweep(self.path.parent)
            if atomic_file.is_being_written(self.path):
                logger.info("another process caches the packed weights")
                return False
            with replace_atomically(self.path) as fd:
                num_bytes = self._write(fd, state, stop)
                if num_bytes == 0:
                    raise Abandoned
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.ENOSPC:
                reason = f"no room on the disk of {self.path.parent} (set MOEJET_CACHE to another)"
            logger.warning("packed weights are not cached: %s", reason)
            return False
        if num_bytes == 0:
            return False
        self._remove_replaced()
        elapsed = time.perf_counter() - start
        logger.info("cached %.2f GiB in %s (%.1f s)", num_bytes / 2**30, self.path, elapsed)
        return True

    def _write(self, fd: int, state: State, stop: threading.Event | None) -> int:
        """The size of the file, or 0 if it was stopped."""
        parts = list(parts_of(state))
        blobs = [Blob(name, 0, part.nbytes, "0" * 16) for name, part in parts]
        offset = framed_file.data_offset(self._header(blobs, 2**62), ALIGNMENT)
        for i, blob in enumerate(blobs):
            blobs[i] = dataclasses.replace(blob, offset=offset)
            offset = framed_file.aligned(offset + blob.nbytes, ALIGNMENT)
        reserve(fd, offset, keep_free=FREE_BYTES, holes=self.unused_bytes)
        copies = device_copies(state)
        for i, (_, part) in enumerate(parts):
            at = blobs[i].offset
            for piece in self._pieces(part, copies):
                if stop is not None and stop.is_set():
                    return 0
                if not self.unused_bytes or np.frombuffer(piece, np.uint8).any():
                    write_all(fd, piece, at)
                at += len(piece)
            blobs[i] = dataclasses.replace(blobs[i], checksum=checksum_of(fd, part, blobs[i]))
        framed_file.write_header(fd, MAGIC, self._header(blobs, offset))
        return offset

    def _pieces(self, part: Part, copies: DeviceCopies | None) -> Iterator[memoryview]:
        if isinstance(part, Tensor):
            assert copies is not None
            yield from copies.pieces(part)
            return
        step = _HOLE_BYTES if self.unused_bytes else _WRITE_BYTES
        view = part.data
        for begin in range(0, part.nbytes, step):
            yield view[begin : begin + step]

    def _remove_replaced(self) -> None:
        """Removes files of the same weights for another placement of the experts: they change with free memory."""
        if PLACEMENT not in self.key:
            return
        for file in cache_files(self.path.parent):
            try:
                with file.open("rb", buffering=0) as stream:
                    key = read_header(stream.fileno()).key
                if key != self.key and {**key, PLACEMENT: None} == {**self.key, PLACEMENT: None}:
                    file.unlink(missing_ok=True)
            except (ValueError, OSError):  # damaged, or removed by its owner
                continue

    def _header(self, blobs: list[Blob], file_bytes: int) -> bytes:
        """JSON of the same length for the same names, however large offsets and sizes turn out."""
        entries = [
            {
                "name": blob.name,
                "offset": f"{blob.offset:020d}",
                "nbytes": f"{blob.nbytes:020d}",
                "checksum": blob.checksum,
            }
            for blob in blobs
        ]
        return framed_file.canonical(
            {
                "key": self.key,
                "blobs": entries,
                "file_bytes": f"{file_bytes:020d}",
                "model": self.model,
                "created": f"{time.time():020.3f}",
                "root": self.root,
                "mount": self.mount,
            }
        )


class BackgroundWriter:
    """Writes a cache file in a thread; the process does not end before it is done or stopped."""

    def __init__(self, file: CacheFile, state: State):
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=file.write, args=(state, self._stop), name="moejet-cache"
        )
        self._thread.start()

    def finish(self) -> None:
        """Waits for the end of it; Ctrl-C ends it at once, and nothing is left of the file."""
        if self._thread.is_alive():
            logger.warning("writing the packed weights for the next start; Ctrl-C leaves that out")
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self._stop.set()
            self._thread.join()
            raise


def cache_key(
    root: Path, config: EngineConfig, model_config: ModelConfig, num_nodes: int
) -> dict[str, Any]:
    """What decides about the packed bytes; JSON values only."""
    files = list_shards(root) if root.is_file() else sorted(root.iterdir())
    weights = [f for f in files if f.suffix in (".safetensors", ".gguf")]
    stats = [(file, file.stat()) for file in weights if file.exists()]
    sources: list[Any] = [
        [file.name, stat.st_size, stat.st_mtime_ns, _sample(file, stat.st_size)]
        for file, stat in stats
    ]
    return weights_key(sources, config, model_config, num_nodes)


def weights_key(
    sources: list[Any], config: EngineConfig, model_config: ModelConfig, num_nodes: int
) -> dict[str, Any]:
    """`cache_key` of weights that come from `sources`."""
    key = {
        "layout": load_extension().PACK_LAYOUT_VERSION,
        "sources": sources,
        "model": dataclasses.asdict(model_config),
        "expert_format": config.expert_format,
        "dense_format": config.dense_format,
        "memory_nodes": num_nodes,
    }
    parsed: dict[str, Any] = json.loads(framed_file.canonical(key))
    return parsed


def _fill(fd: int, state: State, blobs: dict[str, Blob], *, maps: bool) -> None:
    # Pages of a file lie where they were first read; placed memory is read into, to lie with its workers.
    placed: dict[int, list[tuple[NDArray[Any], Blob]]] = {}
    copies = device_copies(state)
    for name, value in state.items():
        if isinstance(value, Tensor):
            if copies is not None and is_elsewhere(value):
                _named(blobs[name], copies.read, fd, value, blobs[name].offset)
            else:
                _read_into(fd, bytes_of(value), blobs[name])
            continue
        weights = value.weights
        parts = weights.buffers()
        mine = [blobs[f"{name}/{node}"] for node in range(len(parts))]
        if weights.is_placed or not maps:
            for node, part, blob in zip(value.pool.memory_nodes, parts, mine, strict=True):
                placed.setdefault(node, []).append((part, blob))
        else:
            weights.map_file(fd, [blob.offset for blob in mine])
    _read_placed(fd, placed)


def _read_placed(fd: int, placed: Mapping[int, list[tuple[NDArray[Any], Blob]]]) -> None:
    """Reads the blobs of every memory node on its own CPUs, all nodes at a time."""
    failed = threading.Event()
    cpus = {node.node: set(node.cpus) for node in topology.numa_nodes()}

    def read(node: int) -> None:
        own = cpus.get(node, set()) & set(topology.allowed_cpus())
        if own:
            with suppress(OSError):  # advice; where the pages lie is decided
                os.sched_setaffinity(0, own)  # of this thread
        try:
            for part, blob in placed[node]:
                if failed.is_set():
                    return
                _read_into(fd, part, blob)
        except BaseException:
            failed.set()
            raise

    if not placed:
        return
    with ThreadPoolExecutor(len(placed), "moejet-node") as threads:
        for done in [threads.submit(read, node) for node in placed]:
            done.result()


def _read_into(fd: int, target: NDArray[Any], blob: Blob) -> None:
    _named(blob, lambda: read_all(fd, target.data, blob.offset))


def _named(blob: Blob, read: Callable[..., object], *arguments: object) -> None:
    try:
        read(*arguments)
    except ValueError as error:
        raise ValueError(f"{blob.name}: {error}") from error


def _sample(file: Path, size: int) -> str:
    """A hash of some places of a file: two models may agree in names, sizes and times."""
    digest = hashlib.blake2b(digest_size=8)
    with file.open("rb", buffering=0) as stream:
        for i in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _read_ahead(path: Path) -> None:
    """Asks for all pages of a file but its holes, a piece at a time: the kernel cuts large requests short."""
    with suppress(OSError), path.open("rb", buffering=0) as stream:
        fd, end = stream.fileno(), 0
        while True:  # until an OSError says that no data follow
            begin = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, begin, os.SEEK_HOLE)
            for offset in range(begin, end, _READ_AHEAD_BYTES):
                os.posix_fadvise(fd, offset, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
