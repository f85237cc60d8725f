"""Strategies on the embedded tiny reasoner: the driver, budgets, sampling and votes."""

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from moejet import LLM, SamplingParams
from moejet.reasoning import AtTransitions, BetaStop, Probed
from moejet.reasoning.answer_classes import Answers
from moejet.reasoning.budget import Budget
from moejet.reasoning.result import Candidate, Progress, Result
from moejet.reasoning.sample import Sample
from moejet.reasoning.single import Single
from moejet.reasoning.solver import solve, solve_many, stream
from moejet.reasoning.task import Run, Task
from moejet.testing.number_answers import NumberAnswers

NUMBERS = NumberAnswers()

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in (
        "Start with 17, add 25, then multiply by 3.",
        "Take 90, subtract 34, then divide by 7 and add 200.",
        "Begin with 12, times 6, minus 30, plus 111.",
    )
]


def test_one_pass_is_what_chat_says(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0)
    expected = llm.chat(PROMPTS, greedy)
    results = solve_many(llm, PROMPTS, Single(), params=greedy, answers=NUMBERS)
    for output, result in zip(expected, results, strict=True):
        plain = output.outputs[0]
        assert result.content == plain.content
        assert result.reasoning == plain.reasoning
        assert result.candidate.num_tokens == len(plain.token_ids) == result.usage.generated_tokens
        assert result.usage.prompt_tokens == len(output.prompt_token_ids)
        assert result.candidate.num_thinking_tokens == plain.num_reasoning_tokens - 1  # the tag
        assert result.usage.steps > 0
        assert result.usage.expert_loads > 0
    assert results[0].answer == "126"


def test_majority_is_the_count_by_hand(llm: LLM) -> None:
    params = SamplingParams(temperature=1.6)
    result = solve(llm, PROMPTS[2], Sample(12), params=params, answers=NUMBERS, seed=3)
    assert len(result.candidates) == 12
    counts = Counter(c.answer for c in result.candidates if c.answer is not None)
    assert len(counts) > 1, "too easy to show anything"
    assert counts[result.answer] == max(counts.values())
    assert result.confidence == pytest.approx(max(counts.values()) / counts.total())
    again = solve(llm, PROMPTS[2], Sample(12), params=params, answers=NUMBERS, seed=3)
    assert [c.text for c in again.candidates] == [c.text for c in result.candidates]
    # More of the same are the same, and then others: what is compared is paired.
    fewer = solve(llm, PROMPTS[2], Sample(4, wave=2), params=params, answers=NUMBERS, seed=3)
    assert {c.text for c in fewer.candidates} <= {c.text for c in result.candidates}
    assert result.usage.generated_tokens == sum(c.num_tokens for c in result.candidates)
    assert result.usage.branches == 12


def test_candidates_do_not_depend_on_what_else_runs(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0)
    alone = [
        solve(llm, prompt, Sample(3), params=params, answers=NUMBERS, seed=number)
        for number, prompt in enumerate(PROMPTS)
    ]
    together = solve_many(llm, PROMPTS, Sample(3), params=params, answers=NUMBERS)
    for a, b in zip(alone, together, strict=True):
        assert [c.text for c in a.candidates] == [c.text for c in b.candidates]


@dataclass(frozen=True)
class After:
    """Enough after so many."""

    count: int

    def is_enough(self, candidates: Sequence[Candidate], answers: Answers) -> bool:
        return len(candidates) >= self.count


def test_a_stop_rule_ends_the_others_and_frees_their_cache(llm: LLM) -> None:
    free = llm.engine.block_pool.num_free
    result = solve(llm, PROMPTS[0], Sample(16, wave=4, stop=After(5)), answers=NUMBERS, seed=1)
    assert 5 <= len(result.candidates) <= 8
    assert result.usage.branches < 16
    assert result.usage.generated_tokens > sum(c.num_tokens for c in result.candidates)
    assert not llm.engine.has_work
    assert not llm.engine.scheduler.held
    assert llm.engine.block_pool.num_free == free


@pytest.mark.parametrize("total", [1, 100, 333])
@pytest.mark.parametrize("strategy", [Single(), Sample(5), Sample(5, wave=2), Sample(2, Sample(3))])
def test_a_budget_of_tokens_is_never_exceeded(
    llm: LLM, total: int, strategy: Single | Sample
) -> None:
    result = solve(
        llm, PROMPTS[1], strategy, budget=Budget(total_tokens=total), answers=NUMBERS, seed=2
    )
    usage = result.usage
    assert usage.generated_tokens <= total
    free = solve(llm, PROMPTS[1], strategy, answers=NUMBERS, seed=2)
    if free.usage.generated_tokens <= total:
        assert usage.generated_tokens == free.usage.generated_tokens
        assert not result.is_exhausted or usage.generated_tokens == total
    else:
        # What is left over is less than one token for each that could have gone on.
        assert total - usage.generated_tokens < 6
        assert result.is_exhausted


