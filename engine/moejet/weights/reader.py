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

from moejet.weights.checkpoint import TORCH_DTYPES, TensorInfo, read_tensor
from moejet.weights.spec import TensorSpec

# What may wait to be packed, and again what recycled buffers may hold; one larger piece is read alone.
READ_AHEAD_BYTES = 256 << 20
# Smaller buffers come from the heap: there are too many of them to search for a fitting one.
_RECYCLED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """One contiguous read: a whole tensor, or one expert's slice of a stacked one."""

    name: str
    spec: TensorSpec
    source: TensorInfo
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.spec.shape) * TORCH_DTYPES[self.source.dtype].itemsize


def read_pieces(pieces: list[Piece]) -> Generator[tuple[Piece, Tensor]]:
    """Yields pieces in order while a thread reads ahead; closing the generator ends the thread."""
    reader = _Reader(pieces)
    reader.start()
    try:
        for piece in pieces:
            item = reader.ready.get()
            if isinstance(item, BaseException):
                raise item
            buffer, tensor = item
            yield piece, tensor
            # The generator is resumed when the consumer is done with the tensor.
            reader.release(buffer, piece.num_bytes)
            del item, buffer, tensor
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
        self.ready: queue.SimpleQueue[tuple[Tensor, Tensor] | BaseException] = queue.SimpleQueue()
        self._buffers = _Buffers()
        self._waiting_bytes = 0
        self._stopped = False
        self._changed = threading.Condition()

    def run(self) -> None:
        files: dict[Path, int] = {}
        try:
            for piece in self.pieces:
                buffer = self._reserve(piece.num_bytes)
                if buffer is None:
                    return
                file = piece.source.file
                if file not in files:
                    _close_all(files)
                    files[file] = os.open(file, os.O_RDONLY)
                    os.posix_fadvise(files[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
                dtype = TORCH_DTYPES[piece.source.dtype]
                try:
                    tensor = read_tensor(files[file], piece.offset, piece.spec.shape, dtype, buffer)
                except ValueError as error:
                    raise ValueError(f"{file}: {error}") from error
                self.ready.put((buffer, tensor))
                del buffer, tensor
        except BaseException as error:  # handed to the consumer, which raises it
            self.ready.put(error)
        finally:
            _close_all(files)

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


def _close_all(files: dict[Path, int]) -> None:
    for fd in files.values():
        os.close(fd)
    files.clear()
