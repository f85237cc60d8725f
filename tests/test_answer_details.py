"""What a server tells of an answer: log-probabilities in deltas, thinking tokens, alternatives, progress."""

import asyncio

import pytest

from moejet import AsyncLLM, SamplingParams
from moejet.output import OutputAssembler

QUESTION = "<|bos|><|user|>Start with 17, add 25.<|assistant|><think>\n"


@pytest.fixture(scope="module")
def llm():
    llm = AsyncLLM(max_batch_tokens=16)
    yield llm
    asyncio.run(llm.close(drain=False))


@pytest.mark.parametrize("is_read_late", [False, True])
def test_deltas_carry_the_log_probabilities_of_their_tokens(llm, is_read_late):
    async def main():
        params = SamplingParams(temperature=0.9, seed=3, n=3, logprobs=2, max_tokens=30)
        stream = await llm.generate(QUESTION, params).start()
        while is_read_late and llm.health()["running"] + llm.health()["waiting"]:
            await asyncio.sleep(0.01)
        found, ids, output = [[], [], []], [[], [], []], None
        async for delta in stream:
            assert len(delta.logprobs) == len(delta.token_ids)
            found[delta.index] += delta.logprobs
            ids[delta.index] += delta.token_ids
            output = delta.output or output
        for sample in output.outputs:
            assert tuple(found[sample.index]) == sample.logprobs
            assert tuple(ids[sample.index]) == sample.token_ids
            assert [entry.token_id for entry in sample.logprobs] == ids[sample.index]

    asyncio.run(main())


def test_without_being_asked_for_there_are_none(llm):
    output = asyncio.run(llm.complete(QUESTION, SamplingParams(temperature=0)))
    assert output.outputs[0].logprobs is None

    async def main():
        async for delta in llm.generate(QUESTION, SamplingParams(temperature=0)):
            assert delta.logprobs == ()

    asyncio.run(main())


def test_thinking_tokens_are_counted_up_to_the_closing_tag(llm):
    sample = asyncio.run(llm.complete(QUESTION, SamplingParams(temperature=0))).outputs[0]
    close = llm.tokenizer.token_to_id("</think>")
    assert sample.num_reasoning_tokens == sample.token_ids.index(close) + 1
    cut = asyncio.run(llm.complete(QUESTION, SamplingParams(temperature=0, max_tokens=5)))
    assert cut.outputs[0].num_reasoning_tokens == 5


@pytest.mark.parametrize(
    ("text", "thinking", "counted"),
    [
        ("<think>a b</think>c", False, "<think>a b</think>"),
        ("a b</think>c", True, "a b</think>"),
        ("c <think>a</think>", False, ""),
        ("c", False, ""),
    ],
)
def test_only_thinking_counts_as_thinking(llm, text, thinking, counted):
    tokenizer = llm.tokenizer
    tags = tokenizer.think_tags
    assembler = OutputAssembler(tokenizer, SamplingParams(), think_tags=tags, thinking=thinking)
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        assembler.push(token_id)
    expected = len(tokenizer.encode(counted, add_special_tokens=False))
    assert assembler.num_reasoning_tokens == expected


def test_scores_have_the_alternatives_that_would_have_been_sampled(llm):
    async def main():
        greedy = await llm.complete(
            QUESTION, SamplingParams(temperature=0, logprobs=3, max_tokens=12)
        )
        answer = greedy.outputs[0]
        ids = [*greedy.prompt_token_ids, *answer.token_ids]
        scores, plain = await llm.score_top(ids, 3), await llm.score(ids)
        assert [score.logprob for score in scores] == pytest.approx(plain, abs=1e-5)
        assert [score.token_id for score in scores] == ids[1:]
        tail = scores[-len(answer.token_ids) :]
        for score, entry in zip(tail, answer.logprobs, strict=True):
            assert score.logprob == score.top[0][1]  # exactly: it is the likeliest
            assert [i for i, _ in score.top] == [i for i, _ in entry.top]
            assert score.logprob == pytest.approx(entry.logprob, abs=2e-3)
        assert (await llm.score_top(ids, 0))[0].top == ()
        with pytest.raises(ValueError, match="num_top"):
            await llm.score_top(ids, 21)

    asyncio.run(main())


def test_the_progress_of_a_prompt_can_be_watched(llm):
    async def main():
        assert llm.progress("nobody") is None
        execute = llm._thread.engine.runner.execute
        seen = []

        def watched(batch):
            seen.append(llm.progress("mine"))
            return execute(batch)

        llm._thread.engine.runner.execute = watched
        try:
            await llm.complete([7] * 50, SamplingParams(max_tokens=2), request_id="mine")
        finally:
            llm._thread.engine.runner.execute = execute
        assert seen == [(n, 50, 0) for n in (0, 16, 32, 48, 50)]
        assert llm.progress("mine") is None

    asyncio.run(main())
