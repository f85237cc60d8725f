"""How long the model thinks: minimum, loops, and exits by asking for the answer on the side."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from moejet import LLM, SamplingParams
from moejet.policy import (
    Action,
    Keep,
    LoopGuard,
    MinimumThinking,
    Replace,
    Stop,
    ThinkingBudget,
    TokenPolicy,
)
from moejet.reasoning.budget import Budget
from moejet.reasoning.early_exit import AtTransitions, Probed
from moejet.reasoning.single import Single
from moejet.reasoning.solver import solve
from moejet.sample_state import SampleState
from moejet.testing.arithmetic import held_out_problems
from moejet.testing.number_answers import NumberAnswers

NUMBERS = NumberAnswers()
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [{"role": "user", "content": "Begin with 12, times 6, minus 30, plus 111."}]
FORCED = replace(GREEDY, policy=lambda: MinimumThinking(200), max_tokens=400)


def test_thinking_has_a_minimum(llm: LLM) -> None:
    plain = llm.chat(PROMPT, GREEDY)[0].outputs[0]
    assert plain.num_reasoning_tokens < 150
    longer = llm.chat(PROMPT, FORCED)[0].outputs[0]
    assert longer.num_reasoning_tokens > 200
    assert longer.text.startswith(plain.text.split("</think>")[0])
    # A minimum below what the model needs changes nothing.
    idle = replace(GREEDY, policy=lambda: MinimumThinking(5))
    assert llm.chat(PROMPT, idle)[0].outputs[0].text == plain.text
    # A cap goes before a minimum if it is asked first.
    both = replace(GREEDY, policy=(lambda: ThinkingBudget(20), lambda: MinimumThinking(100)))
    assert llm.chat(PROMPT, both)[0].outputs[0].num_reasoning_tokens <= 25


@pytest.mark.parametrize("period", [1, 3, 7])
def test_a_loop_ends_the_thinking(llm: LLM, period: int) -> None:
    """The model is made to repeat a block for ever."""
    block = llm.tokenizer.encode("123 + 456", add_special_tokens=False)[:period]

    class Loop(TokenPolicy):
        def on_token(self, state, token_id):  # type: ignore[no-untyped-def]
            if not state.is_thinking or state.closes_thinking(token_id):
                return Keep()
            return Replace((block[state.num_output_tokens % len(block)],))

    class Guarded(Loop):
        def __init__(self) -> None:
            self.guard = LoopGuard(ngram=12, repeats=4)

        def on_token(self, state, token_id):  # type: ignore[no-untyped-def]
            action = super().on_token(state, token_id)
            wanted = action.ids[0] if isinstance(action, Replace) else token_id
            found = self.guard.on_token(state, wanted)
            return action if isinstance(found, Keep) else found

    params = replace(GREEDY, policy=Guarded, max_tokens=300)
    output = llm.chat(PROMPT, params)[0].outputs[0]
    assert output.finish_reason == "stop"
    repeated = max(12, 4 * len(block))
    assert repeated <= output.num_reasoning_tokens + 1 <= repeated + 4
    params = replace(GREEDY, policy=Loop, max_tokens=300)
    assert llm.chat(PROMPT, params)[0].outputs[0].finish_reason == "length"


def test_what_only_looks_alike_is_no_loop() -> None:
    guard = LoopGuard(ngram=8, repeats=3)

    class State:
        is_thinking = True
        token_ids: list[int]

        @property
        def num_output_tokens(self) -> int:
            return len(self.token_ids)

    def first_loop(tokens: list[int]) -> int | None:
        guard = LoopGuard(ngram=8, repeats=3)
        for i, token in enumerate(tokens):
            state = State()
            state.token_ids = tokens[:i]
            if guard._repeats(state, token):  # type: ignore[arg-type]
                return i
        return None

    assert guard.repeats == 3
    assert first_loop([1, 2, 3] * 3) == 8  # nine tokens, three times three
    assert first_loop([1, 2, 3, 4, 5] * 2) is None
    assert first_loop([1] * 8) == 7
    assert first_loop([1] * 7 + [2] * 7) is None
    assert first_loop([1, 2, 1, 3] * 2 + [1, 2, 1, 4] * 2) is None


def test_limits_are_checked() -> None:
    for make, field in (
        (lambda: MinimumThinking(-1), "min_tokens=-1"),
        (lambda: LoopGuard(ngram=0), "ngram=0"),
        (lambda: LoopGuard(repeats=1), "repeats=1"),
        (lambda: LoopGuard(end="never"), "end='never'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=f"{field} must be"):
            make()


def test_probes_leave_the_branch_as_it_was(llm: LLM) -> None:
    """Without an exit the text is that of one pass, at any temperature."""
    for params in (GREEDY, SamplingParams(temperature=1.2)):
        plain = solve(llm, PROMPT, Single(), params=params, answers=NUMBERS, seed=9)
        for strategy in (Probed(every=16, agree=99), AtTransitions(threshold=1.0)):
            result = solve(llm, PROMPT, strategy, params=params, answers=NUMBERS, seed=9)
            assert result.text == plain.text
            assert result.details["early_exit"] is False
        probed = solve(llm, PROMPT, Probed(16, agree=99), params=params, answers=NUMBERS, seed=9)
        assert probed.details["probes"] >= 3
    assert not llm.engine.scheduler.held


class Says(TokenPolicy):
    """Puts a text in place of what the model says, which depends on how long it has thought."""

    def __init__(self, says: Callable[[int], str]):
        self.says = says
        self.num_said = 0

    def on_token(self, state: SampleState, token_id: int) -> Action:
        self.num_said += 1
        if self.num_said > 1:
            return Stop("said", drop=True)
        return Replace(state.encode(self.says(state.num_thinking_tokens)))


@pytest.mark.parametrize(
    ("says", "exit_at"),
    [
        (lambda n: f"The answer is {min(n // 16, 5)}.", 112),  # 5 from 80 tokens on, three times
        (lambda n: "The answer is 7.", 48),
        (lambda n: "The answer is 7, but wait." if n < 60 else "The answer is 7.", 96),
        (lambda n: f"The answer is {n}.", None),
        (lambda n: "I cannot say.", None),
    ],
)
def test_an_answer_that_stays_ends_the_thinking(
    llm: LLM, says: Callable[[int], str], exit_at: int | None
) -> None:
    full = solve(llm, PROMPT, Single(FORCED), params=FORCED, answers=NUMBERS)
    asked = replace(GREEDY, policy=lambda: Says(says))
    strategy = Probed(every=16, agree=3, probe_params=asked)
    early = solve(llm, PROMPT, strategy, params=FORCED, answers=NUMBERS)
    if exit_at is None:
        assert early.details["early_exit"] is False
        assert early.text == full.text
        return
    assert early.details == {"early_exit": True, "probes": exit_at // 16}
    assert early.candidate.stop_reason == "early exit"
    assert early.candidate.num_thinking_tokens <= exit_at + 2
    assert full.text.startswith((early.reasoning or "").rstrip("\n"))
    assert early.answer is not None


def test_doubts_in_a_probe_void_it(llm: LLM) -> None:
    from moejet.reasoning.early_exit import HEDGES, _hedges

    assert _hedges("The answer is 7, but wait", HEDGES)
    assert not _hedges("The button awaits", HEDGES)


def test_turns_are_tried_and_left_if_the_model_is_sure(llm: LLM) -> None:
    hot = SamplingParams(temperature=1.0)
    again = 0
    for seed, (_, text) in enumerate(held_out_problems(8, seed=3)):
        prompt = [{"role": "user", "content": text}]
        plain = solve(llm, prompt, Single(), params=hot, answers=NUMBERS, seed=seed)
        if "Wait" not in plain.text:
            continue
        again += 1
        sure = solve(
            llm, prompt, AtTransitions(threshold=0.0), params=hot, answers=NUMBERS, seed=seed
        )
        assert sure.details == {"early_exit": True, "probes": 1}
        assert "Wait" not in sure.text
        assert plain.text.startswith((sure.reasoning or "").rstrip("\n"))
        assert sure.candidate.num_thinking_tokens < plain.candidate.num_thinking_tokens
        never = solve(
            llm, prompt, AtTransitions(threshold=1.0), params=hot, answers=NUMBERS, seed=seed
        )
        assert never.text == plain.text
        assert never.details["probes"] == plain.text.count("Wait")
    assert again


def test_exits_honour_a_budget(llm: LLM) -> None:
    for strategy in (Probed(every=8, agree=99), AtTransitions(threshold=1.0)):
        result = solve(
            llm, PROMPT, strategy, params=FORCED, answers=NUMBERS, budget=Budget(total_tokens=90)
        )
        assert result.usage.generated_tokens <= 90
        assert result.is_exhausted
