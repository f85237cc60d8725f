"""An asynchronous engine survives its own failures: who caused one ends, the others go on."""

import asyncio
from dataclasses import replace

import pytest

from moejet import (
    EngineDeadError,
    EngineStepError,
)
from moejet.output import OutputAssembler
from moejet.policy import TokenPolicy
from moejet.sampler import sample
from moejet.testing.async_engine import (
    PROMPTS,
    SHORT,
    Gate,
    assert_nothing_leaked,
    tokens_of,
    until,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_broken_logits_end_their_request_only(make, expected):
    llm = make()
    runner = llm._thread.engine.runner
    execute = runner.execute

    def spoil(batch):
        logits = execute(batch).clone()
        for row, request in zip(logits, batch.sampled, strict=True):
            if request.prompt_token_ids[0] == 7:
                row[0] = float("nan")
        return logits

    async def main() -> None:
        runner.execute = spoil
        good = asyncio.ensure_future(tokens_of(llm.generate(PROMPTS[0], SHORT)))
        with pytest.raises(EngineStepError, match="NaN or infinite logits") as error:
            await llm.complete([7] * 30, SHORT)
        assert isinstance(error.value.__cause__, FloatingPointError)
        assert await good == expected[PROMPTS[0]]
        assert llm.is_healthy

    asyncio.run(main())
    assert llm.counters()["step_errors"] == 1
    assert llm.counters()["finished_samples"]["error"] == 1
    assert_nothing_leaked(llm)


def test_a_mistake_in_a_policy_reaches_its_owner_only(make, expected):
    llm = make()

    class Mistaken(TokenPolicy):
        seen = 0

        def on_append(self, state, token_id):
            self.seen += 1
            if self.seen == 4:
                raise LookupError("a mistake")

    async def main() -> None:
        good = asyncio.ensure_future(tokens_of(llm.generate(PROMPTS[0], SHORT)))
        stream = llm.generate(PROMPTS[1], replace(SHORT, policy=Mistaken))
        got = []

        async def read() -> None:
            async for delta in stream:
                got.extend(delta.token_ids)

        with pytest.raises(LookupError, match="a mistake"):
            await read()
        assert 0 < len(got) <= 4
        assert tuple(got) == expected[PROMPTS[1]][: len(got)]
        assert await good == expected[PROMPTS[0]]

    asyncio.run(main())
    assert llm.counters()["step_errors"] == 0
    assert_nothing_leaked(llm)


def test_a_step_that_fails_once_ends_nobody(make, expected):
    llm = make(max_num_requests=2)
    runner = llm._thread.engine.runner
    execute = runner.execute

    def fail_once(batch):
        runner.execute = execute
        raise MemoryError("no room for the batch")

    async def main() -> None:
        gate = Gate(llm)
        tasks = []
        for prompt in PROMPTS[:4]:
            tasks.append(asyncio.ensure_future(llm.complete(prompt, SHORT)))
            await until(lambda: llm.counters()["accepted_requests"] == len(tasks))
        await until(gate.is_inside.is_set)
        gate.execute = fail_once
        gate.is_open.set()
        results = await asyncio.gather(*tasks)
        for prompt, result in zip(PROMPTS[:4], results, strict=True):
            assert result.outputs[0].token_ids == expected[prompt]

    asyncio.run(main())
    assert llm.counters()["step_errors"] == 0
    assert_nothing_leaked(llm)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("place", ["forward", "sampler"])
def test_who_breaks_every_step_ends_alone(make, expected, monkeypatch, place, n):
    llm = make(max_batch_tokens=64)
    runner = llm._thread.engine.runner
    execute = runner.execute
    poison = 200
    assert not any(poison in llm.tokenizer.encode(prompt) for prompt in PROMPTS)

    def forward(batch):
        if poison in batch.token_ids.tolist():
            raise OverflowError("a poisonous token")
        return execute(batch)

    def sampler(logits, requests):
        if any(poison in r.token_ids for r in requests):
            raise OverflowError("a poisonous token")
        return sample(logits, requests)

    if place == "forward":
        runner.execute = forward
    else:
        monkeypatch.setattr("moejet.step_compute.sample", sampler)

    async def main() -> None:
        good = [asyncio.ensure_future(tokens_of(llm.generate(p, SHORT))) for p in PROMPTS[:9]]
        # The poison is in the last chunk of a prompt that takes several steps.
        bad = [
            asyncio.ensure_future(llm.complete([*[9 + i] * 99, poison], replace(SHORT, n=n)))
            for i in range(2)
        ]
        assert await asyncio.gather(*good) == [expected[p] for p in PROMPTS[:9]]
        for result in await asyncio.gather(*bad, return_exceptions=True):
            assert isinstance(result, EngineStepError)
            assert "OverflowError: a poisonous token" in str(result)
            assert isinstance(result.__cause__, OverflowError)
        assert llm.is_healthy

    asyncio.run(main())
    assert llm.counters()["step_errors"] == 2
    assert llm.counters()["finished_samples"] == {"length": 9, "error": 2 * n}
    assert_nothing_leaked(llm)


def test_a_failing_schedule_ends_requests_until_it_works(make, expected):
    llm = make()
    scheduler = llm._thread.engine.scheduler
    find = scheduler._find_prefix

    def fail(request):
        if request.prompt_token_ids[0] == 7:
            raise KeyError("what is this")
        return find(request)

    async def main() -> None:
        scheduler._find_prefix = fail
        with pytest.raises(EngineStepError, match="what is this"):
            await llm.complete([7] * 20, SHORT)
        assert await tokens_of(llm.generate(PROMPTS[0], SHORT)) == expected[PROMPTS[0]]
        assert llm.is_healthy

    asyncio.run(main())
    assert_nothing_leaked(llm)


def test_an_engine_that_keeps_failing_is_dead(make):
    llm = make(max_num_requests=1)

    def fail(batch):
        raise OSError("the card is gone")

    async def main() -> None:
        llm._thread.engine.runner.execute = fail
        tasks = [asyncio.ensure_future(llm.complete(p, SHORT)) for p in PROMPTS[:3]]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {type(result) for result in results}
        assert kinds <= {EngineStepError, EngineDeadError}
        assert all("the card is gone" in str(result) for result in results)
        await until(lambda: llm.health()["state"] == "dead")
        assert not llm.is_healthy
        assert llm.health()["error"] == "OSError: the card is gone"
        with pytest.raises(EngineDeadError, match="the card is gone") as error:
            await llm.complete("abc", SHORT)
        assert isinstance(error.value.__cause__, OSError)
        await llm.close()

    asyncio.run(main())
    assert not llm._thread.engine._groups


def test_output_that_cannot_be_built_ends_its_request_only(make, expected, monkeypatch):
    llm = make()
    push = OutputAssembler.push

    def fail(self, token_id):
        monkeypatch.setattr(OutputAssembler, "push", push)
        raise IndexError("no such character")

    monkeypatch.setattr(OutputAssembler, "push", fail)
    with pytest.raises(IndexError, match="no such character"):
        asyncio.run(llm.complete("abc", SHORT))
    assert_nothing_leaked(llm)
    assert asyncio.run(llm.complete(PROMPTS[1], SHORT)).outputs[0].token_ids == expected[PROMPTS[1]]


def test_a_hung_step_fails_its_requests_and_recovers(make, expected):
    llm = make(step_timeout_s=0.3, max_num_requests=1)

    async def main() -> None:
        gate = Gate(llm)
        tasks = [asyncio.ensure_future(llm.complete(p, SHORT, request_id=p)) for p in PROMPTS[:3]]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [EngineStepError] * 3
        assert "step_timeout_s=0.3" in str(results[0])
        assert not llm.is_healthy
        assert llm.health()["state"] == "stuck"
        assert llm.health()["step_running_s"] >= 0.3
        with pytest.raises(EngineStepError, match="once it returns"):
            await llm.complete("abc", SHORT)
        gate.open()
        await until(lambda: llm.is_healthy)
        # The same ids again: what the late step computed for their first owners goes nowhere.
        tasks = [tokens_of(llm.generate(p, SHORT, request_id=p)) for p in PROMPTS[:3]]
        assert await asyncio.gather(*tasks) == [expected[p] for p in PROMPTS[:3]]

    asyncio.run(main())
    assert llm.counters()["step_timeouts"] == 1
    assert_nothing_leaked(llm)


def test_what_a_hung_request_leaves_never_reaches_another_of_the_same_id(make, expected):
    llm = make(step_timeout_s=0.3, max_num_requests=1)
    thread, reserved = llm._thread, []
    deliver = thread._loop._deliver

    def reserve_first(deltas):
        if not reserved:  # the hung step has returned, nothing of it was delivered or aborted yet
            reserved.append(thread.reserve("abc", 0))
        deliver(deltas)

    async def main() -> None:
        gate = Gate(llm)
        task = asyncio.ensure_future(llm.complete("abc", SHORT, request_id="abc"))
        with pytest.raises(EngineStepError):
            await task
        thread._loop._deliver = reserve_first
        gate.open()
        await until(lambda: reserved and not thread._loop._in_engine)
        assert not reserved[0].ended.done()
        assert reserved[0].mailbox.num_unread == 0
        thread.cancel(reserved[0])
        assert await tokens_of(llm.generate(PROMPTS[0], SHORT)) == expected[PROMPTS[0]]

    asyncio.run(main())
    assert_nothing_leaked(llm)


def test_closing_does_not_wait_for_a_hung_step(make):
    llm = make(step_timeout_s=0.1)

    async def main() -> None:
        gate = Gate(llm)
        with pytest.raises(EngineStepError):
            await llm.complete("abc", SHORT)
        await asyncio.wait_for(llm.close(), 5)
        gate.open()
        await until(lambda: llm._thread._state.has_ended)

    asyncio.run(main())
