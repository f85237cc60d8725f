"""Reads pieces of checkpoint files in order, one thread ahead of the packing, with bounded memory."""

from __future__ import annotations

import math
import mmap
import os
import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moejet.weights.checkpoint import TORCH_DTYPES, read_tensor
from moejet.weights.sources import SourceWeight
from moejet.weights.spec import TensorSpec
from moejet.weights.stored import StoredWeight, scale_values

# What may wait to be packed, and again what recycled buffers may hold; one larger piece is read alone.
READ_AHEAD_BYTES = 256 << 20
# Smaller buffers come from the heap: there are too many of them to search for a fitting one.
_RECYCLED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """One weight: a whole tensor with its scales, or one expert's slice of a stacked one."""

    name: str
    spec: TensorSpec
    source: SourceWeight
    offset: int

    @property
    def num_bytes(self) -> int:
        if self.source.encoding != "plain":
            return self.source.num_bytes
        return math.prod(self.spec.shape) * TORCH_DTYPES[self.source.info.dtype].itemsize


def read_pieces(pieces: list[Piece]) -> Generator[tuple[Piece, StoredWeight]]:
    """Yields pieces in order while a thread reads ahead; closing the generator ends the thread."""
    reader = _Reader(pieces)
    reader.start()
    try:
        for piece in pieces:
            item = reader.ready.get()
            if isinstance(item, BaseException):
                raise item
            buffer, weight = item
            yield piece, weight
            # The generator is resumed when the consumer is done with the weight.
            reader.release(buffer, piece.num_bytes)
            del item, buffer, weight
    finally:
        reader.stop()


class _Buffers:
    """Recycled read buffers, page-aligned and outside the heap.

    Fresh memory per tensor costs page faults (reading was a third as fast), and on the heap what the consumer allocates
    meanwhile cuts freed buffers into pieces (resident memory grew to four times the packed size).
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        if num_bytes < _RECYCLED_BYTES:
            return torch.empty(num_bytes, dtype=torch.uint8)
        fitting = [b for b in self._free if b.numel() >= num_bytes]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._free = [b for b in self._free if b is not best]
            return best
        if self._free:
            self._free.pop()
        rounded = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return torch.frombuffer(mmap.mmap(-1, rounded), dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        # A rare large tensor (an embedding) must not hold its memory to the end.
        held = sum(b.numel() for b in self._free)
        if buffer.numel() >= _RECYCLED_BYTES and held + buffer.numel() <= READ_AHEAD_BYTES:
            self._free.append(buffer)


class _Reader(threading.Thread):
    """Reads pieces in order into `ready`, holding back while too many bytes wait to be packed."""

    def __init__(self, pieces: list[Piece]):
        super().__init__(name="moejet-read", daemon=True)
        self.pieces = pieces
        self.ready: queue.SimpleQueue[tuple[Tensor, StoredWeight] | BaseException]
        self.ready = queue.SimpleQueue()
        self._files = _OpenFiles()
        self._buffers = _Buffers()
        self._waiting_bytes = 0
        self._stopped = False
        self._changed = threading.Condition()

    def run(self) -> None:
        try:
            for piece in self.pieces:
                buffer = self._reserve(piece.num_bytes)
                if buffer is None:
                    return
                try:
                    weight = self._read(piece, buffer)
                except ValueError as error:
                    raise ValueError(f"{piece.source.info.file}: {error}") from error
                self.ready.put((buffer, weight))
                del buffer, weight
        except BaseException as error:  # handed to the consumer, which raises it
            self.ready.put(error)
        finally:
            self._files.close()

    def _read(self, piece: Piece, buffer: Tensor) -> StoredWeight:
        source, shape = piece.source, piece.spec.shape
        fd = self._files.open(source.info.file)
        if source.encoding == "plain":
            dtype = TORCH_DTYPES[source.info.dtype]
            return StoredWeight(shape, read_tensor(fd, piece.offset, shape, dtype, buffer))
        # Blocks of GGUF are read as one run of bytes.
        rows = 1 if source.encoding == "gguf" else shape[0]
        raw_shape = (rows, source.info.num_bytes // rows)
        data = read_tensor(fd, piece.offset, raw_shape, torch.uint8, buffer)
        scale = None
        if source.scale is not None:
            info = source.scale
            fd = self._files.open(info.file)
            dtype = TORCH_DTYPES.get(info.dtype, torch.uint8)
            scale = read_tensor(fd, info.offset, info.shape, dtype)
            if source.encoding == "fp8":
                scale = scale_values(scale, info.dtype)
        return StoredWeight(shape, data, source.encoding, scale, source.ggml_type)

    def _reserve(self, num_bytes: int) -> Tensor | None:
        """A buffer once little enough is waiting, or None if reading has to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped
                    or self._waiting_bytes == 0
                    or self._waiting_bytes + num_bytes <= READ_AHEAD_BYTES
                )
            )
            if self._stopped:
                return None
            self._waiting_bytes += num_bytes
            return self._buffers.take(num_bytes)

    def release(self, buffer: Tensor, num_bytes: int) -> None:
        with self._changed:
            self._buffers.give_back(buffer)
            self._waiting_bytes -= num_bytes
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self.join()


class _OpenFiles:
    """Descriptors of the shards in use: scales may lie in another one than their codes."""

    _MOST = 16

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def open(self, file: Path) -> int:
        if file not in self._files:
            if len(self._files) == self._MOST:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[file] = os.open(file, os.O_RDONLY)
            os.posix_fadvise(self._files[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._files[file]

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
