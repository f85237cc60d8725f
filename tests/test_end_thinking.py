"""Answer now: a running request ends its thinking exactly as one whose budget is spent."""

import asyncio
import threading

import pytest

from moejet import LLM, AsyncLLM, SamplingParams
from moejet.policy import ForceContinuation
from moejet.request import RequestOutput, StreamDelta

QUESTION = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=120)


@pytest.fixture(scope="module")
def reasoner():
    with LLM(num_threads=1, deterministic=True) as llm:
        yield llm


def run_and_interrupt(llm: LLM, params: SamplingParams, num_steps: int) -> RequestOutput:
    engine = llm.engine
    text, tokens = llm.read_prompt(QUESTION)
    request_id = engine.add_request(tokens, params, prompt=text)
    for _ in range(num_steps):
        engine.step()
    assert engine.end_thinking(request_id)
    deltas: list[StreamDelta] = []
    while engine.has_work:
        deltas += engine.step()
    assert deltas[-1].output is not None
    return deltas[-1].output


@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
def test_it_equals_a_budget_of_what_has_been_thought(reasoner, num_steps):
    free = reasoner.chat(QUESTION, GREEDY)[0].outputs[0]
    output = run_and_interrupt(reasoner, GREEDY, num_steps).outputs[0]
    # The template leaves the tag open or the model opens it with its first token.
    budgets = [
        SamplingParams(temperature=0.0, max_tokens=120, max_thinking_tokens=n)
        for n in range(max(0, num_steps - 1), num_steps + 1)
    ]
    expected = [reasoner.chat(QUESTION, p)[0].outputs[0] for p in budgets]
    assert output.token_ids in [e.token_ids for e in expected]
    assert output.content
    assert len(output.reasoning or "") < len(free.reasoning)


def test_it_wins_over_other_policies_and_over_a_larger_budget(reasoner):
    for params in (
        SamplingParams(temperature=0.0, max_tokens=120, policy=lambda: ForceContinuation(50)),
        SamplingParams(temperature=0.0, max_tokens=120, max_thinking_tokens=1000),
    ):
        output = run_and_interrupt(reasoner, params, 6).outputs[0]
        assert output.content
        assert "Wait" not in output.text


def test_all_samples_end_and_statistics_stay(reasoner):
    params = SamplingParams(seed=3, n=3, max_tokens=120, statistics=True)
    output = run_and_interrupt(reasoner, params, 5)
    assert all(0 < len(o.reasoning) < 60 for o in output.outputs)
    assert all(o.content and o.statistics.num_tokens for o in output.outputs)


def test_nobody_thinks(reasoner):
    engine = reasoner.engine
    assert not engine.end_thinking("unknown")
    text, tokens = reasoner.read_prompt(QUESTION)
    request_id = engine.add_request(
        tokens, SamplingParams(temperature=0.0, max_thinking_tokens=0), prompt=text
    )
    while not any(delta.content for delta in engine.step()):
        pass
    assert not engine.end_thinking(request_id)
    engine.abort(request_id)
    request_id = engine.add_scoring(tokens)
    assert not engine.end_thinking(request_id)
    engine.abort(request_id)


def test_through_the_asynchronous_engine():
    async def main() -> None:
        async with AsyncLLM(num_threads=1, max_num_requests=1) as llm:
            assert not await llm.end_thinking("nobody")
            forever = SamplingParams(max_tokens=4000, policy=lambda: ForceContinuation(10**6))
            first = await llm.chat(QUESTION, forever, request_id="first").start()
            # The second waits for the only place, and is told before it has begun.
            second = await llm.chat(QUESTION, GREEDY, request_id="second").start()
            assert (await first.get()) is not None
            told = asyncio.create_task(llm.end_thinking("second"))
            assert await llm.end_thinking("first")
            output = await first.result()
            assert output.outputs[0].content
            assert await told
            assert (await second.result()).outputs[0].content
            assert not await llm.end_thinking("first")

    asyncio.run(main())


def test_who_asks_is_answered_when_the_engine_ends_the_request():
    async def main() -> None:
        llm = AsyncLLM(num_threads=1)
        engine = llm._thread.engine
        is_inside, is_open = threading.Event(), threading.Event()
        execute = engine.runner.execute

        def held(batch):
            is_inside.set()
            assert is_open.wait(30)
            return execute(batch)

        engine.runner.execute = held
        stream = await llm.chat(QUESTION, GREEDY, request_id="mine").start()
        await asyncio.to_thread(is_inside.wait, 10)
        asked, cancelled = (asyncio.create_task(llm.end_thinking("mine")) for _ in range(2))
        await asyncio.sleep(0.05)
        assert not asked.done()
        cancelled.cancel()
        stream.close()  # it is asked for first, so it thinks still
        is_open.set()
        assert await asyncio.wait_for(asked, 10)
        # Before the close has reached the engine it thinks still.
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(stream._ticket.ended)), 10)
        asked = asyncio.create_task(llm.end_thinking("mine"))
        assert not await asyncio.wait_for(asked, 10)
        await llm.close(drain=False)

    asyncio.run(main())
