"""The scheduler: chunked prefill, budget, preemption, and no block ever lost."""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from moejet.block_pool import BlockPool, extend_hashes, salted
from moejet.cache_blocks import CacheBlocks
from moejet.prefix_store import PrefixStore
from moejet.prefix_tier import PrefixTier
from moejet.request import Request, RequestState, SamplingParams
from moejet.scheduler import Scheduler

_ORDER = itertools.count()


def _request(name: str, num_tokens: int, limit: int = 1000, tokens=None, priority=0) -> Request:
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


def _scheduler(num_blocks=8, block_size=4, budget=16, max_requests=8) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, block_size), max_batch_tokens=budget, max_num_requests=max_requests
    )


def test_long_prompt_is_chunked_while_others_decode():
    scheduler = _scheduler(num_blocks=64, budget=8)
    short, long = _request("short", 4), _request("long", 20)
    scheduler.add(short)
    batch = scheduler.schedule()
    scheduler.advance(batch)
    assert batch.sampled == [short]
    short.token_ids.append(0)
    scheduler.add(long)
    sizes = []
    while long.num_computed_tokens < 20:
        batch = scheduler.schedule()
        scheduler.advance(batch)
        assert batch.requests[0] is short
        assert batch.num_tokens <= 8
        sizes.append(batch.query_lens[1])
        short.token_ids.append(0)
    assert sizes == [7, 7, 6]
    assert batch.sampled == [short, long]


def test_slots_follow_the_block_table():
    scheduler = _scheduler(block_size=4)
    request = _request("a", 6)
    scheduler.add(request)
    batch = scheduler.schedule()
    first, second = request.block_table
    expected = [first * 4 + i for i in range(4)] + [second * 4, second * 4 + 1]
    assert batch.slot_mapping.tolist() == expected
    assert batch.positions.tolist() == list(range(6))
    assert batch.context_lens == [6]


def test_requests_wait_until_they_fit_whole():
    scheduler = _scheduler(num_blocks=4, block_size=4, budget=64)
    first, second = _request("first", 12), _request("second", 8)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.schedule().requests == [first]
    assert second.state is RequestState.WAITING
    scheduler.finish(first, "stop")
    assert scheduler.schedule().requests == [second]


def test_youngest_is_preempted_and_recomputed():
    scheduler = _scheduler(num_blocks=4, block_size=2, budget=64)
    old, young = _request("old", 4), _request("young", 4)
    scheduler.add(old)
    scheduler.add(young)
    batch = scheduler.schedule()
    scheduler.advance(batch)
    for request in (old, young):
        request.token_ids.append(0)
    batch = scheduler.schedule()
    assert batch.requests == [old]
    assert young.state is RequestState.WAITING
    assert young.num_computed_tokens == 0
    assert young.block_table == []
    assert scheduler.num_preemptions == 1
    scheduler.check_integrity()


def test_pool_refuses_double_release():
    pool = BlockPool(2, 4)
    table: list[int] = []
    assert pool.extend(table, 5)
    assert not pool.extend([], 1)
    copy = list(table)
    pool.release(table)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(copy)


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules_finish_everything(seed):
    """Any mix of lengths in a tiny pool: every request gets all its tokens, and no block is lost."""
    rng = random.Random(seed)
    scheduler = _scheduler(
        num_blocks=rng.randint(6, 12), block_size=4, budget=rng.randint(3, 20), max_requests=5
    )
    capacity = scheduler.pool.num_blocks * 4
    requests = [
        _request(str(i), n := rng.randint(1, capacity - 4), limit=rng.randint(n + 1, capacity))
        for i in range(12)
    ]
    pending = list(requests)
    for _ in range(20000):
        if pending and rng.random() < 0.3:
            scheduler.add(pending.pop())
        if rng.random() < 0.01 and scheduler.running:
            scheduler.finish(rng.choice(scheduler.running), "abort")
        batch = scheduler.schedule()
        if batch is None:
            if not pending and not scheduler.has_work:
                break
            continue
        scheduler.check_integrity()
        scheduler.advance(batch)
        for request in batch.sampled:
            request.token_ids.append(0)
            if len(request.token_ids) >= request.max_total_tokens:
                scheduler.finish(request, "length")
    assert all(r.state is RequestState.FINISHED for r in requests)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


