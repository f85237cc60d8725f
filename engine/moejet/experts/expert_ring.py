"""Routed experts in RAM that visit the GPU for one step: for prompts whose tokens ask for nearly all of them anyway.

The packed bytes of a layer's experts cross PCIe in chunks, into a ring of buffers on the device. A chunk is unpacked
there into slots, which frees its buffer, and the layer's tokens are computed with them:

    copies    | 0.0 | 0.1 | 0.2 | 0.3 | 1.0 | 1.1 | 1.2 | ...        layer.chunk
    model            | attention 0 | 0.0 0.1 0.2 0.3 | attention 1 | 1.0 1.1 ...

Copies run ahead by as many chunks as the ring has buffers, from layer to layer, so also under attention and shared
experts; where experts are pinned in place, they run on to the first chunks of the next step. The host enqueues all of
it and waits for nothing, unless experts have to be staged through pinned buffers.

All experts in RAM are copied, asked for or not: of E experts with K chosen by each of T tokens, (1 - K / E)^T are not
asked for, 2 % at 128 tokens with DeepSeek-V3 (8 of 256), and to know which ones the host would have to wait for each
layer's router, which ends the running ahead.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.pinned_weights import PinnedWeights
from moejet.experts.resident_experts import expert_slots
from moejet.experts.ring_copies import Copies, CudaCopies, StagedCopies, ThreadCopies
from moejet.experts.ring_size import DEPTH, HOST_BUFFERS, RingSize
from moejet.ops.gpu_experts import gpu_experts
from moejet.ops.unpack_experts import unpack_experts
from moejet.weights.gpu_weights import GpuWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Transfers:
    """Packed experts that went to the GPU so far.

    streamed_bytes, chunks: copies that were started for prompts · fetched_bytes: by a cache of experts · copy_seconds:
    that the copies took which are done, of chunks side by side with other work
    """

    streamed_bytes: int = 0
    fetched_bytes: int = 0
    copy_seconds: float = 0.0
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Experts first to end of a layer."""

    layer: int
    first: int
    end: int


