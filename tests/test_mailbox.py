"""Merging of unread deltas: nothing lost, nothing reordered within a sample, the output last."""

import asyncio
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejet.mailbox import Mailbox, merge_deltas
from moejet.request import RequestOutput, StreamDelta, Timings

OUTPUT = RequestOutput("r", None, (1,), (), Timings(1, 1, 0.0, 0.0, 0.0))


def _delta(index: int, number: int, *, thinks: bool) -> StreamDelta:
    text = f"<{number}>"
    reasoning, content = (text, "") if thinks else ("", text)
    return StreamDelta("r", index, text, reasoning, content, (number,))


def _drain(box: Mailbox) -> list[StreamDelta]:
    async def read() -> list[StreamDelta]:
        deltas = []
        while (delta := await box.get()) is not None:
            deltas.append(delta)
        return deltas

    return asyncio.run(read())


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=300)
)
def test_any_reading_pattern_gives_everything_in_order(steps):
    """steps: (sample, whether it thinks, whether the consumer reads afterwards)"""
    box, sent, got = Mailbox(), [], []

    async def run() -> None:
        for number, (index, thinks, reads) in enumerate(steps):
            sent.append(_delta(index, number, thinks=thinks))
            if number == len(steps) - 1:
                sent[-1] = replace(sent[-1], finish_reason="stop", output=OUTPUT)
            box.put(sent[-1])
            if reads:
                got.append(await box.get())
        box.end()
        while (delta := await box.get()) is not None:
            got.append(delta)

    asyncio.run(run())
    for index in range(4):
        mine = [d for d in sent if d.index == index]
        theirs = [d for d in got if d.index == index]
        for name in ("text", "reasoning", "content"):
            assert "".join(getattr(d, name) for d in theirs) == "".join(
                getattr(d, name) for d in mine
            )
        assert [t for d in theirs for t in d.token_ids] == [t for d in mine for t in d.token_ids]
    assert all(not (d.reasoning and d.content) for d in got)
    assert got[-1].output is OUTPUT
    assert all(d.output is None for d in got[:-1])


def test_unread_deltas_do_not_pile_up():
    box = Mailbox()
    for number in range(5000):
        box.put(_delta(number % 2, number, thinks=number < 1000))
    assert box.num_unread == 4  # two samples, thinking and answer
    held = sum(len(run.deltas) for run in box._runs)
    assert held <= 4 * 64
    box.end()
    deltas = _drain(box)
    assert sum(len(d.token_ids) for d in deltas) == 5000
    assert "".join(d.text for d in deltas if d.index == 0) == "".join(
        f"<{n}>" for n in range(0, 5000, 2)
    )


def test_merging_one_returns_it():
    delta = _delta(0, 1, thinks=True)
    assert merge_deltas([delta]) is delta


def test_an_error_comes_after_what_was_sent_before_it():
    box = Mailbox()
    box.put(_delta(0, 1, thinks=True))
    box.end(KeyError("gone"))
    box.end()  # the first end counts

    async def read() -> None:
        assert (await box.get()).token_ids == (1,)
        for _ in range(2):
            with pytest.raises(KeyError, match="gone"):
                await box.get()

    asyncio.run(read())


def test_a_second_reader_is_refused_and_a_timeout_keeps_the_stream():
    box = Mailbox()

    async def read() -> None:
        first = asyncio.ensure_future(box.get())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await box.get()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        with pytest.raises(TimeoutError, match=r"0\.01 s"):
            await box.get(0.01)
        loop = asyncio.get_running_loop()

        def send() -> None:
            waiter = box.put(_delta(0, 7, thinks=False))
            loop.call_soon_threadsafe(waiter.set_result, None)

        threading.Timer(0.05, send).start()
        assert (await box.get(10.0)).token_ids == (7,)

    asyncio.run(read())
