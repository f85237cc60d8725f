"""Copies on the GPU of experts that live in RAM, chosen by use and exchanged while steps run.

Layers have slots for them behind those of the experts that live on the GPU. One table says which experts of a layer
have a slot: `gpu_experts` computes these, and the hand-over to the CPU masks the same ones, so an expert is computed
once wherever it is. Table and weights have fixed addresses; a captured graph finds in them what is there by then.

`advance` runs between two steps, on the thread that launches them, and waits for nothing: what is not ready by then is
looked at before the next step. It learns what was used, has the policy name swaps, and moves each one on:

    1  the evicted expert leaves the table                  model's stream, before the next step
    2  a thread copies the packed bytes to pinned memory    a buffer of its own, meanwhile; not if they are pinned
    3  they go to the device and are unpacked into the slot  side stream, after all of the model's so far
    4  the table names the new expert                       model's stream, once the host has seen 3 done

Why no step reads a slot that is being written: 1 is on the model's stream between two steps. The steps before it may
still read the slot, and 3 waits for them, as it comes later than 1 and follows that stream; the steps after it find no
entry that leads to the slot, and the CPU computes the expert from RAM. The entry of 4 is enqueued when 3 is done, so
every step that sees it sees the weights. Within a step the table does not change: both of its readers agree.

Why nothing on the host is overwritten too early: the table goes to the device from one pinned buffer, and the counts
come to another, both before one event; until the host has seen it, neither is touched. A fetch has its pinned buffer
until the event of 3. The device's staging buffer is used by one stream only. RAM keeps every cached expert, so a fetch
that fails or takes long costs time and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moejet.experts.cache_policy import Swap
from moejet.experts.hybrid_experts import HybridExperts
from moejet.ops.unpack_experts import unpack_experts

_cuda: Any = torch.cuda  # whose classes have no types

logger = logging.getLogger(__name__)


def table_row(num_experts: int) -> int:
    """int32 per layer in the tables: rows begin as aligned as whole tensors, and kernels compile once for all."""
    return -(-num_experts // 64) * 64


class Mark(Protocol):
    """A point of a stream."""

    def is_done(self) -> bool:
        """Whether the stream has come so far; does not wait."""

    def seconds_since(self, earlier: Mark) -> float:
        """Between two marks that are done."""


class FetchStream(Protocol):
    """A stream beside the model's."""

    pin_memory: bool

    def follow(self) -> None:
        """What comes next waits for all that the model's stream has been given so far."""

    def run(self, operation: Callable[[], object]) -> None:
        """Enqueues what `operation` enqueues on the current stream."""

    def mark(self) -> Mark: ...
    def mark_model(self) -> Mark:
        """Of the model's stream, the calling thread's current one."""

    def close(self) -> None:
        """Waits for all that was enqueued."""


