"""What waits before an asynchronous engine: what is refused, limits, priorities, and what closing does with it."""

import asyncio
import threading
import time

import pytest

from moejet import (
    AsyncLLM,
    EngineClosedError,
    QueueFullError,
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


def test_wrong_prompts_are_refused_before_anything_is_queued(make):
    llm = make()

    async def refused(call, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            await call()

    async def main() -> None:
        await refused(lambda: llm.complete(""), "empty")
        await refused(lambda: llm.complete([]), "empty")
        await refused(lambda: llm.complete([1, "a"]), "'a'")
        await refused(lambda: llm.complete(7), "must be text")
        await refused(lambda: llm.complete([5] * 500), "max_context=128")
        await refused(lambda: llm.complete([99999]), "99999")
        await refused(lambda: llm.complete("a", {"temperature": 0}), "SamplingParams")
        await refused(lambda: llm.complete("a", SHORT, priority="high"), "priority='high'")
        await refused(lambda: llm.complete("a", SHORT, request_id=""), "request_id=''")
        await refused(lambda: llm.complete("a", SHORT, request_id="branch-3"), "branch-3")
        await refused(lambda: llm.chat([]).result(), "messages is empty")
        await refused(lambda: llm.chat([{"role": "user"}]).start(), "content is missing")
        stream = llm.generate("")
        await refused(stream.start, "empty")
        await refused(stream.start, "closed")

    asyncio.run(main())
    assert llm.counters()["accepted_requests"] == 0
    assert_nothing_leaked(llm)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_queued_requests": 0}, "max_queued_requests=0"),
        ({"max_queued_tokens": True}, "max_queued_tokens=True"),
        ({"step_timeout_s": -1}, "step_timeout_s=-1"),
        ({"step_timeout_s": float("nan")}, "step_timeout_s=nan"),
        ({"max_contxt": 1}, "did you mean 'max_context'"),
    ],
)
def test_wrong_options(path, options, words):
    with pytest.raises(ValueError, match=words):
        AsyncLLM(path, **options)


def test_the_queue_is_limited_by_requests(make):
    llm = make(max_num_requests=2, max_queued_requests=3)

    async def main() -> None:
        gate = Gate(llm)
        # Two can start at once and three may wait: all five are welcome together.
        accepted = [asyncio.ensure_future(llm.complete(p, SHORT)) for p in PROMPTS[:5]]
        await until(lambda: llm.counters()["accepted_requests"] == 5)
        await until(gate.is_inside.is_set)
        late = [asyncio.ensure_future(llm.complete(p, SHORT)) for p in PROMPTS[5:15]]
        answers = await asyncio.gather(*late, return_exceptions=True)
        refused = [a for a in answers if isinstance(a, QueueFullError)]
        assert len(refused) == 10
        assert all(1 <= error.retry_after_s <= 600 for error in refused)
        assert "requests are waiting" in str(refused[0])
        assert llm.counters()["rejected_requests"] == len(refused)
        gate.open()
        assert len(await asyncio.gather(*accepted)) == 5
        await llm.complete("room again", SHORT)

    asyncio.run(main())
    assert_nothing_leaked(llm)


def test_the_queue_is_limited_by_tokens(make):
    llm = make(max_num_requests=1, max_queued_tokens=100)

    async def main() -> None:
        gate = Gate(llm)
        first = asyncio.ensure_future(llm.complete([5] * 90, SHORT))
        await until(gate.is_inside.is_set)
        # Alone in the queue, a prompt may be as long as it likes.
        second = asyncio.ensure_future(llm.complete([6] * 110, SHORT))
        await until(lambda: llm.health()["queued_tokens"] == 110)
        with pytest.raises(QueueFullError, match="110 prompt tokens are waiting") as error:
            await llm.complete([7] * 20, SHORT)
        assert error.value.retry_after_s >= 1
        assert isinstance(error.value, RuntimeError)
        assert llm.health()["queued_requests"] == 1
        gate.open()
        await asyncio.gather(first, second)

    asyncio.run(main())
    assert_nothing_leaked(llm)