class ExpertRing:
    """Copies chunks of experts in the order in which a step's layers ask for them.

    Not before the weights are loaded and `prepare` was called.
    """

    def __init__(
        self,
        layers: Sequence[tuple[CpuExperts, Sequence[int]]],
        size: RingSize,
        device: torch.device,
    ) -> None:
        """layers: in the order of the model, with the ids of those experts that are in RAM, ascending."""
        self._layers = [experts for experts, _ in layers]
        self.device = device
        self._chunks = [
            chunk
            for number, (_, ids) in enumerate(layers)
            for chunk in _chunks_of(number, ids, size.experts)
        ]
        assert self._chunks, "no experts to stream"
        self._layouts = [experts.packed_layout for experts in self._layers]
        largest = size.experts * max(layout.expert_bytes for layout in self._layouts)
        self._staging = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(DEPTH)
        ]
        self._slots: dict[tuple[str, str], tuple[GpuWeights, GpuWeights]] = {}
        for layout in self._layouts:
            kind = (layout.format, layout.down_format)
            shape = (layout.hidden_size, layout.intermediate_size)
            if kind not in self._slots:
                self._slots[kind] = expert_slots(size.experts, *shape, *kind, device)
        self._numbers = torch.arange(size.experts, dtype=torch.int32, device=device)
        self._tables = self._slot_tables()
        self._sources: list[list[Tensor]] = []  # of every chunk
        self._copies: Copies | None = None
        self._pinned: PinnedWeights | None = None
        self._wraps = False
        # Chunks since the last reset, through all layers again and again: those computed, those whose copy was started,
        # and where that has to stop.
        self._computed = self._started = self._limit = 0
        self._copying: deque[Any] = deque()
        self._free: list[Any] = [None] * DEPTH
        self._is_clean = True
        self.is_active = False
        self._bytes = self._count = 0

    def prepare(self, *, in_place: bool | None = None, copies: Copies | None = None) -> None:
        """Decides how experts are copied, once they are there.

        in_place: pin them where they are (None: if the system allows it), else stage them · copies: by whom (None: a
        stream of the device).
        """
        on_gpu = self.device.type == "cuda"
        self._sources = [
            self._layers[chunk.layer].packed_slices(chunk.first, chunk.end)
            for chunk in self._chunks
        ]
        if copies is None:
            copies = CudaCopies(self.device) if on_gpu else ThreadCopies()
        if in_place is not False and on_gpu:
            try:
                self._pinned = PinnedWeights(self._parts(), self.device)
            except RuntimeError as error:
                if in_place:
                    raise
                logger.warning(
                    "experts cannot be pinned in place (%s): prompts stream them through pinned buffers", error
                )  # fmt: skip
        self._wraps = self._pinned is not None or bool(in_place)
        if not self._wraps:
            buffers = [
                torch.empty(self._staging[0].shape, dtype=torch.uint8, pin_memory=on_gpu)
                for _ in range(HOST_BUFFERS)
            ]
            copies = StagedCopies(copies, buffers)
        self._copies = copies
        logger.info(
            "prompts stream experts in %d chunks of up to %.0f MiB, %s",
            len(self._chunks),
            self._staging[0].numel() / 2**20,
            "from where they are" if self._wraps else "through pinned buffers",
        )

    def close(self) -> None:
        """Waits for what is copied, and unpins the experts. The device must have nothing left to do."""
        copies, self._copies, self._sources = self._copies, None, []
        if copies is not None:
            copies.close()
        if self._pinned is not None:
            self._pinned.close()

    @property
    def is_pinned(self) -> bool:
        """Whether all experts in RAM are pinned where they are, until `close`."""
        return self._pinned is not None

    @property
    def tensors(self) -> list[Tensor]:
        """All that the ring has on the device."""
        slots = [weights for both in self._slots.values() for weights in both]
        parts = [part for w in slots for part in (w.codes, w.scales) if part is not None]
        return [*self._staging, *parts, *self._tables.values(), self._numbers]

    @property
    def layer_bytes(self) -> int:
        """Of the layer with the most, packed."""
        sizes = [0] * len(self._layers)
        for chunk in self._chunks:
            each = self._layouts[chunk.layer].expert_bytes
            sizes[chunk.layer] += (chunk.end - chunk.first) * each
        return max(sizes)

    def transfers(self) -> Transfers:
        seconds = 0.0 if self._copies is None else self._copies.seconds
        return Transfers(streamed_bytes=self._bytes, chunks=self._count, copy_seconds=seconds)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the launch of a step, whose layers all `add` in order. After an exception the next starts afresh."""
        if not self._is_clean or self._computed % len(self._chunks):
            self.reset()
        self._is_clean = False
        self.is_active = True
        try:
            self._limit = self._computed + len(self._chunks)
            if self._wraps:
                self._limit += DEPTH
            self._start_copies()
            yield
            self._is_clean = True
        finally:
            self.is_active = False

    def add(
        self, layer: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, into: Tensor
    ) -> None:
        """Adds the weighted sums of a layer's experts in RAM to `into` [T, D] fp32; see `ops.gpu_experts`."""
        assert self._copies is not None, "prepare has to come first"
        experts = self._layouts[layer]
        gate_up, down = self._slots[experts.format, experts.down_format]
        chunk = self._next()
        assert chunk.layer == layer, f"layer {layer} comes before layer {chunk.layer}"
        while chunk.layer == layer:
            self._copies.join(self._copying.popleft())
            buffer = self._computed % DEPTH
            numbers = self._numbers[: chunk.end - chunk.first]
            unpack_experts(self._staging[buffer], numbers, experts, gate_up, down)
            self._free[buffer] = self._copies.mark()
            self._computed += 1
            self._start_copies()
            table = self._tables[chunk.first, chunk.end]
            gpu_experts(x, topk_ids, topk_weights, table, gate_up, down, into=into)
            if self._computed % len(self._chunks) == 0:
                break
            chunk = self._next()

    def _next(self) -> _Chunk:
        return self._chunks[self._computed % len(self._chunks)]

    def _start_copies(self) -> None:
        """As many as there are free buffers."""
        assert self._copies is not None
        while self._started < min(self._computed + DEPTH, self._limit):
            buffer = self._started % DEPTH
            pieces, begin = [], 0
            for source in self._sources[self._started % len(self._chunks)]:
                end = begin + source.numel()
                pieces.append((self._staging[buffer][begin:end], source))
                begin = end
            self._copying.append(self._copies.start(pieces, self._free[buffer]))
            self._started += 1
            self._bytes += begin
            self._count += 1

    def drain(self) -> None:
        """Blocks until copies that were started have run."""
        assert self._copies is not None
        for copy in self._copying:
            self._copies.wait(copy)

    def reset(self) -> None:
        """From the first chunk again, whatever was begun: copies run in order, and after what the model enqueued."""
        assert self._copies is not None
        self._copying.clear()
        self._free = [self._copies.mark()] * DEPTH
        self._computed = self._started = 0

    def _parts(self) -> Iterator[Tensor]:
        """The memory of the experts in RAM, in whole pages."""
        for number, experts in enumerate(self._layers):
            chunks = [chunk for chunk in self._chunks if chunk.layer == number]
            first = chunks[0].first
            for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
                if following is None or following.first != chunk.end:
                    yield from experts.packed_slices(first, chunk.end)
                    first = 0 if following is None else following.first

    def _slot_tables(self) -> dict[tuple[int, int], Tensor]:
        """slot_of_expert [E] of every chunk, by its first and end."""
        total = self._layers[0].weights.num_experts
        tables = {}
        for chunk in self._chunks:
            table = torch.full((total,), -1, dtype=torch.int32)
            count = chunk.end - chunk.first
            table[chunk.first : chunk.end] = torch.arange(count, dtype=torch.int32)
            tables[chunk.first, chunk.end] = table.to(self.device)
        return tables


def _chunks_of(layer: int, ids: Sequence[int], most: int) -> Iterator[_Chunk]:
    """Runs of adjacent ids, in parts of nearly equal size."""
    begin = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and ids[end] == ids[end - 1] + 1:
            continue
        run = ids[begin:end]
        parts = -(-len(run) // most)
        cuts = [len(run) * part // parts for part in range(parts + 1)]
        for first, stop in pairwise(cuts):
            yield _Chunk(layer, run[first], run[stop - 1] + 1)
        begin = end
