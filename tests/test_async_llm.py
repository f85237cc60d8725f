"""The asynchronous front: the same tokens as LLM, and an engine that survives its consumers and its own failures."""

import asyncio
import contextlib
import gc
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from moejet import (
    LLM,
    AsyncLLM,
    EngineClosedError,
    EngineDeadError,
    EngineStepError,
    QueueFullError,
    SamplingParams,
)
from moejet.output import OutputAssembler
from moejet.policy import TokenPolicy
from moejet.presets import PRESETS
from moejet.sampler import sample
from moejet.testing.checkpoints import tiny_checkpoint

OPTIONS = {
    "expert_format": "bf16",
    "dense_format": "fp32",
    "cache_dtype": "fp32",
    "max_context": 128,
    "block_size": 8,
    "deterministic": True,
}
SHORT = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
PROMPTS = [f"prompt number {i} " * (1 + i % 4) for i in range(32)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(path):
    """Greedy answers, by prompt."""
    with LLM(path, **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, SHORT)
        return {p: o.outputs[0].token_ids for p, o in zip(PROMPTS, outputs, strict=True)}


@pytest.fixture
def make(path):
    """AsyncLLMs that are closed after the test."""
    made = []

    def create(**options):
        made.append(AsyncLLM(path, **{**OPTIONS, **options}))
        return made[-1]

    yield create
    for llm in made:
        asyncio.run(llm.close(drain=False))


def assert_nothing_leaked(llm: AsyncLLM) -> None:
    """Waits for the engine to become idle, then looks at its books."""
    engine, deadline = llm._thread.engine, time.monotonic() + 10

    def is_busy() -> bool:  # a failed step has ended its requests while its probe still runs
        health = llm.health()
        return bool(health["requests"] or health["step_running_s"] or engine.has_work)

    while is_busy() and time.monotonic() < deadline:
        time.sleep(0.001)
    health = llm.health()
    assert (health["requests"], health["queued_requests"], health["queued_tokens"]) == (0, 0, 0)
    assert not engine.has_work
    assert not engine._groups
    engine.scheduler.check_integrity()
    assert engine.block_pool.num_free == engine.block_pool.num_blocks


async def _tokens(stream) -> tuple[int, ...]:
    return tuple([t async for delta in stream for t in delta.token_ids])


async def _until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


class Gate:
    """Stands in for a runner's execute: holds each step until it may go on."""

    def __init__(self, llm: AsyncLLM):
        self.runner = llm._thread.engine.runner
        self.execute = self.runner.execute
        self.is_open = threading.Event()
        self.is_inside = threading.Event()
        self.runner.execute = self

    def __call__(self, batch):
        self.is_inside.set()
        assert self.is_open.wait(30)
        return self.execute(batch)

    def open(self) -> None:
        self.is_open.set()
        self.runner.execute = self.execute


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
        return await asyncio.gather(*[_tokens(llm.generate(p, SHORT)) for p in PROMPTS])

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
            streams = [_tokens(llm.generate(p, SHORT)) for p in mine]
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
        await _tokens(llm.generate(PROMPTS[number % 32], params))

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
        witness = asyncio.gather(*[_tokens(llm.generate(p, SHORT)) for p in PROMPTS[:8]])
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
        await _until(gate.is_inside.is_set)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        steps = llm.counters()["steps"]
        gate.open()
        await _until(lambda: not llm.health()["requests"])
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
        assert await _tokens(stream) == expected[PROMPTS[0]]

    asyncio.run(main())


def test_a_slow_consumer_gets_everything_in_few_pieces(make, expected):
    llm = make()

    async def main() -> None:
        stream = await llm.generate(PROMPTS[0], SHORT).start()
        whole = await llm.complete(PROMPTS[0], LONG)  # meanwhile
        await _until(lambda: stream._ticket.ended.done())
        deltas = [d async for d in stream]
        assert len(deltas) <= 2
        assert tuple(t for d in deltas for t in d.token_ids) == expected[PROMPTS[0]]
        assert "".join(d.text for d in deltas) == deltas[-1].output.text
        assert whole.outputs[0].token_ids[:12] == expected[PROMPTS[0]]

    asyncio.run(main())


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
        await _until(lambda: llm.counters()["accepted_requests"] == 5)
        await _until(gate.is_inside.is_set)
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
        await _until(gate.is_inside.is_set)
        # Alone in the queue, a prompt may be as long as it likes.
        second = asyncio.ensure_future(llm.complete([6] * 110, SHORT))
        await _until(lambda: llm.health()["queued_tokens"] == 110)
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
        await _until(gate.is_inside.is_set)
        for name, priority in (("late", 3), ("soon", 1), ("sooner", -1)):
            tasks.append(asyncio.ensure_future(ask(name, priority)))
            await _until(lambda: llm.counters()["accepted_requests"] == len(tasks))
        gate.open()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert done == ["first", "sooner", "soon", "late"]


def test_draining_finishes_what_runs(make, expected):
    llm = make()

    async def main() -> None:
        tasks = [asyncio.ensure_future(_tokens(llm.generate(p, SHORT))) for p in PROMPTS[:4]]
        await _until(lambda: llm.counters()["accepted_requests"] == 4)
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
        await _until(gate.is_inside.is_set)
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
        good = asyncio.ensure_future(_tokens(llm.generate(PROMPTS[0], SHORT)))
        with pytest.raises(EngineStepError, match="NaN or infinite logits") as error:
            await llm.complete([7] * 30, SHORT)
        assert isinstance(error.value.__cause__, FloatingPointError)
        assert await good == expected[PROMPTS[0]]
        assert llm.is_healthy

    asyncio.run(main())
    assert llm.counters()["step_errors"] == 1
    assert llm.counters()["finished_samples"]["error"] == 1
    assert_nothing_leaked(llm)


def test_scores_equal_those_of_llm(path, make):
    llm = make(max_batch_tokens=16, max_num_requests=4)
    llm._thread.engine.scheduler.max_scored_tokens = 9
    texts = [list(range(5, 5 + n)) for n in (2, 15, 16, 17, 90, 128)]

    async def main() -> list[list[float]]:
        streams = asyncio.gather(*[_tokens(llm.generate(p, SHORT)) for p in PROMPTS[:6]])
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
        await _until(gate.is_inside.is_set)
        await _until(lambda: llm.counters()["accepted_requests"] == 2)
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


def test_a_mistake_in_a_policy_reaches_its_owner_only(make, expected):
    llm = make()

    class Mistaken(TokenPolicy):
        seen = 0

        def on_append(self, state, token_id):
            self.seen += 1
            if self.seen == 4:
                raise LookupError("a mistake")

    async def main() -> None:
        good = asyncio.ensure_future(_tokens(llm.generate(PROMPTS[0], SHORT)))
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
            await _until(lambda: llm.counters()["accepted_requests"] == len(tasks))
        await _until(gate.is_inside.is_set)
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
        good = [asyncio.ensure_future(_tokens(llm.generate(p, SHORT))) for p in PROMPTS[:9]]
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
        assert await _tokens(llm.generate(PROMPTS[0], SHORT)) == expected[PROMPTS[0]]
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
        await _until(lambda: llm.health()["state"] == "dead")
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
        await _until(lambda: llm.is_healthy)
        # The same ids again: what the late step computed for their first owners goes nowhere.
        tasks = [_tokens(llm.generate(p, SHORT, request_id=p)) for p in PROMPTS[:3]]
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
        await _until(lambda: reserved and not thread._loop._in_engine)
        assert not reserved[0].ended.done()
        assert reserved[0].mailbox.num_unread == 0
        thread.cancel(reserved[0])
        assert await _tokens(llm.generate(PROMPTS[0], SHORT)) == expected[PROMPTS[0]]

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
        await _until(lambda: llm._thread._state.has_ended)

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


def test_an_idle_engine_sleeps(make):
    llm = make()
    asyncio.run(llm.complete("abc", SHORT))
    assert_nothing_leaked(llm)
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.1


def test_dropping_everything_ends_the_thread(path):
    llm = AsyncLLM(path, **OPTIONS)
    thread = llm._thread
    stream = llm.generate("abc", LONG)
    asyncio.run(stream.get())
    del llm
    assert not thread._state.has_ended  # the stream keeps it
    del stream
    gc.collect()
    deadline = time.monotonic() + 10
    while not thread._state.has_ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert thread._state.has_ended
    assert not thread.engine._groups


def test_an_event_loop_may_vanish_in_the_middle(make, expected):
    llm = make()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # of a task destroyed while pending
    task = loop.create_task(llm.complete("abc", LONG))
    loop.run_until_complete(_until(lambda: llm.counters()["generated_tokens"] > 3))
    loop.close()
    del task, loop
    gc.collect()
    assert_nothing_leaked(llm)
    assert asyncio.run(llm.complete(PROMPTS[4], SHORT)).outputs[0].token_ids == expected[PROMPTS[4]]


def test_a_stream_may_move_to_another_event_loop(make, expected):
    stream = make().generate(PROMPTS[5], SHORT)
    first = asyncio.run(stream.get()).token_ids
    assert first + asyncio.run(_tokens(stream)) == expected[PROMPTS[5]]


def test_taking_over_an_llm(path, expected):
    llm = LLM(path, **OPTIONS)
    stream = llm.stream("abc", LONG)
    next(stream)
    with pytest.raises(ValueError, match="open streams"):
        AsyncLLM.from_llm(llm)
    stream.close()

    async def main() -> None:
        async with AsyncLLM.from_llm(llm) as own:
            with pytest.raises(ValueError, match="closed"):
                llm.generate("abc")
            llm.close()
            output = await own.complete(PROMPTS[2], SHORT)
            assert output.outputs[0].token_ids == expected[PROMPTS[2]]
            assert own.default_sampling() == llm.default_sampling()
            assert own.max_context == 128

    asyncio.run(main())


def test_a_synthetic_model_takes_tokens_only():
    async def main() -> None:
        lite = PRESETS["deepseek-v2-lite"]
        shape = replace(lite, num_hidden_layers=2, vocab_size=500, hidden_size=256)
        async with AsyncLLM.synthetic(shape, max_context=64, max_queued_requests=4) as llm:
            output = await llm.complete([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
            assert len(output.outputs[0].token_ids) == 3
            with pytest.raises(ValueError, match="no tokenizer"):
                await llm.complete("text")
            assert llm.model_config.vocab_size == 500

    asyncio.run(main())


def _run_program(program: str) -> None:
    program = f"import torch\ntorch.set_num_threads(1)\n{program}"
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""


FORK = """
import asyncio, os, sys
from moejet import AsyncLLM, SamplingParams

few = SamplingParams(temperature=0.0, max_tokens=4)
llm = AsyncLLM()
expected = asyncio.run(llm.complete("1", few)).text
stream = llm.generate("1", few)

async def child():
    for call in (lambda: llm.complete("1", few), stream.get, lambda: llm.abort("x")):
        try:
            await call()
        except RuntimeError as error:
            assert "fork" in str(error) and "parent process" in str(error), error
        else:
            raise AssertionError("the forked child used its parent's thread")
    await llm.close()

pid = os.fork()
if pid == 0:
    asyncio.run(child())
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert asyncio.run(llm.complete("1", few)).text == expected
"""
# Leaves a request running and the engine open.
EXIT = """
import asyncio
from moejet import AsyncLLM, SamplingParams

async def main():
    global llm, stream
    llm = AsyncLLM()
    stream = llm.generate("1", SamplingParams(max_tokens=1500, ignore_eos=True))
    await stream.get()

asyncio.run(main())
"""


@pytest.mark.parametrize("program", [FORK, EXIT], ids=["fork", "exit"])
def test_processes(program):
    _run_program(program)
