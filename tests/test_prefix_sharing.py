"""The scheduler where contexts begin alike: shared blocks, forks, eviction, and a disk behind the pool."""

import random
from dataclasses import replace

import pytest

from moejet.block_pool import BlockPool, extend_hashes, salted
from moejet.request import Request, RequestState
from moejet.scheduler import Scheduler
from moejet.testing.scheduling import Cache, drive, make_request, make_scheduler

pytestmark = pytest.mark.usefixtures("one_thread")


def test_equal_prefixes_are_computed_once():
    scheduler = make_scheduler(num_blocks=64, budget=100)
    cache = Cache(scheduler)
    tokens = tuple(range(20))
    first = make_request("first", 0, limit=24, tokens=tokens)
    scheduler.add(first)
    drive(scheduler, cache)
    assert cache.num_computed == 23  # the last token is never an input
    again = make_request("again", 0, limit=24, tokens=tokens)
    longer = make_request("longer", 0, limit=30, tokens=(*tokens, 7, 7, 99))
    other = make_request("other", 0, limit=22, tokens=(*tokens[:9], 55, *tokens[10:]))
    for request in (again, longer, other):
        scheduler.add(request)
    drive(scheduler, cache)
    # All full blocks that leave one token to compute; 20 and 3 tokens of the first were kept.
    assert (again.num_cached_tokens, longer.num_cached_tokens) == (16, 20)
    assert other.num_cached_tokens == 8
    assert scheduler.pool.num_free == 64


