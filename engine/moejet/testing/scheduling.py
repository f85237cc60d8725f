"""Requests, schedulers, and a cache that knows whose context is where, for tests without a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from moejet.batch import Batch
from moejet.block_pool import BlockPool
from moejet.cache_blocks import CacheBlocks
from moejet.prefix_store import PrefixStore
from moejet.prefix_tier import PrefixTier
from moejet.request import Request, SamplingParams
from moejet.scheduler import Scheduler

Context = tuple[int, ...]

_ORDER = itertools.count()


def make_request(
    name: str,
    num_tokens: int,
    limit: int = 1000,
    tokens: tuple[int, ...] | None = None,
    priority: int = 0,
) -> Request:
    order = next(_ORDER)
    return Request(
        request_id=name,
        index=0,
        order=order,
        priority=priority,
        prompt_token_ids=tokens or tuple(order * 1000 + i for i in range(num_tokens)),
        params=SamplingParams(),
        seed=0,
        max_total_tokens=limit,
        eos_token_ids=frozenset(),
    )


def make_scheduler(
    num_blocks: int = 8, block_size: int = 4, budget: int = 16, max_requests: int = 8
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, block_size), max_batch_tokens=budget, max_num_requests=max_requests
    )


class Slots:
    """A list of contexts kept as numbers in bytes [2 layers, blocks, 8 x block_size], which can go to disk."""

    known: ClassVar[dict[Context, int]] = {}
    contexts: ClassVar[list[Context]] = []

    def __init__(self, num_blocks: int, block_size: int):
        self.bytes = np.full((2, num_blocks, 8 * block_size), 255, np.uint8)
        self.numbers = self.bytes.view(np.int64).reshape(2, -1)

    def __setitem__(self, slot: int, context: Context | None) -> None:
        if context is not None and context not in self.known:
            self.known[context] = len(self.contexts)
            self.contexts.append(context)
        number = -1 if context is None else self.known[context]
        self.numbers[:, slot] = number, ~number

    def __getitem__(self, slot: int) -> Context | None:
        number, inverted = self.numbers[:, slot].tolist()
        assert number in (-1, ~inverted)
        return self.contexts[number] if number >= 0 else None


class Cache:
    """The latent cache as it would be: for every slot, the token whose latent is there and all tokens before it."""

    def __init__(self, scheduler: Scheduler):
        self.size = scheduler.pool.block_size
        self.slots = Slots(scheduler.pool.num_blocks, self.size)
        self.num_computed = 0

    def store_in(self, directory: Path, scheduler: Scheduler, max_bytes: int) -> PrefixTier:
        """Puts a disk behind the scheduler's pool."""
        store = PrefixStore(
            directory,
            model="m",
            fingerprint=f"{self.size:020x}",
            block_bytes=16 * self.size,
            max_bytes=max_bytes,
        )
        blocks = CacheBlocks(torch.from_numpy(self.slots.bytes))
        tier = PrefixTier(store, scheduler.pool, blocks, min_tokens=self.size)
        scheduler.store = tier
        return tier

    def run(self, batch: Batch) -> None:
        for source, target in batch.block_copies:
            for i in range(self.size):
                self.slots[target * self.size + i] = self.slots[source * self.size + i]
        batch.block_copies.clear()
        row = 0
        for request, query_len, end in zip(
            batch.requests, batch.query_lens, batch.context_lens, strict=True
        ):
            for position in range(end - query_len, end):
                slot = int(batch.slot_mapping[row])
                assert int(batch.token_ids[row]) == request.token_ids[position]
                self.slots[slot] = tuple(request.token_ids[: position + 1])
                row += 1
        self.num_computed += row
        # Only now, as attention would: nobody's context may have been written over.
        for request, end in zip(batch.requests, batch.context_lens, strict=True):
            for position in range(end):
                block = request.block_table[position // self.size]
                expected = tuple(request.token_ids[: position + 1])
                assert self.slots[block * self.size + position % self.size] == expected


def drive(
    scheduler: Scheduler,
    cache: Cache,
    until: Callable[[], bool] = lambda: False,
    next_token: Callable[[Request], int] = lambda request: 7,
) -> None:
    """Runs what is there; every token is the same unless told otherwise."""
    while scheduler.has_work and not until():
        batch = scheduler.schedule()
        scheduler.check_integrity()
        assert batch is not None, "there is work"
        cache.run(batch)
        scheduler.advance(batch)
        for request in batch.sampled:
            request.token_ids.append(next_token(request))
            if len(request.token_ids) >= request.max_total_tokens:
                scheduler.finish(request, "length")
