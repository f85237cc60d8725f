"""The scheduler: chunked prefill, budget, preemption, and no block ever lost."""

import random

import pytest

from moejet.block_pool import BlockPool
from moejet.request import Request, RequestState, SamplingParams
from moejet.scheduler import Scheduler


def _request(name: str, num_tokens: int, limit: int = 1000) -> Request:
    return Request(
        request_id=name,
        index=0,
        prompt_token_ids=tuple(range(num_tokens)),
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
