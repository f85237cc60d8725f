"""Continuous batching in one rule: each request's num_computed_tokens catches up with its tokens.

There is no prefill phase and no decode phase. Every step gives each running request the tokens it lacks, within a
budget per step, so a long prompt is computed in chunks while the others go on decoding. When the cache is full, the
request of the lowest priority, and of those the youngest, gives its blocks back and is computed again later: its tokens
are kept, and what nobody needed meanwhile is found again by its hash.

Blocks are shared in two ways. A full block is found by the hash of all tokens up to its end (`BlockPool`), so equal
prompts are computed once. A fork takes its parent's table as it is; who writes into a shared block first gets a copy.
What is not in the pool may be in a store behind it: such blocks are read when their request is admitted, all at once if
nothing else runs, otherwise a few per step.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from moejet.batch import Batch
from moejet.block_pool import BlockPool, BlockStore, extend_hashes, salted
from moejet.request import FinishReason, Request, RequestState
from moejet.step_plan import StepPlan, tokens_missing, turn

_READ_SECONDS = 0.02  # of a step that computes for others
_MIN_TIMED_TOKENS = 64  # a step with fewer says little about the speed of prompts


@dataclass(slots=True)
class _Read:
    """Blocks that a request still has to read; counts: into its cached tokens."""

    num_blocks: int
    counts: bool


class Scheduler:
    """Owns the queues and the blocks. Not thread-safe: the engine calls it from one thread.

    max_mixed_tokens: of a step's tokens, how many may be prompts while other requests decode; they wait for the whole
    step · max_scored_tokens: how many may be of prompts that are scored, whose logits are all there at once
    root: what the hash of a first block starts from, with a request's own salt; None switches prefix reuse off
    store: may be set before the first request
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_num_requests: int,
        max_mixed_tokens: int | None = None,
        max_scored_tokens: int | None = None,
        root: bytes | None = b"",
    ):
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_mixed_tokens = max_mixed_tokens or max_batch_tokens
        self.max_scored_tokens = max_scored_tokens or max_batch_tokens
        self.max_num_requests = max_num_requests
        self.root = root
        self.waiting: list[Request] = []  # by priority and age
        self.running: list[Request] = []  # by admission
        self.held: list[Request] = []  # branches that do not run, those longest idle first
        self.num_preemptions = 0
        # Block copies that have not been made yet; whoever makes them empties the list.
        self.copies: list[tuple[int, int]] = []
        self.store: BlockStore | None = None
        self._reads: dict[Request, _Read] = {}
        self._seconds_per_token = 0.0  # of prompts; 0: not known yet
        self._scheduled_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=turn)

    def fork(self, parent: Request, child: Request) -> None:
        """Gives a new request what the parent has computed, and queues it; its tokens begin with the parent's."""
        self._share(parent, child)
        self.add(child)

    def hold(self, request: Request, parent: Request | None = None) -> None:
        """Keeps a new branch that does not run yet, with what its parent has computed."""
        if parent is not None:
            self._share(parent, request)
        self.held.append(request)

    def resume(self, request: Request) -> None:
        """Queues a held branch."""
        self.held.remove(request)
        request.state = RequestState.WAITING
        request.finish_reason = request.stop_reason = None
        self.add(request)

    def drop(self, request: Request) -> None:
        """Forgets a held branch and frees its blocks."""
        self.held.remove(request)
        self._take_blocks(request)

    def rewind(self, request: Request) -> None:
        """Lets the last token count as not computed: its logits are wanted once more."""
        request.num_computed_tokens = min(request.num_computed_tokens, len(request.token_ids) - 1)
        unused = request.block_table[self.pool.num_blocks_for(request.num_computed_tokens) :]
        del request.block_table[len(request.block_table) - len(unused) :]
        self.pool.release(unused)

    def _share(self, parent: Request, child: Request) -> None:
        assert not child.block_table, f"{child.request_id=} has blocks"
        count = self.pool.num_blocks_for(parent.num_computed_tokens)
        child.block_table = parent.block_table[:count]
        self.pool.share(child.block_table)
        child.num_computed_tokens = child.num_cached_tokens = parent.num_computed_tokens

    def schedule(self) -> Batch | None:
        """Chooses this step's tokens; None if there is nothing to do."""
        step = StepPlan(
            self.max_batch_tokens,
            self.max_mixed_tokens,
            self.max_scored_tokens,
            others_wait=bool(self.waiting),
        )
        for request in sorted(self.running, key=tokens_missing):
            if request.state is not RequestState.RUNNING:
                continue
            if tokens_missing(request) == 0:  # an earlier step was cut off behind `advance`
                self.rewind(request)
            if not self._read(request, step):
                continue
            query_len = step.share(request, tokens_missing(request))
            if query_len == 0 or not self._make_room(request, query_len, step):
                continue
            step.take(request, query_len)
        step.others_wait = False
        self._admit(step)
        if not step.requests:
            return None
        batch = Batch.build(step.requests, step.query_lens, block_size=self.pool.block_size)
        batch.block_copies = self.copies
        self._scheduled_s = time.perf_counter()
        return batch

    def advance(self, batch: Batch) -> None:
        """Records that the batch's tokens are in the cache; full blocks can be found from now on."""
        size = self.pool.block_size
        if batch.num_tokens >= _MIN_TIMED_TOKENS:
            seconds = (time.perf_counter() - self._scheduled_s) / batch.num_tokens
            self._seconds_per_token = 0.5 * (seconds + (self._seconds_per_token or seconds))
        for request, query_len in zip(batch.requests, batch.query_lens, strict=True):
            if request.state is not RequestState.RUNNING:  # aborted while the step ran
                continue
            first = request.num_computed_tokens // size
            request.num_computed_tokens += query_len
            end = request.num_computed_tokens // size
            if end > first:
                hashes = self._hashes(request)[first:end]
                for block, digest in zip(request.block_table[first:], hashes, strict=False):
                    self.pool.register(block, digest)
            self._offer(request)

    def finish(
        self, request: Request, reason: FinishReason, stop_reason: str | int | None = None
    ) -> None:
        """Ends a request in whatever state it is and frees its blocks; a branch is held with them."""
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._reads.pop(request, None)
        if request.is_branch:
            self.held.append(request)
        else:
            self._take_blocks(request)
        request.finish(reason, stop_reason)

    def check_integrity(self) -> None:
        requests = (*self.running, *self.waiting, *self.held)
        self.pool.check_integrity([r.block_table for r in requests])

    def _admit(self, step: StepPlan) -> None:
        being_computed = self._being_computed() if self.waiting else set()
        for request in list(self.waiting):
            if step.budget == 0 or len(self.running) >= self.max_num_requests:
                return
            found = [] if request.block_table else self._find_prefix(request)
            if not request.block_table and self._next_hash(request, found) in being_computed:
                continue  # another request computes the same: it will be found
            query_len = step.share(
                request, tokens_missing(request) - len(found) * self.pool.block_size
            )
            if query_len == 0 and request.scores is not None and step.budget > 0:
                continue  # only what a step may score is used up
            if query_len == 0:
                return
            self.pool.share(found)
            # Admit only what can be computed in full, so that two half-read prompts never starve each other.
            table = request.block_table or found
            needed = self.pool.num_blocks_for(len(request.token_ids)) - len(table)
            needed += self._needs_copy(request)
            while not self.running and needed > self.pool.num_free:
                if not self._drop_fork(keep=request):
                    break
            promised = self._blocks_promised()
            while needed > self.pool.num_free - promised and self._drop_held():
                pass
            if needed > self.pool.num_free - promised:
                self.pool.release(found)
                return
            if found:
                request.block_table = found
                request.num_computed_tokens = len(found) * self.pool.block_size
                if not request.first_scheduled_s:
                    request.num_cached_tokens = request.num_computed_tokens
            self.waiting.remove(request)
            request.state = RequestState.RUNNING
            self._plan_read(request)
            request.first_scheduled_s = request.first_scheduled_s or time.perf_counter()
            self.running.append(request)
            if self._read(request, step):
                query_len = step.share(request, tokens_missing(request))
                has_room = self._make_room(request, query_len, step)
                assert has_room, f"{request.request_id=} {query_len=}"
                step.take(request, query_len)
            first = request.num_computed_tokens // self.pool.block_size
            being_computed.update(self._hashes(request)[first:])

    def _find_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the beginning of its tokens; one token is left to compute, whose logits are wanted."""
        found = []
        for digest in self._hashes(request)[: (len(request.token_ids) - 1) // self.pool.block_size]:
            block = self.pool.find(digest)
            if block is None:
                break
            found.append(block)
        return found

    def _next_hash(self, request: Request, found: list[int]) -> bytes | None:
        hashes = self._hashes(request)
        return hashes[len(found)] if len(found) < len(hashes) else None

    def _being_computed(self) -> set[bytes]:
        """Hashes of the full blocks that running requests have tokens for but have not computed."""
        size = self.pool.block_size
        return {
            digest
            for request in self.running
            if tokens_missing(request) > 1
            for digest in self._hashes(request)[request.num_computed_tokens // size :]
        }

    def _hashes(self, request: Request) -> list[bytes]:
        """Of every full block of its tokens: a chain, each one covers all tokens before it.

        [] where nothing is reused: every token of a prompt that is scored has to be computed.
        """
        if self.root is None or request.scores is not None:
            return []
        hashes = request.block_hashes
        root = self.root if hashes else salted(self.root, request.params.cache_salt)
        return extend_hashes(hashes, root, request.token_ids, self.pool.block_size)

    def _offer(self, request: Request) -> None:
        """Names to the store the full blocks that it has not heard of from this request."""
        if self.store is None or request.num_computed_tokens < self.store.min_tokens:
            return
        first, end = request.num_offered_blocks, request.num_computed_tokens // self.pool.block_size
        hashes = self._hashes(request)[first:end]
        if hashes:
            self.store.offer(request.block_table[first:end], hashes)
            request.num_offered_blocks = end

    def _plan_read(self, request: Request) -> None:
        """Decides how many blocks to read behind those that were found; one token is left to compute."""
        size = self.pool.block_size
        if self.store is None or request.num_computed_tokens % size:
            return
        first, end = request.num_computed_tokens // size, (len(request.token_ids) - 1) // size
        count = self.store.count(self._hashes(request)[first:end])
        if count == 0:
            return
        compute_seconds = count * size * self._seconds_per_token
        if self._seconds_per_token and self.store.read_seconds(count) > compute_seconds:
            self.store.expect_faster()
        else:
            self._reads[request] = _Read(count, counts=not request.first_scheduled_s)

    def _read(self, request: Request, step: StepPlan) -> bool:
        """Reads what was planned; False if the request has to wait for the next step."""
        read = self._reads.get(request)
        if read is None:
            return True
        assert self.store is not None
        if (
            self.copies
        ):  # a block to be copied later in this step could be the one that is read into
            return False
        first, count = len(request.block_table), read.num_blocks
        if step.requests:
            affordable = int(_READ_SECONDS / self.store.read_seconds(1))
            count = min(count, max(1, affordable))
        end = (first + count) * self.pool.block_size
        if not self._until_free(request, step, lambda: self.pool.extend(request.block_table, end)):
            return False
        hashes = self._hashes(request)[first : first + count]
        done = self.store.read(hashes, request.block_table[first:])
        missed = request.block_table[first + done :]
        del request.block_table[first + done :]
        self.pool.release(missed)
        for block, digest in zip(request.block_table[first:], hashes, strict=False):
            self.pool.register(block, digest)
        num_tokens = done * self.pool.block_size
        request.num_computed_tokens += num_tokens
        if read.counts:
            request.num_cached_tokens += num_tokens
            request.num_disk_tokens += num_tokens
        read.num_blocks -= done
        if done == count and read.num_blocks:
            return False
        del self._reads[request]
        return True

    def _blocks_promised(self) -> int:
        """Blocks that running requests still need for tokens they already have."""
        return sum(
            max(0, self.pool.num_blocks_for(len(r.token_ids)) - len(r.block_table))
            + self._needs_copy(r)
            for r in self.running
        )

    def _needs_copy(self, request: Request) -> bool:
        """Whether the block that its next token goes to is also another request's."""
        index, offset = divmod(request.num_computed_tokens, self.pool.block_size)
        return bool(
            offset and request.block_table and self.pool.is_shared(request.block_table[index])
        )

    def _make_room(self, request: Request, query_len: int, step: StepPlan) -> bool:
        """Blocks of its own for the next tokens, preempting others; False if it has to wait."""
        end = request.num_computed_tokens + query_len

        def attempt() -> bool:
            return self._own_block(request) and self.pool.extend(request.block_table, end)

        return self._until_free(request, step, attempt)

    def _own_block(self, request: Request) -> bool:
        if not self._needs_copy(request):
            return True
        index = request.num_computed_tokens // self.pool.block_size
        copy = self.pool.replace_shared(request.block_table, index)
        if copy is None:
            return False
        self.copies.append(copy)
        return True

    def _until_free(self, request: Request, step: StepPlan, attempt: Callable[[], bool]) -> bool:
        while not attempt():
            if self._drop_fork(keep=request):
                continue
            victim = max((r for r in self.running if r not in step.requests), key=turn)
            if victim is request and step.requests:
                return False  # what is scheduled will free its blocks; the work done so far is kept
            assert victim is not request or len(self.running) > 1, "one request exceeds the cache"
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _drop_fork(self, *, keep: Request) -> bool:
        """Takes the blocks of a held branch, or of the last fork in turn that waits; False if there is none."""
        if self._drop_held():
            return True
        for holder in reversed(self.waiting):
            if holder is not keep and holder.block_table:
                self._take_blocks(holder)
                return True
        return False

    def _drop_held(self) -> bool:
        """Takes the blocks of the branch that has been idle longest; its tokens are kept."""
        for holder in self.held:
            if holder.block_table:
                self._take_blocks(holder)
                return True
        return False

    def _take_blocks(self, request: Request) -> None:
        """Frees a request's blocks and forgets copies into them. Its tokens are kept."""
        # In place: a batch may hold the list.
        self.copies[:] = [copy for copy in self.copies if copy[1] not in request.block_table]
        self.pool.release(request.block_table)
        request.num_computed_tokens = 0

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        self.running.remove(request)
        self._reads.pop(request, None)
        self._take_blocks(request)
        request.state = RequestState.WAITING
        self.add(request)
