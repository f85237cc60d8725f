"""Strategies on an AsyncLLM: the same answers as alone, beside other requests, and nothing left behind."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from moejet import LLM, AsyncLLM, EngineClosedError, EngineDeadError, QueueFullError, SamplingParams
from moejet.policy import ForceContinuation
from moejet.reasoning import (
    Best,
    Budget,
    ChainOfThought,
    Majority,
    Progress,
    Result,
    Run,
    Sample,
    Single,
    Strategy,
    Task,
    Verifier,
    solve,
)
from moejet.testing.number_answers import NumberAnswers

NUMBERS = NumberAnswers()
PARAMS = SamplingParams(temperature=1.0)
PROMPTS = [
    [{"role": "user", "content": f"Start with {n}, add 25, then multiply by 3."}]
    for n in (17, 18, 19, 20)
]


def run(body: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncLLM(num_threads=1) as llm:
            await body(llm)
            for _ in range(200):  # cancelling takes a moment on the engine's thread
                engine = llm._thread.engine
                if not engine.has_work and not engine.scheduler.held:
                    break
                await asyncio.sleep(0.01)
            assert not engine.scheduler.held

    asyncio.run(asyncio.wait_for(main(), 60))


def test_answers_are_those_of_a_strategy_alone_beside_others(llm: LLM) -> None:
    alone = [solve(llm, p, Sample(4), params=PARAMS, seed=3, answers=NUMBERS) for p in PROMPTS]

    async def body(llm: AsyncLLM) -> None:
        plain = [llm.chat(p, SamplingParams(temperature=0.0)).result() for p in PROMPTS]
        results, outputs = await asyncio.gather(
            asyncio.gather(
                *(
                    llm.solve(p, Sample(4), params=PARAMS, seed=3, answers=NUMBERS).result()
                    for p in PROMPTS
                )
            ),
            asyncio.gather(*plain),
        )
        for expected, result in zip(alone, results, strict=True):
            assert [c.text for c in result.candidates] == [c.text for c in expected.candidates]
            assert result.answer == expected.answer
            assert result.usage.generated_tokens == expected.usage.generated_tokens
            assert result.usage.expert_loads > 0
        assert all(o.outputs[0].finish_reason == "stop" for o in outputs)

    run(body)


def test_progress_and_specifications() -> None:
    async def body(llm: AsyncLLM) -> None:
        events = [e async for e in llm.solve(PROMPTS[0], "vote:3", answers=NUMBERS)]
        assert [type(e) for e in events] == [Progress] * 4 + [Result]
        with pytest.raises(ValueError, match="did you mean 'vote'"):
            await llm.solve(PROMPTS[0], "vot:3", answers=NUMBERS).result()
        with pytest.raises(ValueError, match="empty"):
            await llm.solve("", Single(), answers=NUMBERS).result()
        budget = Budget(total_tokens=50)
        result = await llm.solve(PROMPTS[0], Sample(9), answers=NUMBERS, budget=budget).result()
        assert result.is_exhausted
        assert result.usage.generated_tokens <= 50

    run(body)


@dataclass(frozen=True)
class Endless:
    """Thinks for ever, or waits in the background."""

    in_background: bool = False

    def run(self, task: Task) -> Run[Result]:
        branches = yield from task.open(2)
        yield from task.tell("note", "begun")
        if self.in_background:
            yield from task.background(lambda: time.sleep(0.5))
        params = SamplingParams(ignore_eos=True)
        yield from task.advance(branches, params=params)
        raise AssertionError("this never ends")


def test_leaving_ends_a_run() -> None:
    async def body(llm: AsyncLLM) -> None:
        for in_background in (False, True):
            stream = llm.solve(PROMPTS[0], Endless(in_background), answers=NUMBERS)
            async for _ in stream:
                break
            stream.close()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            task = asyncio.create_task(llm.solve(PROMPTS[0], Endless(), answers=NUMBERS).result())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(body)


def test_nothing_is_kept_of_runs_that_have_ended() -> None:
    """A server would grow with each of them."""

    async def ended(llm: AsyncLLM, strategy: Strategy) -> weakref.ref[Any]:
        stream = llm.solve(PROMPTS[0], strategy, answers=NUMBERS)
        await anext(stream)
        if isinstance(strategy, Endless):
            stream.close()
        elif isinstance(strategy, Untidy):
            with pytest.raises(ZeroDivisionError):
                await stream.result()
        else:
            await stream.result()
        return weakref.ref(stream)

    async def body(llm: AsyncLLM) -> None:
        streams = [await ended(llm, strategy) for strategy in (Sample(2), Endless(), Untidy(True))]
        while gc.collect() >= 0 and any(stream() is not None for stream in streams):
            await asyncio.sleep(0.01)

    run(body)


def test_there_is_a_limit_and_closing_tells_who_waits() -> None:
    async def body() -> None:
        llm = AsyncLLM(num_threads=1)
        streams = [llm.solve(PROMPTS[0], Endless(), answers=NUMBERS) for _ in range(17)]
        for stream in streams[:16]:
            await stream.start()
        with pytest.raises(QueueFullError, match="16 strategies"):
            await streams[16].start()
        waiting = [asyncio.create_task(stream.result()) for stream in streams[:16]]
        await asyncio.sleep(0.05)
        await llm.close(drain=False)
        for task in waiting:
            with pytest.raises(EngineClosedError):
                await task
        with pytest.raises(EngineClosedError):
            await llm.solve(PROMPTS[0], Single(), answers=NUMBERS).result()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_closing_waits_for_strategies() -> None:
    async def body() -> None:
        llm = AsyncLLM(num_threads=1)
        stream = await llm.solve(PROMPTS[0], Sample(4), answers=NUMBERS).start()
        await llm.close(drain=True)
        assert (await stream.result()).answer is not None

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_failing_step_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(llm: AsyncLLM) -> None:
        engine = llm._thread.engine
        stream = llm.solve(PROMPTS[0], Endless(), answers=NUMBERS)
        await anext(stream)
        schedule = engine.scheduler.schedule

        def broken() -> object:
            monkeypatch.setattr(engine.scheduler, "schedule", schedule)
            raise RuntimeError("no schedule today")

        monkeypatch.setattr(engine.scheduler, "schedule", broken)
        with pytest.raises(Exception, match="no schedule today"):
            await stream.result()
        # The engine goes on.
        assert (await llm.solve(PROMPTS[0], Single(), answers=NUMBERS).result()).answer

    run(body)


def test_a_dead_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        llm = AsyncLLM(num_threads=1)
        stream = llm.solve(PROMPTS[0], Endless(), answers=NUMBERS)
        await anext(stream)
        engine = llm._thread.engine

        def broken(*_: object) -> object:
            raise RuntimeError("the machine burns")

        monkeypatch.setattr(engine.scheduler, "schedule", broken)
        monkeypatch.setattr(engine, "probe", broken)
        with pytest.raises(Exception, match="burns"):
            await stream.result()
        with pytest.raises(EngineDeadError):
            await llm.solve(PROMPTS[0], Single(), answers=NUMBERS).result()
        await llm.close(drain=False)

    asyncio.run(asyncio.wait_for(body(), 60))


@dataclass(frozen=True)
class Untidy:
    """Fails in its clean-up, or in the condition that it stops at."""

    in_condition: bool

    def run(self, task: Task) -> Run[Result]:
        [branch] = yield from task.open()
        yield from task.tell("note", "begun")
        try:
            until = (lambda text, ids: 1 // (len(ids) < 5) > 1) if self.in_condition else None
            yield from task.advance([branch], until=until, max_tokens=5 if until else 100_000)
        finally:
            if not self.in_condition:
                raise RuntimeError("the clean-up failed")
        raise AssertionError("unreachable")


def test_what_fails_in_a_strategy_never_ends_the_engine() -> None:
    async def body(llm: AsyncLLM) -> None:
        with pytest.raises(ZeroDivisionError):
            await llm.solve(PROMPTS[0], Untidy(True), answers=NUMBERS).result()
        stream = llm.solve(PROMPTS[0], Untidy(False), answers=NUMBERS)
        await anext(stream)
        stream.close()
        assert (await llm.solve(PROMPTS[0], Single(), answers=NUMBERS).result()).answer
        assert llm.is_healthy

    run(body)


def test_a_stream_that_was_refused_can_be_started_later() -> None:
    async def body(llm: AsyncLLM) -> None:
        streams = [llm.solve(PROMPTS[0], Endless(), answers=NUMBERS) for _ in range(16)]
        for stream in streams:
            await stream.start()
        late = llm.solve(PROMPTS[0], Single(), answers=NUMBERS)
        with pytest.raises(QueueFullError):
            await late.start()
        for stream in streams:
            stream.close()
        for _ in range(500):
            try:
                await late.start()
                break
            except QueueFullError:
                await asyncio.sleep(0.01)
        assert (await late.result()).answer is not None

    run(body)


def test_closing_wakes_who_reads() -> None:
    async def body(llm: AsyncLLM) -> None:
        stream = llm.solve(PROMPTS[0], Endless(), answers=NUMBERS)
        await anext(stream)
        reader = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0.02)
        stream.close()
        assert await asyncio.wait_for(reader, 5) is None

    run(body)


def test_a_second_model_is_refused_where_nobody_would_run_it(llm: LLM) -> None:
    async def body(mine: AsyncLLM) -> None:
        strategy = Sample(2, select=Best(Verifier(llm, yes="1", no="0")))
        with pytest.raises(ValueError, match="second model"):
            await mine.solve(PROMPTS[0], strategy, answers=NUMBERS).result()

    run(body)


@dataclass(frozen=True)
class Evicted:
    """Opens branches again after the cache has lost the prompt."""

    def run(self, task: Task) -> Run[Result]:
        yield from task.open()
        assert task._root is not None
        request = task._root._request
        task.llm.engine.scheduler._take_blocks(request)
        request.num_computed_tokens = 0
        assert not task._root.is_computed
        result = yield from Single().run(task)
        return result


def test_a_prompt_that_the_cache_has_lost_costs_others_nothing() -> None:
    async def body(llm: AsyncLLM) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=300)
        others = [asyncio.create_task(llm.chat(p, params).result()) for p in PROMPTS]
        await asyncio.sleep(0.05)
        for _ in range(5):
            assert (await llm.solve(PROMPTS[0], Evicted(), answers=NUMBERS).result()).answer
        for task in others:
            assert len((await task).outputs[0].token_ids) == 300

    run(body)


def test_reading_a_long_prompt_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the prompt nor what a strategy says later is tokenised where others wait for their tokens."""
    gate, threads = threading.Event(), []

    async def body(llm: AsyncLLM) -> None:
        encode = llm.tokenizer.encode

        def slow(text: str, *args: Any, **options: Any) -> list[int]:
            if "LONG" in text:
                threads.append(threading.current_thread().name)
                assert gate.wait(20), "the other request waited for this"
            return encode(text, *args, **options)

        monkeypatch.setattr(llm.tokenizer, "encode", slow)
        prompt = [{"role": "user", "content": "LONG: start with 17, add 25."}]
        for strategy in ("single", ChainOfThought("LONG")):
            gate.clear()
            stream = await llm.solve(prompt, strategy, answers=NUMBERS).start()
            other = await llm.chat(PROMPTS[0], SamplingParams(temperature=0.0)).result()
            assert other.outputs[0].finish_reason == "stop"
            gate.set()
            assert (await stream.result()).candidates
        assert len(threads) == 3
        assert all(name.startswith("moejet-strategy") for name in threads)

    run(body)