class CudaMark:
    """An event on a CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream):
        self._event = _cuda.Event(enable_timing=True)
        self._event.record(stream)

    def is_done(self) -> bool:
        return bool(self._event.query())

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, CudaMark)
        return float(earlier._event.elapsed_time(self._event)) * 1e-3


class CudaFetchStream:
    """A CUDA stream of its own; the model's is the one that is current when it is asked for."""

    pin_memory = True

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream = _cuda.Stream(device)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def run(self, operation: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            operation()

    def mark(self) -> CudaMark:
        return CudaMark(self._stream)

    def mark_model(self) -> CudaMark:
        return CudaMark(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        self._stream.synchronize()


class Policy(Protocol):
    """`cache_policy.CachePolicy`; tests have others."""

    is_cached: NDArray[np.bool_]

    def observe(self, uses: NDArray[np.integer], steps: int) -> None: ...
    def choose(self, most: int) -> list[Swap]: ...
    def finish(self, swap: Swap) -> None: ...
    def give_up(self, swap: Swap) -> None: ...


@dataclass(slots=True)
class _Fetch:
    """A swap from its eviction to its entry in the table."""

    swap: Swap
    buffer: Tensor
    sources: list[Tensor]  # pinned, in the order of the packed bytes
    copied: Future[None] | None  # None: nothing had to be copied to the buffer
    marks: tuple[Mark, Mark, Mark] | None = (
        None  # before the copy to the device, behind it, and when it is unpacked
    )


@dataclass(slots=True)
class CacheCounters:
    """uses: of experts in layers with slots, by tokens · hits: of these, how many found theirs in a slot of the cache.

    fetches, fetched_bytes, copy_seconds: of packed experts on their way to the device. All lag some steps behind.
    """

    uses: int = 0
    hits: int = 0
    fetches: int = 0
    fetched_bytes: int = 0
    copy_seconds: float = 0.0


@dataclass(slots=True)
class _Snapshot:
    """Counts on their way to the host: when they are there, of how many steps, and what was cached in these."""

    mark: Mark
    steps: int
    was_cached: NDArray[np.bool_] = field(repr=False)


class ExpertCache:
    """The slots of some layers. One thread may use it, the one that launches steps."""

    def __init__(
        self,
        layers: Sequence[HybridExperts],
        stream: FetchStream,
        policy: Policy,
        *,
        num_buffers: int,
        choose_every: int = 1,
    ):
        """layers: with experts in RAM and free slots; gives them their rows of the tables

        num_buffers: experts that may be on their way at the same time · choose_every: steps after which the policy may
        name swaps again, which takes it most of the time.
        """
        self.choose_every = choose_every
        self._advances = 0
        self.policy, self.counters = policy, CacheCounters()
        self._stream = stream
        self._residents = [layer.require_resident() for layer in layers]
        self._cpu = [layer.require_cpu() for layer in layers]
        self._layouts = [cpu.packed_layout for cpu in self._cpu]
        device = self._residents[0].slot_of_expert.device
        num_experts = [cpu.weights.num_experts for cpu in self._cpu]
        shape = (len(layers), table_row(max(num_experts)))

        def on_host(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, pin_memory=stream.pin_memory)

        self._table = on_host(*shape, dtype=torch.int32).fill_(-1)
        self._counts = on_host(*shape, dtype=torch.int32).zero_()
        for row, resident, count in zip(self._table, self._residents, num_experts, strict=True):
            row[:count].copy_(resident.slot_of_expert)
        self._device_table = self._table.to(device, copy=True)
        self._device_counts = torch.zeros(shape, dtype=torch.int32, device=device)
        for number, (layer, count) in enumerate(zip(layers, num_experts, strict=True)):
            self._residents[number].slot_of_expert = self._device_table[number, :count]
            layer.uses = self._device_counts[number, :count]
        largest = max(layout.expert_bytes for layout in self._layouts)
        self._staging = torch.zeros(largest, dtype=torch.uint8, device=device)
        most_slots = max(r.first_free + r.num_free for r in self._residents)
        self._slot_numbers = torch.arange(most_slots, dtype=torch.int32, device=device)
        self._free = [on_host(largest, dtype=torch.uint8) for _ in range(num_buffers)]
        self._is_in_place = False
        self._is_resting = False
        self._is_stale = False  # the table on the device
        self._fetches: list[_Fetch] = []
        self._snapshot: _Snapshot | None = None
        self._last_counts = self._counts.numpy().copy()
        self._steps = 0  # since the last snapshot
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="moejet-fetch")
        self._warm_up()

    @property
    def device_tensors(self) -> list[Tensor]:
        """What it has there beside the layers' slots."""
        return [self._device_table, self._device_counts, self._staging, self._slot_numbers]

    def advance(self) -> None:
        """To be called before each step, with nothing but whole steps launched before it."""
        self._steps += 1
        snapshot = self._snapshot
        if snapshot is not None:
            if not snapshot.mark.is_done():
                return
            self._learn(snapshot)
        was_cached = self.policy.is_cached.copy()
        self._finish_fetches()
        self._send_copied()
        self._advances += 1
        is_due = snapshot is not None and self._advances % self.choose_every == 0
        if is_due and not self._is_resting:
            self._begin_fetches()
        if self._is_stale:
            self._device_table.copy_(self._table, non_blocking=True)
            self._is_stale = False
        self._counts.copy_(self._device_counts, non_blocking=True)
        self._snapshot = _Snapshot(self._stream.mark_model(), self._steps - 1, was_cached)
        self._steps = 1

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Steps within neither count nor bring new experts."""
        self._is_resting = True
        try:
            yield
        finally:
            self._is_resting = False

    def read_in_place(self) -> None:
        """From now on experts go to the device from where they are: all of them are pinned, until `close`."""
        assert not self._fetches, f"{len(self._fetches)} fetches under way"
        self._is_in_place = True
        self._free = [torch.empty(0, dtype=torch.uint8) for _ in self._free]

    def close(self) -> None:
        """Waits for what is on its way. Steps may go on with what is in the slots."""
        self._copier.shutdown()
        self._stream.close()

    def _learn(self, snapshot: _Snapshot) -> None:
        counts = self._counts.numpy().copy()
        # Counters on the device go round.
        uses = counts.view(np.uint32) - self._last_counts.view(np.uint32)
        self._last_counts = counts
        uses = uses[:, : snapshot.was_cached.shape[1]].astype(np.int64)
        if snapshot.steps == 0 or self._is_resting:
            return  # what was tried out before the first step, or is not to count
        self.counters.uses += int(uses.sum())
        self.counters.hits += int(uses[snapshot.was_cached].sum())
        self.policy.observe(uses, snapshot.steps)

    def _begin_fetches(self) -> None:
        """Evictions, and copies to pinned memory that begin."""
        for swap in self.policy.choose(len(self._free)):
            if swap.evicted >= 0:
                self._is_stale = True  # before the change, which an interrupt must not lose
                self._table[swap.layer, swap.evicted] = -1
            buffer = self._free.pop()
            sources = self._cpu[swap.layer].packed_slices(swap.expert)
            copied = None
            if not self._is_in_place:
                arrays = [source.numpy() for source in sources]
                copied = self._copier.submit(_copy_slices, buffer.numpy(), arrays)
                sources = [buffer[: self._layouts[swap.layer].expert_bytes]]
            self._fetches.append(_Fetch(swap, buffer, sources, copied))

    def _send_copied(self) -> None:
        """What is in pinned memory goes on to the device."""
        waiting = [
            fetch
            for fetch in self._fetches
            if fetch.marks is None and (fetch.copied is None or fetch.copied.done())
        ]
        if waiting:
            self._stream.follow()
        for fetch in waiting:
            error = None if fetch.copied is None else fetch.copied.exception()
            if error is not None:
                logger.warning("an expert is not fetched to the GPU: %s", error)
                self.policy.give_up(fetch.swap)
                self._release(fetch)
                continue
            begin = self._stream.mark()
            self._stream.run(partial(self._stage, fetch.sources))
            copied = self._stream.mark()
            self._stream.run(partial(self._unpack, fetch.swap.layer, self._slot(fetch.swap)))
            fetch.marks = begin, copied, self._stream.mark()

    def _finish_fetches(self) -> None:
        """Entries of what has arrived."""
        arrived = [f for f in self._fetches if f.marks is not None and f.marks[2].is_done()]
        for fetch in arrived:
            assert fetch.marks is not None
            begin, copied, _ = fetch.marks
            swap = fetch.swap
            self._is_stale = True
            self._table[swap.layer, swap.expert] = self._slot(swap)
            self.policy.finish(swap)
            self._release(fetch)
            self.counters.fetches += 1
            self.counters.fetched_bytes += self._layouts[swap.layer].expert_bytes
            self.counters.copy_seconds += copied.seconds_since(begin)

    def _slot(self, swap: Swap) -> int:
        return self._residents[swap.layer].first_free + swap.slot

    def _stage(self, sources: Sequence[Tensor]) -> None:
        begin = 0
        for source in sources:
            end = begin + source.numel()
            self._staging[begin:end].copy_(source, non_blocking=True)
            begin = end

    def _unpack(self, layer: int, slot: int) -> None:
        resident, layout = self._residents[layer], self._layouts[layer]
        packed = self._staging[: layout.expert_bytes]
        slots = self._slot_numbers[slot : slot + 1]
        unpack_experts(packed, slots, layout, resident.gate_up, resident.down)

    def _warm_up(self) -> None:
        """Loads the kernels: that takes long, and must not happen in mid-step. No entry leads to the slots yet."""
        if self._staging.is_cuda:
            self._stream.follow()  # what the unpacking reads has been filled on the model's stream
            for layer in {layout: n for n, layout in enumerate(self._layouts)}.values():
                self._stream.run(partial(self._unpack, layer, self._residents[layer].first_free))

    def _release(self, fetch: _Fetch) -> None:
        self._fetches.remove(fetch)
        self._free.append(fetch.buffer)


def _copy_slices(target: NDArray[np.uint8], slices: Sequence[NDArray[np.uint8]]) -> None:
    """One after another. numpy copies on the calling thread, without the interpreter's lock."""
    begin = 0
    for part in slices:
        target[begin : begin + part.size] = part
        begin += part.size
