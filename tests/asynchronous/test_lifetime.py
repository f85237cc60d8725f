"""Where asynchronous engines live and end: threads, event loops, processes, and what they take over."""

import asyncio
import gc
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from moejet import (
    LLM,
    AsyncLLM,
    SamplingParams,
)
from moejet.presets import PRESETS
from moejet.testing.async_engine import (
    LONG,
    OPTIONS,
    PROMPTS,
    SHORT,
    assert_nothing_leaked,
    tokens_of,
    until,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
    loop.run_until_complete(until(lambda: llm.counters()["generated_tokens"] > 3))
    loop.close()
    del task, loop
    gc.collect()
    assert_nothing_leaked(llm)
    assert asyncio.run(llm.complete(PROMPTS[4], SHORT)).outputs[0].token_ids == expected[PROMPTS[4]]


def test_a_stream_may_move_to_another_event_loop(make, expected):
    stream = make().generate(PROMPTS[5], SHORT)
    first = asyncio.run(stream.get()).token_ids
    assert first + asyncio.run(tokens_of(stream)) == expected[PROMPTS[5]]


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
    program = f"import torch\ntorch.set_num_threads(1)\n{program}"
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