ENDLESS = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=3000)


def test_aborting_ends_with_what_is_there() -> None:
    async def body(llm: AsyncLLM) -> None:
        # Three answers are complete, the fourth goes on for ever.
        stream = llm.solve(PROMPTS[0], LastIsEndless(), answers=NUMBERS, request_id="four")
        found: list[Any] = []
        while len(found) < 3:
            event = await anext(stream)
            found += [event] if isinstance(event, Progress) and event.kind == "candidate" else []
        assert await llm.abort("four")
        result = await stream.result()
        assert result.is_exhausted
        assert [c.finish_reason for c in result.candidates] == ["stop"] * 3 + ["abort"]
        assert result.answer == found[0].data["answer"]
        assert not await llm.abort("four")
        # Before anything has been generated, and in the middle of every kind of run.
        for spec in ("single", "vote:40", "beam:4x2", "mcts:40", "rounds:9", "probe"):
            for wait in (False, True):
                stream = await llm.solve(
                    PROMPTS[0], spec, answers=NUMBERS, params=ENDLESS, request_id="x"
                ).start()
                while wait and not llm._thread.engine.counters.decode_tokens:
                    await asyncio.sleep(0.01)
                assert await llm.abort("x")
                result = await stream.result()
                assert result.is_exhausted
                assert result.candidate.finish_reason == "abort"

    run(body)