def test_a_budget_cuts_without_changing_what_comes_before(llm: LLM) -> None:
    free = solve(llm, PROMPTS[0], Sample(3), answers=NUMBERS, seed=5)
    cut = solve(llm, PROMPTS[0], Sample(3), answers=NUMBERS, seed=5, budget=Budget(total_tokens=90))
    for a, b in zip(free.candidates, cut.candidates, strict=True):
        assert a.text.startswith(b.text)
        if a.text != b.text:
            assert (b.finish_reason, b.stop_reason) == ("length", "budget")
            assert b.answer is None


def test_thinking_is_limited_and_leaves_room_for_the_answer(llm: LLM) -> None:
    budget = Budget(thinking_tokens=10)
    result = solve(llm, PROMPTS[0], Single(), budget=budget, answers=NUMBERS)
    assert result.candidate.num_thinking_tokens <= 11  # and the line end of the closing text
    assert result.answer is not None
    starved = solve(
        llm, PROMPTS[0], Single(), budget=Budget(total_tokens=40), answers=NUMBERS, seed=0
    )
    assert starved.answer is None
    reserved = solve(
        llm,
        PROMPTS[0],
        Single(),
        budget=Budget(total_tokens=40, answer_reserve=20),
        answers=NUMBERS,
        seed=0,
    )
    assert reserved.answer is not None
    assert reserved.usage.generated_tokens <= 40