class Slots:
    """A list of contexts kept as numbers in bytes [2 layers, blocks, 8 x block_size], which can go to disk."""

    known: ClassVar[dict[tuple, int]] = {}
    contexts: ClassVar[list[tuple]] = []

    def __init__(self, num_blocks: int, block_size: int):
        self.bytes = np.full((2, num_blocks, 8 * block_size), 255, np.uint8)
        self.numbers = self.bytes.view(np.int64).reshape(2, -1)

    def __setitem__(self, slot: int, context: tuple | None) -> None:
        if context is not None and context not in self.known:
            self.known[context] = len(self.contexts)
            self.contexts.append(context)
        number = -1 if context is None else self.known[context]
        self.numbers[:, slot] = number, ~number

    def __getitem__(self, slot: int) -> tuple | None:
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

    def run(self, batch) -> None:
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


def _drive(scheduler, cache, until=lambda: False, next_token=lambda request: 7) -> None:
    while scheduler.has_work and not until():
        batch = scheduler.schedule()
        scheduler.check_integrity()
        cache.run(batch)
        scheduler.advance(batch)
        for request in batch.sampled:
            request.token_ids.append(next_token(request))
            if len(request.token_ids) >= request.max_total_tokens:
                scheduler.finish(request, "length")


def test_equal_prefixes_are_computed_once():
    scheduler = _scheduler(num_blocks=64, budget=100)
    cache = Cache(scheduler)
    tokens = tuple(range(20))
    first = _request("first", 0, limit=24, tokens=tokens)
    scheduler.add(first)
    _drive(scheduler, cache)
    assert cache.num_computed == 23  # the last token is never an input
    again = _request("again", 0, limit=24, tokens=tokens)
    longer = _request("longer", 0, limit=30, tokens=(*tokens, 7, 7, 99))
    other = _request("other", 0, limit=22, tokens=(*tokens[:9], 55, *tokens[10:]))
    for request in (again, longer, other):
        scheduler.add(request)
    _drive(scheduler, cache)
    # All full blocks that leave one token to compute; 20 and 3 tokens of the first were kept.
    assert (again.num_cached_tokens, longer.num_cached_tokens) == (16, 20)
    assert other.num_cached_tokens == 8
    assert scheduler.pool.num_free == 64