@dataclass(frozen=True)
class LastIsEndless:
    def run(self, task: Task) -> Run[Result]:
        runs = [Sample(1).run(task.part(i)) for i in range(3)]
        endless = task.params
        endless = replace(endless, ignore_eos=True, max_tokens=3000)
        results = yield from task.gather([*runs, Single(endless).run(task.part(3))])
        chosen = yield from Majority().choose(task, [r.candidate for r in results])
        return chosen


@pytest.mark.parametrize(
    "spec", ["single", "vote:3", "adaptive:40", "beam:4x2", "mcts:40", "turns"]
)
def test_ending_the_thinking_makes_all_branches_answer(spec: str) -> None:
    """The model is kept thinking for ever, so that nothing else could end it."""

    async def body(llm: AsyncLLM) -> None:
        params = replace(PARAMS, policy=lambda: ForceContinuation(1000))
        stream = await llm.solve(
            PROMPTS[0], spec, answers=NUMBERS, params=params, request_id="x"
        ).start()
        while llm._thread.engine.counters.decode_tokens < 40:
            await asyncio.sleep(0.01)
        assert await llm.end_thinking("x")
        result = await stream.result()
        assert not result.is_exhausted
        assert all(c.finish_reason == "stop" for c in result.candidates)
        assert all("</think>" in c.text for c in result.candidates)
        assert not await llm.end_thinking("x")

    run(body)