@pytest.fixture
def widths(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many branches run after each step."""
    found: list[int] = []
    step = llm.engine.step

    def counted() -> object:
        result = step()
        found.append(len(llm.engine.scheduler.running))
        return result

    monkeypatch.setattr(llm.engine, "step", counted)
    return found


def test_no_more_branches_at_once_than_the_budget_allows(llm: LLM, widths: list[int]) -> None:
    free = solve(llm, PROMPTS[0], Sample(6), answers=NUMBERS, seed=4)
    assert max(widths) == 6
    widths.clear()
    narrow = solve(llm, PROMPTS[0], Sample(6), answers=NUMBERS, seed=4, budget=Budget(branches=2))
    assert max(widths) == 2
    assert [c.text for c in narrow.candidates] == [c.text for c in free.candidates]


def test_time_is_a_budget_too(llm: LLM) -> None:
    params = SamplingParams(ignore_eos=True, max_tokens=100_000)
    start = time.monotonic()
    result = solve(
        llm, PROMPTS[0], Single(), params=params, answers=NUMBERS, budget=Budget(wall_s=0.2)
    )
    assert result.is_exhausted
    assert result.candidate.stop_reason == "wall_s"
    assert time.monotonic() - start >= 0.2


@dataclass(frozen=True)
class Broken:
    """Fails after its first candidate, or when told to in the background."""

    in_background: bool

    def run(self, task: Task) -> Run[Result]:
        result = yield from Single().run(task)
        yield from task.open(3)
        if self.in_background:
            yield from task.background(lambda: 1 // 0)
        raise RuntimeError("this strategy is broken")
        return result


@pytest.mark.parametrize("in_background", [False, True])
def test_what_a_strategy_raises_comes_out_and_nothing_stays(llm: LLM, in_background: bool) -> None:
    error = ZeroDivisionError if in_background else RuntimeError
    for strategy in (Broken(in_background), Sample(3, Broken(in_background))):
        with pytest.raises(error):
            solve_many(llm, PROMPTS, strategy, answers=NUMBERS)
    assert not llm.engine.has_work
    assert not llm.engine.scheduler.held


def test_background_work_does_not_hold_up_others(llm: LLM) -> None:
    others_done = threading.Event()

    @dataclass(frozen=True)
    class Waiting:
        def run(self, task: Task) -> Run[Result]:
            seen = yield from task.background(lambda: others_done.wait(30))
            assert seen
            result = yield from Single().run(task)
            return result

    @dataclass(frozen=True)
    class Either:
        def run(self, task: Task) -> Run[Result]:
            is_first = task.ledger.seed == 0
            result = yield from (Waiting() if is_first else Single()).run(task)
            if not is_first:
                others_done.set()
            return result

    results = solve_many(llm, PROMPTS[:2], Either(), answers=NUMBERS)
    assert all(result.answer for result in results)


def test_progress_comes_before_the_result(llm: LLM) -> None:
    events = list(stream(llm, PROMPTS[0], Sample(3), answers=NUMBERS))
    assert [type(event) for event in events] == [Progress] * 4 + [Result]
    assert [e.kind for e in events if isinstance(e, Progress)] == ["candidate"] * 3 + ["vote"]
    begun = stream(llm, PROMPTS[0], Sample(3), answers=NUMBERS)
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    assert not llm.engine.scheduler.held


def test_a_forced_continuation_equals_the_prompt_sent_again(llm: LLM) -> None:
    """And computes no prompt anew: the counter of prompt tokens does not move."""
    from moejet.policy import ForceContinuation

    greedy = SamplingParams(temperature=0.0)
    plain = llm.chat(PROMPTS[0], greedy)[0]
    forced = SamplingParams(temperature=0.0, policy=lambda: ForceContinuation(1))
    before = llm.counters()
    result = solve(llm, PROMPTS[0], Single(forced), answers=NUMBERS)
    after = llm.counters()
    prefilled = after["prefill_tokens"] - before["prefill_tokens"]
    assert prefilled <= len(plain.prompt_token_ids) + 1  # each branch computes its last one itself
    close = llm.tokenizer.think_tags[1]  # type: ignore[index]
    thought = plain.outputs[0].text.split(close)[0]
    prompt = [*plain.prompt_token_ids, *llm.tokenizer.encode(thought, add_special_tokens=False)]
    prompt += llm.tokenizer.encode("Wait", add_special_tokens=False)
    again = llm.generate(prompt, greedy)[0].outputs[0]
    assert result.text == thought + "Wait" + again.text


def test_wrong_limits_are_named(llm: LLM) -> None:
    for options in (
        {"total_tokens": 0},
        {"branches": True},
        {"wall_s": -1},
        {"thinking_tokens": -1},
        {"answer_reserve": None},
    ):
        [name] = options
        with pytest.raises(ValueError, match=name):
            Budget(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=0"):
        Sample(0)
    with pytest.raises(ValueError, match="wave=0"):
        Sample(wave=0)
    with pytest.raises(ValueError, match="concurrency=0"):
        solve_many(llm, PROMPTS, Single(), concurrency=0)
    with pytest.raises(ValueError, match="has 1 entries for 3"):
        solve_many(llm, PROMPTS, Single(), seeds=[1])


def test_no_two_samples_share_a_seed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """However strategies are nested, and whatever draws first."""
    seeds: list[int] = []
    draw = Task.next_seed

    def noted(task: Task) -> int:
        seeds.append(draw(task))
        return seeds[-1]

    monkeypatch.setattr(Task, "next_seed", noted)
    params = SamplingParams(temperature=1.0, max_tokens=2)
    nested = Sample(4, Sample(3, Sample(2)))
    solve(llm, PROMPTS[0], nested, params=params, answers=NUMBERS, seed=7)
    assert len(set(seeds)) == len(seeds) == 24
    first = set(seeds)
    seeds.clear()
    solve(
        llm, PROMPTS[0], nested, params=params, answers=NUMBERS, seed=7, budget=Budget(branches=1)
    )
    assert set(seeds) == first


def test_nested_samples_keep_to_the_width_of_the_budget(llm: LLM, widths: list[int]) -> None:
    solve(llm, PROMPTS[0], Sample(4, Sample(4)), answers=NUMBERS, budget=Budget(branches=2))
    assert max(widths) == 2


def test_what_is_enough_does_not_depend_on_who_ends_first(llm: LLM) -> None:
    class Jittery(NumberAnswers):
        def group(self, answers: Sequence[str]) -> list[int]:
            time.sleep(random.random() * 0.01)
            return super().group(answers)

    results = {
        tuple(
            c.text
            for c in solve(
                llm,
                PROMPTS[2],
                Sample(12, stop=BetaStop(0.9), wave=4),
                params=SamplingParams(temperature=1.3),
                answers=Jittery(),
                seed=4,
            ).candidates
        )
        for _ in range(5)
    }
    assert len(results) == 1


def test_what_is_released_is_forgotten(llm: LLM) -> None:
    @dataclass(frozen=True)
    class Many:
        def run(self, task: Task) -> Run[Result]:
            for _ in range(20):
                branches = yield from task.open(10)
                task.release(branches)
            assert len(task._opened) == 1
            assert task._root is not None
            assert len(task._root._forks) <= 10
            result = yield from Single().run(task)
            return result

    assert solve(llm, PROMPTS[0], Many(), answers=NUMBERS).answer is not None


def test_pieces_keep_to_the_limit_of_the_whole(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30)
    for strategy in (Single(), Probed(every=8, agree=99), AtTransitions(threshold=1.0)):
        result = solve(llm, PROMPTS[1], strategy, params=params, answers=NUMBERS)
        assert result.candidate.num_tokens == 30
        assert result.candidate.finish_reason == "length"
