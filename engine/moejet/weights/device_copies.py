"""Tensors on a device from files and to files, through pinned memory, without waiting for a model's steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moejet.atomic_file import read_all

_PIECE_BYTES = 32 << 20


class DeviceCopies:
    """Two buffers on the host in turn, and a stream of its own: one buffer is filled while the other is copied.

    Copies on that stream neither wait for what other threads launch later nor hold it up. To be used by one thread.
    """

    def __init__(self, device: torch.device, piece_bytes: int = _PIECE_BYTES):
        self.device = device
        is_cuda = device.type == "cuda"
        self._halves = [
            torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)
        ]
        self._stream: torch.cuda.Stream | None = None
        self._busy: list[torch.cuda.Event] = []
        if is_cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._busy = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def read(self, fd: int, target: Tensor, offset: int) -> None:
        """Fills a contiguous tensor from a file; all is there on return. ValueError if the file ends before."""
        flat = _bytes_of(target)
        with self._on_stream():
            for number, (begin, count) in enumerate(self._pieces(flat.numel())):
                half = self._halves[number % 2]
                if self._busy:
                    self._busy[number % 2].synchronize()
                read_all(fd, half[:count].numpy().data, offset + begin)
                flat[begin : begin + count].copy_(half[:count], non_blocking=True)
                if self._busy:
                    self._busy[number % 2].record()
            if self._stream is not None:
                self._stream.synchronize()

    def pieces(self, source: Tensor) -> Iterator[memoryview]:
        """The bytes of a contiguous tensor that nobody changes, piece by piece; each is valid until the next one."""
        flat = _bytes_of(source)
        for begin, count in self._pieces(flat.numel()):
            half = self._halves[0][:count]
            with self._on_stream():
                half.copy_(flat[begin : begin + count], non_blocking=True)
                if self._stream is not None:
                    self._stream.synchronize()
            yield half.numpy().data

    def _pieces(self, num_bytes: int) -> Iterator[tuple[int, int]]:
        step = self._halves[0].numel()
        for begin in range(0, num_bytes, step):
            yield begin, min(step, num_bytes - begin)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