def test_prompts_that_arrive_together_wait_for_the_first_of_them():
    scheduler = _scheduler(num_blocks=64, budget=100)
    cache = Cache(scheduler)
    tokens = tuple(range(40))
    requests = [_request(str(i), 0, limit=44, tokens=(*tokens, i)) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.schedule().requests == requests[:1]
    scheduler = _scheduler(num_blocks=64, budget=100)
    cache = Cache(scheduler)
    for request in requests:
        request.block_table, request.state = [], RequestState.WAITING
        scheduler.add(request)
    _drive(scheduler, cache)
    assert [r.num_cached_tokens for r in requests] == [0, 40, 40, 40, 40]
    assert cache.num_computed == 43 + 4 * 3


def test_idle_blocks_are_evicted_oldest_first():
    scheduler = _scheduler(num_blocks=6, block_size=4, budget=100)
    cache = Cache(scheduler)
    for start in (0, 100, 200):
        scheduler.add(_request("r", 0, limit=10, tokens=tuple(range(start, start + 9))))
        _drive(scheduler, cache)
    assert scheduler.pool.num_evictions == 1
    # The end of the oldest context goes first.
    begin, end = extend_hashes([], b"", range(8), 4)
    assert scheduler.pool.find(end) is None
    assert cache.slots[scheduler.pool.find(begin) * 4 + 3] == tuple(range(4))


def test_without_root_nothing_is_found_again():
    scheduler = Scheduler(BlockPool(64, 4), max_batch_tokens=99, max_num_requests=8, root=None)
    cache = Cache(scheduler)
    for _ in range(2):
        scheduler.add(_request("r", 0, limit=24, tokens=tuple(range(20))))
        _drive(scheduler, cache)
    assert cache.num_computed == 46
    assert scheduler.pool.num_cached == 0


def test_roots_separate_caches():
    tokens = tuple(range(20))
    pool, cache = BlockPool(64, 4), None
    for root, expected in ((b"a", 0), (b"b", 0), (b"a", 16)):
        scheduler = Scheduler(pool, max_batch_tokens=99, max_num_requests=8, root=root)
        request = _request("r", 0, limit=22, tokens=tokens)
        scheduler.add(request)
        cache = cache or Cache(scheduler)
        _drive(scheduler, cache, until=lambda r=request: r.num_computed_tokens >= 20)
        assert request.num_cached_tokens == expected
        scheduler.finish(request, "stop")


def test_salts_separate_caches():
    tokens = tuple(range(20))
    for root in (b"", b"root"):
        pool, cache = BlockPool(64, 4), None
        salts = (None, "a", "b", "a", None, "b", "ab")
        for salt, expected in zip(salts, (0, 0, 0, 16, 16, 16, 0), strict=True):
            scheduler = Scheduler(pool, max_batch_tokens=99, max_num_requests=8, root=root)
            request = _request("r", 0, limit=22, tokens=tokens)
            request.params = replace(request.params, cache_salt=salt)
            scheduler.add(request)
            cache = cache or Cache(scheduler)
            _drive(scheduler, cache, until=lambda r=request: r.num_computed_tokens >= 20)
            assert request.num_cached_tokens == expected, (root, salt)
            scheduler.finish(request, "stop")
    # What is root and what is salt cannot be taken for each other.
    pairs = ((b"a", "bc"), (b"ab", "c"), (b"abc", None), (b"bc", "a"))
    assert len({salted(root, salt) for root, salt in pairs}) == len(pairs)


def test_requests_of_other_salts_do_not_wait_for_each_others_prompts():
    scheduler = _scheduler(num_blocks=64, budget=100)
    requests = [_request(str(i), 0, limit=44, tokens=(*range(40), i)) for i in range(3)]
    for request, salt in zip(requests, ("a", "b", "a"), strict=True):
        request.params = replace(request.params, cache_salt=salt)
        scheduler.add(request)
    assert scheduler.schedule().requests == requests[:2]


def test_forks_share_everything_and_copy_what_they_write():
    scheduler = _scheduler(num_blocks=99, block_size=4, budget=100, max_requests=99)
    cache = Cache(scheduler)
    parent = _request("parent", 0, limit=40, tokens=tuple(range(30)))
    scheduler.add(parent)
    _drive(scheduler, cache, until=lambda: len(parent.token_ids) > 30)
    used = 99 - scheduler.pool.num_free
    children = []
    for i in range(20):
        child = _request(f"child {i}", 0, limit=40, tokens=tuple(range(30)))
        scheduler.fork(parent, child)
        child.token_ids.append(1000 + i)
        children.append(child)
    assert 99 - scheduler.pool.num_free == used == 8
    batch = scheduler.schedule()
    assert batch.requests == [parent, *children]
    # 21 tables end in the same block, of which all but one need a copy; the first seven blocks stay shared.
    assert len(batch.block_copies) == 20
    assert 99 - scheduler.pool.num_free == 8 + 20
    cache.run(batch)
    scheduler.advance(batch)
    for request in batch.sampled:
        request.token_ids.append(5)
    _drive(scheduler, cache)
    assert scheduler.pool.num_free == 99
    assert cache.num_computed == 30 + 21 * 9


def test_forks_that_wait_give_their_blocks_back():
    """A fork holds the only copy of a long prompt while something else needs the whole cache."""
    scheduler = _scheduler(num_blocks=8, block_size=4, budget=100, max_requests=2)
    cache = Cache(scheduler)
    parent = _request("parent", 0, limit=30, tokens=tuple(range(20)))
    scheduler.add(parent)
    _drive(scheduler, cache, until=lambda: len(parent.token_ids) > 20)
    big = _request("big", 30, limit=32, priority=-1)
    child = _request("child", 0, limit=30, tokens=tuple(range(20)))
    scheduler.fork(parent, child)
    child.token_ids.append(3)
    scheduler.finish(parent, "abort")
    scheduler.add(big)
    assert scheduler.waiting == [big, child]
    _drive(scheduler, cache)
    assert child.finish_reason == big.finish_reason == "length"


def test_priorities_run_first_and_are_preempted_last():
    scheduler = _scheduler(num_blocks=6, block_size=2, budget=100, max_requests=2)
    cache = Cache(scheduler)
    low = _request("low", 4, limit=9, priority=5)
    middle = _request("middle", 4, limit=9)
    high = _request("high", 4, limit=9, priority=-5)
    for request in (low, middle, high):
        scheduler.add(request)
    assert scheduler.waiting == [high, middle, low]
    finished = []
    original = scheduler.finish
    scheduler.finish = lambda r, *args: (finished.append(r), original(r, *args))
    _drive(scheduler, cache)
    assert finished == [high, middle, low]
    assert scheduler.num_preemptions > 0


def test_prompts_leave_room_for_those_that_decode():
    scheduler = Scheduler(
        BlockPool(99, 4), max_batch_tokens=64, max_num_requests=9, max_mixed_tokens=10
    )
    alone = _request("a", 50)
    scheduler.add(alone)
    assert scheduler.schedule().query_lens == [50]
    scheduler.finish(alone, "abort")
    decoding, prompt, second = _request("d", 3), _request("p", 50), _request("s", 40)
    scheduler.add(decoding)
    scheduler.advance(scheduler.schedule())
    decoding.token_ids.append(1)
    scheduler.add(prompt)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert batch.requests == [decoding, prompt]
    assert batch.query_lens == [1, 10]


@pytest.mark.parametrize("seed", range(60))
def test_random_sharing_never_mixes_contexts(seed):
    """Few distinct prompts, forks, priorities, aborts, in a pool too small for them, against a model of the cache."""
    _run_randomly(random.Random(seed), None)


@pytest.mark.parametrize("seed", range(30))
def test_random_sharing_with_a_disk_behind_the_pool(seed, tmp_path):
    """As above, over several starts, with segments that vanish, are damaged, or exceed the limit."""
    rng = random.Random(seed)
    state = rng.getstate()
    num_read = 0
    for _ in range(3):
        rng.setstate(state)  # the same prompts
        num_read += _run_randomly(rng, tmp_path, chaos=random.Random(rng.random()))
    assert num_read > 0


def test_nothing_is_read_before_copies_are_made(tmp_path):
    """A block freed in a step may still be the source of that step's copies, so it must not be read into."""
    tokens = tuple(range(500, 521))
    for start in range(2):
        scheduler = _scheduler(num_blocks=64, budget=100)
        cache = Cache(scheduler)
        tier = cache.store_in(tmp_path, scheduler, 1 << 24)
        stored = _request("stored", 0, limit=23, tokens=tokens)
        if start == 0:
            scheduler.add(stored)
            _drive(scheduler, cache)
            tier.close()
    parent = _request("parent", 0, limit=40, tokens=tuple(range(30)))
    scheduler.add(parent)
    _drive(scheduler, cache, until=lambda: len(parent.token_ids) > 30)
    child = _request("child", 0, limit=40, tokens=tuple(range(30)))
    scheduler.fork(parent, child)
    child.token_ids.append(1000)
    scheduler.add(stored)
    batch = scheduler.schedule()
    assert len(batch.block_copies) == 1
    assert batch.requests == [parent, child]
    assert (stored.state, stored.num_computed_tokens) == (RequestState.RUNNING, 0)
    scheduler.check_integrity()
    cache.run(batch)
    scheduler.advance(batch)
    for request in batch.sampled:
        request.token_ids.append(5)
    _drive(scheduler, cache)
    assert stored.num_cached_tokens == 20
    tier.close()


def _spoil(rng, directory):
    """Something happens to a file of the store."""
    files = sorted(directory.glob("*/*.blocks"))
    if not files:
        return
    file = rng.choice(files)
    raw = bytearray(file.read_bytes())
    kind = rng.choice(["vanish", "flip", "cut", "grow", "empty"])
    if kind == "vanish":
        file.unlink()
        return
    if kind == "flip" and raw:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    # Sizes change in place, as a broken disk would do it.
    file.write_bytes({"cut": raw[: len(raw) // 2], "grow": raw + b"x", "empty": b""}.get(kind, raw))


def _run_randomly(rng, directory, chaos=None) -> int:
    """Returns how many blocks were read from disk."""
    scheduler = Scheduler(
        BlockPool(rng.randint(8, 24), size := rng.choice([1, 2, 4, 5])),
        max_batch_tokens=rng.randint(3, 40),
        max_num_requests=rng.randint(1, 6),
        max_mixed_tokens=rng.choice([None, 3]),
    )
    capacity = scheduler.pool.num_blocks * size
    cache = Cache(scheduler)
    num_read = 0
    if directory is not None:
        tier = cache.store_in(directory, scheduler, chaos.choice([300_000, 10_000_000]))
        original = tier.read

        def read(*args) -> int:
            nonlocal num_read
            count = original(*args)
            num_read += count
            return count

        tier.read = read
        tier.read_seconds = lambda n: n * chaos.choice([1e-9, 0.009])
        scheduler._seconds_per_token = 1.0
    trunk = [rng.randint(0, 2) for _ in range(capacity)]
    made, pending = [], 25

    def make(tokens) -> Request:
        limit = rng.randint(len(tokens) + 1, capacity)
        request = _request(str(len(made)), 0, limit, tuple(tokens), priority=rng.choice([0, 0, 1]))
        made.append(request)
        return request

    for _ in range(20000):
        if pending and rng.random() < 0.3:
            pending -= 1
            cut = rng.randint(1, capacity - 2)
            tail = [rng.randint(0, 2) for _ in range(rng.randint(0, 3))]
            scheduler.add(make((trunk[:cut] + tail)[: capacity - 1]))
        if pending and scheduler.running and rng.random() < 0.2:
            parent = rng.choice(scheduler.running)
            tokens = parent.token_ids[: max(1, parent.num_computed_tokens)]
            if 0 < parent.num_computed_tokens < capacity - 2:
                pending -= 1
                child = make([*tokens, rng.randint(0, 9)])
                scheduler.fork(parent, child)
        if scheduler.running and rng.random() < 0.02:
            scheduler.finish(rng.choice(scheduler.running), "abort")
        if scheduler.waiting and rng.random() < 0.02:
            scheduler.finish(rng.choice(scheduler.waiting), "abort")
        if directory is not None and chaos.random() < 0.03:
            tier.flush()
        if directory is not None and chaos.random() < 0.02:
            _spoil(chaos, directory)
        scheduler.check_integrity()
        batch = scheduler.schedule()
        scheduler.check_integrity()
        if batch is None:
            assert not scheduler.has_work
            if not pending:
                break
            continue
        assert batch.num_tokens <= scheduler.max_batch_tokens
        cache.run(batch)
        scheduler.advance(batch)
        for request in batch.sampled:
            request.token_ids.append(rng.randint(0, 2))
            if len(request.token_ids) >= request.max_total_tokens:
                scheduler.finish(request, "length")
    assert all(r.state is RequestState.FINISHED for r in made)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    if directory is not None:
        tier.close()
    return num_read


def test_scored_prompts_share_a_limit_of_their_own_and_delay_nobody_else():
    scheduler = Scheduler(
        BlockPool(64, 4), max_batch_tokens=40, max_num_requests=8, max_scored_tokens=6
    )
    first, second, other = (_request(str(i), 20, limit=20 + (i == 2)) for i in range(3))
    first.scores = second.scores = []
    for request in (first, second, other):
        scheduler.add(request)
    batch = scheduler.schedule()
    assert other in batch.requests  # though a prompt to be scored waits before it
    assert (
        sum(n for r, n in zip(batch.requests, batch.query_lens, strict=True) if r is not other) == 6
    )
    for _ in range(20):
        batch = scheduler.schedule()
        lens = dict(zip(batch.requests, batch.query_lens, strict=True))
        assert lens.get(first, 0) + lens.get(second, 0) <= 6
        assert len(batch.sampled) == len(batch.logits_indices)
        scheduler.advance(batch)
        for request in (first, second, other):
            if request.num_computed_tokens == 20:
                scheduler.finish(request, "length")
        if not scheduler.has_work:
            break
    assert not scheduler.has_work
    assert scheduler.pool.num_cached == 5  # of the other one alone
