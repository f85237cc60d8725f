"""The scheduler: chunked prefill, budget, preemption, and no block ever lost."""

import random

import pytest

from moejet.block_pool import BlockPool
from moejet.request import RequestState
from moejet.scheduler import Scheduler
from moejet.testing.scheduling import Cache, drive, make_request, make_scheduler


def test_long_prompt_is_chunked_while_others_decode():
    scheduler = make_scheduler(num_blocks=64, budget=8)
    short, long = make_request("short", 4), make_request("long", 20)
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
    scheduler = make_scheduler(block_size=4)
    request = make_request("a", 6)
    scheduler.add(request)
    batch = scheduler.schedule()
    first, second = request.block_table
    expected = [first * 4 + i for i in range(4)] + [second * 4, second * 4 + 1]
    assert batch.slot_mapping.tolist() == expected
    assert batch.positions.tolist() == list(range(6))
    assert batch.context_lens == [6]


def test_requests_wait_until_they_fit_whole():
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=64)
    first, second = make_request("first", 12), make_request("second", 8)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.schedule().requests == [first]
    assert second.state is RequestState.WAITING
    scheduler.finish(first, "stop")
    assert scheduler.schedule().requests == [second]


def test_youngest_is_preempted_and_recomputed():
    scheduler = make_scheduler(num_blocks=4, block_size=2, budget=64)
    old, young = make_request("old", 4), make_request("young", 4)
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
    scheduler = make_scheduler(
        num_blocks=rng.randint(6, 12), block_size=4, budget=rng.randint(3, 20), max_requests=5
    )
    capacity = scheduler.pool.num_blocks * 4
    requests = [
        make_request(str(i), n := rng.randint(1, capacity - 4), limit=rng.randint(n + 1, capacity))
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


def test_priorities_run_first_and_are_preempted_last():
    scheduler = make_scheduler(num_blocks=6, block_size=2, budget=100, max_requests=2)
    cache = Cache(scheduler)
    low = make_request("low", 4, limit=9, priority=5)
    middle = make_request("middle", 4, limit=9)
    high = make_request("high", 4, limit=9, priority=-5)
    for request in (low, middle, high):
        scheduler.add(request)
    assert scheduler.waiting == [high, middle, low]
    finished = []
    original = scheduler.finish
    scheduler.finish = lambda r, *args: (finished.append(r), original(r, *args))
    drive(scheduler, cache)
    assert finished == [high, middle, low]
    assert scheduler.num_preemptions > 0


def test_prompts_leave_room_for_those_that_decode():
    scheduler = Scheduler(
        BlockPool(99, 4), max_batch_tokens=64, max_num_requests=9, max_mixed_tokens=10
    )
    alone = make_request("a", 50)
    scheduler.add(alone)
    assert scheduler.schedule().query_lens == [50]
    scheduler.finish(alone, "abort")
    decoding, prompt, second = make_request("d", 3), make_request("p", 50), make_request("s", 40)
    scheduler.add(decoding)
    scheduler.advance(scheduler.schedule())
    decoding.token_ids.append(1)
    scheduler.add(prompt)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert batch.requests == [decoding, prompt]
    assert batch.query_lens == [1, 10]


def test_scored_prompts_share_a_limit_of_their_own_and_delay_nobody_else():
    scheduler = Scheduler(
        BlockPool(64, 4), max_batch_tokens=40, max_num_requests=8, max_scored_tokens=6
    )
    first, second, other = (make_request(str(i), 20, limit=20 + (i == 2)) for i in range(3))
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
