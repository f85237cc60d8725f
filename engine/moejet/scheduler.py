"""Continuous batching in one rule: each request's num_computed_tokens catches up with its tokens.

There is no prefill phase and no decode phase. Every step gives each running request the tokens it lacks, within a
budget per step, so a long prompt is computed in chunks while the others go on decoding. When the cache is full, the
youngest request gives its blocks back and is computed again later (its tokens are kept, so nothing changes).
"""

from __future__ import annotations

import time
from collections import deque

from moejet.batch import Batch
from moejet.block_pool import BlockPool
from moejet.request import FinishReason, Request, RequestState


class Scheduler:
    """Owns the queues and the blocks. Not thread-safe: the engine calls it from one thread."""

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_num_requests: int):
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_num_requests = max_num_requests
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Batch | None:
        """Chooses this step's tokens; None if there is nothing to do."""
        budget = self.max_batch_tokens
        requests: list[Request] = []
        query_lens: list[int] = []
        for request in sorted(self.running, key=_tokens_missing):
            if request.state is not RequestState.RUNNING or budget == 0:
                continue
            query_len = min(_tokens_missing(request), budget)
            if not self._make_room(request, request.num_computed_tokens + query_len, requests):
                continue
            requests.append(request)
            query_lens.append(query_len)
            budget -= query_len
        while self.waiting and budget > 0 and len(self.running) < self.max_num_requests:
            request = self.waiting[0]
            query_len = min(_tokens_missing(request), budget)
            # Admit only what can be computed in full, so that two half-read prompts never starve each other.
            needed = self.pool.num_blocks_for(len(request.token_ids))
            if needed > self.pool.num_free - self._blocks_promised():
                break
            self.pool.extend(request.block_table, request.num_computed_tokens + query_len)
            self.waiting.popleft()
            request.state = RequestState.RUNNING
            request.first_scheduled_s = request.first_scheduled_s or time.perf_counter()
            self.running.append(request)
            requests.append(request)
            query_lens.append(query_len)
            budget -= query_len
        if not requests:
            return None
        return Batch.build(requests, query_lens, block_size=self.pool.block_size)

    def advance(self, batch: Batch) -> None:
        """Records that the batch's tokens are in the cache."""
        for request, query_len in zip(batch.requests, batch.query_lens, strict=True):
            request.num_computed_tokens += query_len

    def finish(
        self, request: Request, reason: FinishReason, stop_reason: str | int | None = None
    ) -> None:
        """Ends a request in whatever state it is and frees its blocks."""
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pool.release(request.block_table)
        request.finish(reason, stop_reason)

    def check_integrity(self) -> None:
        self.pool.check_integrity([r.block_table for r in (*self.running, *self.waiting)])

    def _blocks_promised(self) -> int:
        """Blocks that running requests still need for tokens they already have."""
        return sum(
            max(0, self.pool.num_blocks_for(len(r.token_ids)) - len(r.block_table))
            for r in self.running
        )

    def _make_room(self, request: Request, num_tokens: int, scheduled: list[Request]) -> bool:
        """Extends the request's blocks, preempting younger requests; False if it has to wait."""
        while not self.pool.extend(request.block_table, num_tokens):
            victim = next((r for r in reversed(self.running) if r not in scheduled), None)
            assert victim is not None, f"{num_tokens=} exceed the cache"
            if victim is request and scheduled:
                return False  # what is scheduled will free its blocks; the work done so far is kept
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        self.running.remove(request)
        self.pool.release(request.block_table)
        request.num_computed_tokens = 0
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)


def _tokens_missing(request: Request) -> int:
    return len(request.token_ids) - request.num_computed_tokens
