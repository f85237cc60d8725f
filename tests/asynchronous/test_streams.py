"""The asynchronous front gives the tokens and scores of LLM, and engines survive consumers that leave."""

import asyncio
import contextlib
import gc
import random
import threading

import pytest

from moejet import (
    LLM,
    EngineStepError,
    SamplingParams,
)
from moejet.testing.async_engine import (
    LONG,
    OPTIONS,
    PROMPTS,
    SHORT,
    Gate,
    assert_nothing_leaked,
    tokens_of,
    until,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_streams_and_whole_answers_equal_llm(make, expected):
    llm = make()

    async def main() -> None:
        prompt = PROMPTS[3]
        deltas = [d async for d in llm.generate(prompt, SHORT, request_id="mine")]
        assert tuple(t for d in deltas for t in d.token_ids) == expected[prompt]
        assert {d.request_id for d in deltas} == {"mine"}
        output = deltas[-1].output
        assert output.outputs[0].token_ids == expected[prompt]
        assert "".join(d.text for d in deltas) == output.text
        assert output.prompt == prompt
        assert output.timings.queue_s > 0
        ids = llm.tokenizer.encode(prompt)
        whole = await llm.complete(tuple(ids), SHORT)
        assert whole.outputs[0].token_ids == expected[prompt]
        assert whole.prompt_token_ids == tuple(ids)

    asyncio.run(main())
    assert_nothing_leaked(llm)


def test_chat_renders_the_template(make):
    llm = make()
    messages = [{"role": "user", "content": "hi"}]

    async def main():
        stream = await llm.chat(messages, SHORT).start()
        assert stream.num_prompt_tokens > 0
        assert await stream.start() is stream
        return await stream.result()

    output = asyncio.run(main())
    assert output.prompt == llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert output.outputs[0].finish_reason == "length"


def test_32_streams_at_once(make, expected):
    llm = make()

    async def main():
        return await asyncio.gather(*[tokens_of(llm.generate(p, SHORT)) for p in PROMPTS])

    assert asyncio.run(main()) == [expected[p] for p in PROMPTS]
    assert llm.counters()["finished_samples"] == {"length": 32}
    assert llm.counters()["generated_tokens"] == 32 * 12
    assert llm.counters()["queue_time_s"]["count"] == 32
    assert_nothing_leaked(llm)


def test_parallel_samples_are_complete(make):
    llm = make()
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=4, ignore_eos=True)

    async def main():
        deltas = [d async for d in llm.generate("abc", params)]
        return deltas, await llm.complete("abc", params)

    deltas, whole = asyncio.run(main())
    for index, output in enumerate(whole.outputs):
        tokens = tuple(t for d in deltas if d.index == index for t in d.token_ids)
        assert tokens == output.token_ids
    assert len({o.token_ids for o in whole.outputs}) == 4