def test_priorities_decide_who_starts(make):
    llm = make(max_num_requests=1)
    done = []

    async def ask(name: str, priority: int) -> None:
        await llm.complete(name, SHORT, priority=priority)
        done.append(name)

    async def main() -> None:
        gate = Gate(llm)
        tasks = [asyncio.ensure_future(ask("first", 5))]
        await until(gate.is_inside.is_set)
        for name, priority in (("late", 3), ("soon", 1), ("sooner", -1)):
            tasks.append(asyncio.ensure_future(ask(name, priority)))
            await until(lambda: llm.counters()["accepted_requests"] == len(tasks))
        gate.open()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert done == ["first", "sooner", "soon", "late"]


def test_draining_finishes_what_runs(make, expected):
    llm = make()

    async def main() -> None:
        tasks = [asyncio.ensure_future(tokens_of(llm.generate(p, SHORT))) for p in PROMPTS[:4]]
        await until(lambda: llm.counters()["accepted_requests"] == 4)
        closing = asyncio.ensure_future(llm.close(drain=True))
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError, match="clos"):
            await llm.complete("abc", SHORT)
        await closing
        assert await asyncio.gather(*tasks) == [expected[p] for p in PROMPTS[:4]]
        await llm.close()
        assert llm.health()["state"] == "closed"
        assert not llm.is_healthy
        with pytest.raises(EngineClosedError, match="is closed"):
            await llm.complete("abc", SHORT)
        assert await llm.abort("nobody") is False

    asyncio.run(main())


def test_draining_has_an_end_and_can_be_hastened(make):
    async def main(hasten: bool) -> None:
        llm = make()
        gate = Gate(llm)
        task = asyncio.ensure_future(llm.complete("abc", LONG))
        await until(gate.is_inside.is_set)
        timeout_s = None if hasten else 0.05
        closing = asyncio.ensure_future(llm.close(drain=True, timeout_s=timeout_s))
        await asyncio.sleep(0.1)
        assert not closing.done()
        assert llm.health()["state"] == ("draining" if hasten else "closed")
        others = [asyncio.ensure_future(llm.close(drain=False))] if hasten else []
        await asyncio.sleep(0.05)
        gate.open()
        await asyncio.gather(closing, *others)
        output = (await task).outputs[0]
        assert output.finish_reason == "abort"
        assert len(output.token_ids) == 1

    asyncio.run(main(False))
    asyncio.run(main(True))


def test_closing_while_streams_run_ends_them(path):
    async def main() -> None:
        async def leave() -> None:
            async with llm:
                for stream in streams:
                    await stream.get()
                raise KeyError  # no draining then

        llm = AsyncLLM(path, **OPTIONS)
        streams = [llm.generate(p, LONG) for p in PROMPTS[:6]]
        with pytest.raises(KeyError):
            await leave()
        assert llm.health()["state"] == "closed"
        for stream in streams:
            last = [d async for d in stream][-1]
            assert last.finish_reason in ("abort", "length")
            assert last.output is not None

    asyncio.run(main())


def test_prompts_are_prepared_off_the_event_loop(make, monkeypatch):
    llm = make()
    names = []
    encode = type(llm.tokenizer).encode

    def slow(self, *args, **kwargs):
        names.append(threading.current_thread().name)
        time.sleep(0.2)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(llm.tokenizer), "encode", slow)

    async def main() -> int:
        task = asyncio.ensure_future(llm.complete("abc", SHORT))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        # Cancelled in the middle, the place in the queue is given back.
        task = asyncio.ensure_future(llm.complete("abc", SHORT))
        await asyncio.sleep(0.05)
        assert llm.health()["queued_requests"] == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert llm.health()["requests"] == 0
        # Aborted in the middle, it ends as soon as the engine has heard of it.
        task = asyncio.ensure_future(llm.complete("abc", LONG, request_id="x"))
        await asyncio.sleep(0.05)
        assert await llm.abort("x")
        assert (await task).outputs[0].finish_reason == "abort"
        return ticks

    assert asyncio.run(main()) > 10
    assert all(name.startswith("moejet-prompt") for name in names)
    assert_nothing_leaked(llm)