def test_prompts_that_arrive_together_wait_for_the_first_of_them():
    scheduler = make_scheduler(num_blocks=64, budget=100)
    cache = Cache(scheduler)
    tokens = tuple(range(40))
    requests = [make_request(str(i), 0, limit=44, tokens=(*tokens, i)) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.schedule().requests == requests[:1]
    scheduler = make_scheduler(num_blocks=64, budget=100)
    cache = Cache(scheduler)
    for request in requests:
        request.block_table, request.state = [], RequestState.WAITING
        scheduler.add(request)
    drive(scheduler, cache)
    assert [r.num_cached_tokens for r in requests] == [0, 40, 40, 40, 40]
    assert cache.num_computed == 43 + 4 * 3


def test_idle_blocks_are_evicted_oldest_first():
    scheduler = make_scheduler(num_blocks=6, block_size=4, budget=100)
    cache = Cache(scheduler)
    for start in (0, 100, 200):
        scheduler.add(make_request("r", 0, limit=10, tokens=tuple(range(start, start + 9))))
        drive(scheduler, cache)
    assert scheduler.pool.num_evictions == 1
    # The end of the oldest context goes first.
    begin, end = extend_hashes([], b"", range(8), 4)
    assert scheduler.pool.find(end) is None
    assert cache.slots[scheduler.pool.find(begin) * 4 + 3] == tuple(range(4))


def test_without_root_nothing_is_found_again():
    scheduler = Scheduler(BlockPool(64, 4), max_batch_tokens=99, max_num_requests=8, root=None)
    cache = Cache(scheduler)
    for _ in range(2):
        scheduler.add(make_request("r", 0, limit=24, tokens=tuple(range(20))))
        drive(scheduler, cache)
    assert cache.num_computed == 46
    assert scheduler.pool.num_cached == 0


def test_roots_separate_caches():
    tokens = tuple(range(20))
    pool, cache = BlockPool(64, 4), None
    for root, expected in ((b"a", 0), (b"b", 0), (b"a", 16)):
        scheduler = Scheduler(pool, max_batch_tokens=99, max_num_requests=8, root=root)
        request = make_request("r", 0, limit=22, tokens=tokens)
        scheduler.add(request)
        cache = cache or Cache(scheduler)
        drive(scheduler, cache, until=lambda r=request: r.num_computed_tokens >= 20)
        assert request.num_cached_tokens == expected
        scheduler.finish(request, "stop")


def test_salts_separate_caches():
    tokens = tuple(range(20))
    for root in (b"", b"root"):
        pool, cache = BlockPool(64, 4), None
        salts = (None, "a", "b", "a", None, "b", "ab")
        for salt, expected in zip(salts, (0, 0, 0, 16, 16, 16, 0), strict=True):
            scheduler = Scheduler(pool, max_batch_tokens=99, max_num_requests=8, root=root)
            request = make_request("r", 0, limit=22, tokens=tokens)
            request.params = replace(request.params, cache_salt=salt)
            scheduler.add(request)
            cache = cache or Cache(scheduler)
            drive(scheduler, cache, until=lambda r=request: r.num_computed_tokens >= 20)
            assert request.num_cached_tokens == expected, (root, salt)
            scheduler.finish(request, "stop")
    # What is root and what is salt cannot be taken for each other.
    pairs = ((b"a", "bc"), (b"ab", "c"), (b"abc", None), (b"bc", "a"))
    assert len({salted(root, salt) for root, salt in pairs}) == len(pairs)


def test_requests_of_other_salts_do_not_wait_for_each_others_prompts():
    scheduler = make_scheduler(num_blocks=64, budget=100)
    requests = [make_request(str(i), 0, limit=44, tokens=(*range(40), i)) for i in range(3)]
    for request, salt in zip(requests, ("a", "b", "a"), strict=True):
        request.params = replace(request.params, cache_salt=salt)
        scheduler.add(request)
    assert scheduler.schedule().requests == requests[:2]


def _parent(scheduler, num_tokens):
    """A cache, and a request in it whose prompt is computed, with ten tokens to draw of which it has one."""
    cache = Cache(scheduler)
    parent = make_request("parent", 0, limit=num_tokens + 10, tokens=tuple(range(num_tokens)))
    scheduler.add(parent)
    drive(scheduler, cache, until=lambda: len(parent.token_ids) > num_tokens)
    return cache, parent


def test_forks_share_everything_and_copy_what_they_write():
    scheduler = make_scheduler(num_blocks=99, block_size=4, budget=100, max_requests=99)
    cache, parent = _parent(scheduler, 30)
    used = 99 - scheduler.pool.num_free
    children = []
    for i in range(20):
        child = make_request(f"child {i}", 0, limit=40, tokens=tuple(range(30)))
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
    drive(scheduler, cache)
    assert scheduler.pool.num_free == 99
    assert cache.num_computed == 30 + 21 * 9


def test_forks_that_wait_give_their_blocks_back():
    """A fork holds the only copy of a long prompt while something else needs the whole cache."""
    scheduler = make_scheduler(num_blocks=8, block_size=4, budget=100, max_requests=2)
    cache, parent = _parent(scheduler, 20)
    big = make_request("big", 30, limit=32, priority=-1)
    child = make_request("child", 0, limit=30, tokens=tuple(range(20)))
    scheduler.fork(parent, child)
    child.token_ids.append(3)
    scheduler.finish(parent, "abort")
    scheduler.add(big)
    assert scheduler.waiting == [big, child]
    drive(scheduler, cache)
    assert child.finish_reason == big.finish_reason == "length"


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
        scheduler = make_scheduler(num_blocks=64, budget=100)
        cache = Cache(scheduler)
        tier = cache.store_in(tmp_path, scheduler, 1 << 24)
        stored = make_request("stored", 0, limit=23, tokens=tokens)
        if start == 0:
            scheduler.add(stored)
            drive(scheduler, cache)
            tier.close()
    parent = make_request("parent", 0, limit=40, tokens=tuple(range(30)))
    scheduler.add(parent)
    drive(scheduler, cache, until=lambda: len(parent.token_ids) > 30)
    child = make_request("child", 0, limit=40, tokens=tuple(range(30)))
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
    drive(scheduler, cache)
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
        request = make_request(
            str(len(made)), 0, limit, tuple(tokens), priority=rng.choice([0, 0, 1])
        )
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