def test_two_event_loops_in_two_threads(make, expected):
    llm = make()
    results: dict[int, list] = {}

    async def work(number: int) -> None:
        mine = PROMPTS[number::2]
        for _ in range(3):
            streams = [tokens_of(llm.generate(p, SHORT)) for p in mine]
            results[number] = await asyncio.gather(*streams)

    threads = [threading.Thread(target=lambda n=n: asyncio.run(work(n))) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(2):
        assert results[number] == [expected[p] for p in PROMPTS[number::2]]
    assert_nothing_leaked(llm)


def test_cancelling_at_100_random_moments_leaks_nothing(make, expected):
    llm = make(cache_tokens=512)  # small: preemption takes part
    rng = random.Random(1)

    async def consume(number: int) -> None:
        params = SamplingParams(
            temperature=1.0, max_tokens=90, n=1 + number % 3, ignore_eos=True, seed=number
        )
        await tokens_of(llm.generate(PROMPTS[number % 32], params))

    async def one(number: int) -> None:
        await asyncio.sleep(rng.uniform(0, 0.2))
        if number % 4 == 0:  # leaves the loop
            async for _ in llm.generate(PROMPTS[number % 32], LONG):
                if rng.random() < 0.3:
                    break
        elif number % 4 == 1:  # aborted from elsewhere
            name = f"abort-{number}"
            task = asyncio.ensure_future(llm.complete("abc", LONG, request_id=name))
            await asyncio.sleep(rng.uniform(0, 0.05))
            known = await llm.abort(name)
            assert known or task.done()
            output = await task
            assert output.outputs[0].finish_reason in ("abort", "length")
        else:  # the consuming task is cancelled
            task = asyncio.ensure_future(consume(number))
            await asyncio.sleep(rng.expovariate(30))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def main() -> None:
        witness = asyncio.gather(*[tokens_of(llm.generate(p, SHORT)) for p in PROMPTS[:8]])
        await asyncio.gather(*[one(number) for number in range(100)])
        assert await witness == [expected[p] for p in PROMPTS[:8]]
        gc.collect()

    asyncio.run(main())
    assert_nothing_leaked(llm)
    assert llm.counters()["finished_samples"]["abort"] > 20
    assert asyncio.run(llm.complete(PROMPTS[0], SHORT)).outputs[0].token_ids == expected[PROMPTS[0]]


def test_cancelling_takes_effect_before_the_next_step(make):
    llm = make()

    async def main() -> None:
        gate = Gate(llm)
        task = asyncio.ensure_future(llm.complete("abc", LONG))
        await until(gate.is_inside.is_set)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        steps = llm.counters()["steps"]
        gate.open()
        await until(lambda: not llm.health()["requests"])
        assert llm.counters()["steps"] == steps + 1  # the one that ran

    asyncio.run(main())
    assert_nothing_leaked(llm)


def test_aborting_gives_the_stream_a_last_delta(make):
    llm = make()

    async def main() -> None:
        stream = llm.generate("abc", LONG, request_id="x")
        first = await stream.get()
        with pytest.raises(ValueError, match="'x' is already running"):
            await llm.complete("abc", SHORT, request_id="x")
        assert await llm.abort("x") is True
        assert await llm.abort("x") is False
        rest = [d async for d in stream]
        assert rest[-1].finish_reason == "abort"
        output = rest[-1].output.outputs[0]
        assert (first.token_ids + tuple(t for d in rest for t in d.token_ids)) == output.token_ids
        with pytest.raises(ValueError, match="read to its end"):
            await stream.result()
        await stream.aclose()
        assert [d async for d in stream] == []
        await llm.complete("abc", SHORT, request_id="x")

    asyncio.run(main())
    assert_nothing_leaked(llm)


def test_a_timeout_while_reading_leaves_the_request_running(make, expected):
    llm = make()

    async def main() -> None:
        gate = Gate(llm)
        stream = llm.generate(PROMPTS[0], SHORT)
        for _ in range(3):  # what a server does between keep-alives
            with pytest.raises(TimeoutError):
                await stream.get(timeout_s=0.02)
        gate.open()
        assert await tokens_of(stream) == expected[PROMPTS[0]]

    asyncio.run(main())


def test_a_slow_consumer_gets_everything_in_few_pieces(make, expected):
    llm = make()

    async def main() -> None:
        stream = await llm.generate(PROMPTS[0], SHORT).start()
        whole = await llm.complete(PROMPTS[0], LONG)  # meanwhile
        await until(lambda: stream._ticket.ended.done())
        deltas = [d async for d in stream]
        assert len(deltas) <= 2
        assert tuple(t for d in deltas for t in d.token_ids) == expected[PROMPTS[0]]
        assert "".join(d.text for d in deltas) == deltas[-1].output.text
        assert whole.outputs[0].token_ids[:12] == expected[PROMPTS[0]]

    asyncio.run(main())


def test_scores_equal_those_of_llm(path, make):
    llm = make(max_batch_tokens=16, max_num_requests=4)
    llm._thread.engine.scheduler.max_scored_tokens = 9
    texts = [list(range(5, 5 + n)) for n in (2, 15, 16, 17, 90, 128)]

    async def main() -> list[list[float]]:
        streams = asyncio.gather(*[tokens_of(llm.generate(p, SHORT)) for p in PROMPTS[:6]])
        scores = await asyncio.gather(*[llm.score(ids) for ids in texts])
        assert all(len(tokens) == 12 for tokens in await streams)
        with pytest.raises(ValueError, match="at least 2 tokens"):
            await llm.score([1])
        with pytest.raises(ValueError, match="more than max_context=128"):
            await llm.score([1] * 129)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            await llm.score([1, 10**6])
        with pytest.raises(ValueError, match="request_id"):
            await llm.score([1, 2], request_id="")
        return scores

    scores = asyncio.run(main())
    assert_nothing_leaked(llm)
    with LLM(path, **OPTIONS) as alone:
        for ids, score in zip(texts, scores, strict=True):
            assert len(score) == len(ids) - 1
            assert score == pytest.approx(alone.score(ids), abs=1e-5)


def test_a_score_can_be_cancelled_aborted_and_fail(make):
    llm = make(max_batch_tokens=16)
    runner = llm._thread.engine.runner
    execute = runner.execute

    def spoil(batch):
        logits = execute(batch).clone()
        logits[-1] = float("nan")
        return logits

    async def main() -> None:
        gate = Gate(llm)
        cancelled = asyncio.ensure_future(llm.score([5] * 100))
        aborted = asyncio.ensure_future(llm.score([6] * 100, request_id="x"))
        await until(gate.is_inside.is_set)
        await until(lambda: llm.counters()["accepted_requests"] == 2)
        cancelled.cancel()
        ending = asyncio.ensure_future(llm.abort("x"))
        await asyncio.sleep(0)
        gate.open()
        assert await ending
        with pytest.raises(RuntimeError, match="'x' was aborted"):
            await aborted
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        runner.execute = spoil
        with pytest.raises(EngineStepError, match="NaN or infinite logits"):
            await llm.score([5] * 40)
        runner.execute = execute

    asyncio.run(main())
    assert_nothing_leaked(llm)
