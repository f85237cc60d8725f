"""Selectors, stop rules, rounds and DeepConf, on made-up candidates and on the tiny reasoner."""

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moejet import LLM, SamplingParams
from moejet.policy import ForceContinuation
from moejet.reasoning.deepconf import LOWEST, STOPPED, ConfidenceWindow, DeepConf
from moejet.reasoning.result import Candidate, Result, ScoredStep
from moejet.reasoning.rounds import CheckedOnce, VerifyRounds
from moejet.reasoning.sample import Sample
from moejet.reasoning.scorers import (
    Check,
    Confidence,
    RewardModel,
    StepHead,
    Verifier,
    aggregate,
    next_token_shares,
)
from moejet.reasoning.select import (
    Best,
    Borda,
    Majority,
    MinimumBayesRisk,
    Select,
    Shortest,
    Weighted,
    token_f1,
)
from moejet.reasoning.single import Single
from moejet.reasoning.solver import solve
from moejet.reasoning.stopping import BetaStop, Decided, Unanimous, beta_confidence
from moejet.reasoning.task import Run, Task
from moejet.statistics import TokenScores
from moejet.step_head import read_step_head
from moejet.testing.arithmetic import check_steps, held_out_problems
from moejet.testing.number_answers import NumberAnswers

NUMBERS = NumberAnswers()
PROMPT = [{"role": "user", "content": "Begin with 12, times 6, minus 30, plus 111."}]
HOT = SamplingParams(temperature=1.6)


@dataclass(frozen=True)
class Given:
    """A scorer that knows its scores."""

    scores: tuple[float, ...]

    def score(self, task: Task, candidates: Sequence[Candidate]) -> Run[list[float]]:
        return list(self.scores[: len(candidates)])
        yield


@dataclass(frozen=True)
class Fixed:
    """A strategy that selects among given candidates."""

    candidates: tuple[Candidate, ...]
    select: Select

    def run(self, task: Task) -> Run[Result]:
        result = yield from self.select.choose(task, self.candidates)
        return result


def candidate(answer: str | None, logprob: float = -1.0, num_tokens: int = 10) -> Candidate:
    return Candidate(
        text=f"so {answer}",
        reasoning=None,
        content=f"so {answer}",
        answer=answer,
        num_tokens=num_tokens,
        logprob=logprob,
        mean=TokenScores(logprob=logprob),
    )


def choose(llm: LLM, candidates: Sequence[Candidate], select: Select) -> Result:
    return solve(llm, PROMPT, Fixed(tuple(candidates), select), answers=NUMBERS)


A, B, C = (candidate(a, -0.1 * i) for i, a in enumerate("123"))
NONE = candidate(None)


@pytest.mark.parametrize(
    ("candidates", "expected", "confidence"),
    [
        ([A, B, B], "2", 2 / 3),
        ([B, A], "1", 1 / 2),  # a tie goes to the likelier, whatever the order
        ([A, B], "1", 1 / 2),
        ([NONE, NONE, C], "3", 1.0),  # no answer is no vote
        ([NONE], None, 0.0),
        (
            [candidate("1", -5), candidate("1", -5), candidate("2", -1), candidate("2", -1)],
            "2",
            0.5,
        ),
    ],
)
def test_majority(
    llm: LLM, candidates: list[Candidate], expected: str | None, confidence: float
) -> None:
    result = choose(llm, candidates, Majority())
    assert result.answer == expected
    assert result.confidence == pytest.approx(confidence)


def test_weights_of_one_are_the_majority_and_scores_turn_it(llm: LLM) -> None:
    candidates = [A, A, B, C, NONE]
    plain = choose(llm, candidates, Majority())
    for select in (Weighted(Given((1.0,) * 5)), Borda(Given((0.3, 0.1, 0.9, 0.5, 0.2)), p=0.0)):
        result = choose(llm, candidates, select)
        assert (result.answer, result.confidence) == (plain.answer, plain.confidence)
    assert choose(llm, candidates, Weighted(Given((0.1, 0.1, 0.9, 0.5, 5.0)))).answer == "2"
    # By hand: ranks of 0.3, 0.1, 0.9, 0.5, 0.2 give 3, 1, 5, 4, 2 points, at p=1.
    borda = choose(llm, candidates, Borda(Given((0.3, 0.1, 0.9, 0.5, 0.2)), p=1.0))
    assert borda.details["votes"] == {"2": 5.0, "1": 4.0, "3": 4.0}
    steep = choose(llm, candidates, Borda(Given((0.3, 0.1, 0.4, 0.5, 0.2)), p=50.0))
    assert steep.answer == "3"
    # Negative scores do not vote; by softmax they do.
    negative = Given((-1.0, -1.0, -0.5, -3.0, -9.0))
    assert choose(llm, candidates, Weighted(negative, temperature=0.1)).answer == "2"
    with pytest.raises(ValueError, match="finite"):
        choose(llm, candidates, Best(Given((math.nan,) * 5)))
    with pytest.raises(ValueError, match="p=-1"):
        Borda(Given(()), p=-1)


def test_best_of_n_with_a_perfect_scorer_is_pass_at_n(llm: LLM) -> None:
    candidates = [A, B, C, NONE, A]
    for right in "123":
        perfect = Check(lambda c, right=right: c.answer == right)  # type: ignore[misc]
        assert choose(llm, candidates, Best(perfect)).answer == right
    assert choose(llm, [NONE, A], Best(Given((9.0, 0.0)))).answer == "1"
    assert choose(llm, [NONE], Best(Given((9.0,)))).answer is None


def test_among_nearly_the_best_agreement_decides(llm: LLM) -> None:
    candidates, scores = [A, B, A, B, C, NONE], Given((0.90, 0.97, 0.95, 0.10, 0.96, 0.99))
    assert choose(llm, candidates, Best(scores)).answer == "2"
    result = choose(llm, candidates, Best(scores, margin=0.1))  # 0.90 is within it, 0.10 is not
    assert (result.answer, result.candidate.scores["score"]) == ("1", 0.95)
    assert choose(llm, candidates, Best(scores, margin=0.001)).answer == "2"
    assert choose(llm, [NONE, NONE], Best(Given((0.2, 0.1)), margin=1)).answer is None
    with pytest.raises(ValueError, match=r"margin=-0\.5 must be a number of at least 0"):
        Best(scores, margin=-0.5)


def test_bayes_risk(llm: LLM) -> None:
    candidates = [A, B, B, C]
    assert choose(llm, candidates, MinimumBayesRisk()).answer == "2"
    texts = ["a b c d", "a b c", "x y", "a b z"]
    made = [replace(A, content=text, text=text) for text in texts]
    result = choose(llm, made, MinimumBayesRisk(token_f1))
    means = [
        sum(token_f1(a, b) for j, b in enumerate(texts) if j != i) / 3 for i, a in enumerate(texts)
    ]
    assert result.content == texts[int(np.argmax(means))]
    assert result.confidence == pytest.approx(max(means))
    assert token_f1("a b", "b c d") == pytest.approx(2 / 5)
    assert choose(llm, made[:1], MinimumBayesRisk(token_f1)).content == texts[0]


def test_shortest_of_those_that_agree(llm: LLM) -> None:
    long, short = candidate("2", num_tokens=50), candidate("2", num_tokens=20)
    wrong = candidate("7", num_tokens=1)
    result = choose(llm, [long, wrong, short], Shortest())
    assert result.candidate.num_tokens == 20
    assert choose(llm, [NONE], Shortest()).answer is None


def test_the_beta_rule_is_the_integral_of_the_posterior() -> None:
    p = np.linspace(0.5, 1.0, 200_001)
    for first, second in [(0, 0), (1, 0), (4, 0), (3, 1), (7, 2), (20, 11), (5, 5)]:
        density = p**first * (1 - p) ** second
        norm = math.factorial(first) * math.factorial(second) / math.factorial(first + second + 1)
        assert beta_confidence(first, second) == pytest.approx(
            np.trapezoid(density, p) / norm, abs=1e-6
        )
    stop = BetaStop(0.95)
    counts = [stop.is_enough([A] * n, NUMBERS) for n in range(1, 7)]
    assert counts == [False, False, False, True, True, True]  # four that are equal are enough
    assert not stop.is_enough([A, A, A, A, B], NUMBERS)
    assert not stop.is_enough([NONE] * 10, NUMBERS)
    assert not Unanimous(3).is_enough([A, A, A, B], NUMBERS)
    assert Unanimous(3).is_enough([A, A, NONE, A], NUMBERS)
    assert not Decided(6).is_enough([A, A, B], NUMBERS)
    assert Decided(6).is_enough([A, A, A, B], NUMBERS) is False
    assert Decided(6).is_enough([A, A, A, A], NUMBERS)


def test_adaptive_stopping_saves_tokens_and_agrees(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0)
    full = adaptive = agreed = 0
    for seed, (_, text) in enumerate(held_out_problems(5, seed=5)):
        prompt = [{"role": "user", "content": text}]
        every = solve(llm, prompt, Sample(16), params=params, seed=seed, answers=NUMBERS)
        some = solve(
            llm,
            prompt,
            Sample(16, stop=BetaStop(), wave=4),
            params=params,
            seed=seed,
            answers=NUMBERS,
        )
        full += every.usage.generated_tokens
        adaptive += some.usage.generated_tokens
        agreed += every.answer == some.answer
    assert adaptive < 0.6 * full
    assert agreed >= 4


def test_aggregates() -> None:
    scores = [0.5, 0.25, 0.75]
    assert [aggregate(scores, how) for how in ("last", "min", "mean", "product")] == [
        0.75,
        0.25,
        0.5,
        0.09375,
    ]
    assert aggregate([], "min") == 0.0


def test_confidence_reads_the_statistics(llm: LLM) -> None:
    result = solve(
        llm, PROMPT, Sample(4, select=Best(Confidence("entropy"))), params=HOT, answers=NUMBERS
    )
    able = [c for c in result.candidates if c.answer is not None] or result.candidates
    assert result.candidate.mean.entropy == min(c.mean.entropy for c in able)


def test_the_step_head_knows_wrong_lines(llm: LLM) -> None:
    """After a check line of the model's own samples its score tells whether the step is right."""
    right: list[float] = []
    wrong: list[float] = []
    for seed, (problem, text) in enumerate(held_out_problems(12, seed=1, min_steps=7)):
        result = solve(
            llm,
            [{"role": "user", "content": text}],
            Sample(5),
            params=SamplingParams(
                temperature=1.3, policy=lambda: ForceContinuation(1, greedy=True)
            ),
            seed=seed,
            answers=NUMBERS,
        )
        for c in result.candidates:
            lines = (c.reasoning or "").split("\n")
            scored = {step.text: step.score for step in c.steps}
            is_right: dict[
                str, bool
            ] = {}  # of a step; a check line is about the step that it checks
            for check in check_steps(c.reasoning or "", problem):
                if check.kind == "step":
                    is_right[check.label] = check.correct
                elif (score := scored.get(lines[check.line])) is not None:
                    (right if is_right.get(check.label) else wrong).append(score)
    assert len(wrong) >= 8, "too easy to show anything"
    assert len(right) > len(wrong)
    pairs = np.array(right)[:, None] - np.array(wrong)[None]
    auc = float((pairs > 0).mean() + 0.5 * (pairs == 0).mean())
    assert auc > 0.75
    product, pattern = StepHead("product"), r"[A-J]:"
    steps = (
        ScoredStep("Plan: 1", 0.1),
        ScoredStep("A: 1", 0.2),
        ScoredStep("B: 1", 0.5),
        ScoredStep("A: 2", 0.9),
    )
    assert product.of_steps(steps, pattern) == pytest.approx(0.45)
    assert StepHead("last").of_steps(steps, pattern) == 0.9
    assert StepHead("min").of_steps(steps, None) == 0.1


@dataclass(frozen=True)
class ScoreTwice:
    """The head of a branch line by line, and of the same tokens decoded in one go."""

    def run(self, task: Task) -> Run[Result]:
        a, b = yield from task.open(2)
        greedy = replace(task.params, temperature=0.0)
        scores = []
        while not a.is_finished and a.is_thinking:
            yield from task.advance([a], until="\n", max_tokens=60, params=greedy)
            found = yield from StepHead("last", pattern=".*").score_steps(task, [a])
            scores += found
        yield from task.advance([b], params=greedy)
        whole = task.candidate(b)
        assert [step.score for step in whole.steps] == pytest.approx(
            scores[: len(whole.steps)], abs=1e-3
        )
        return Result(whole, (whole,))


def test_the_step_head_sees_the_same_however_the_branch_advanced(llm: LLM) -> None:
    result = solve(llm, PROMPT, ScoreTwice(), answers=NUMBERS)
    assert len(result.candidate.steps) >= 3


@dataclass(frozen=True)
class Shares:
    def run(self, task: Task) -> Run[Result]:
        prompts = ["Start with 17", "Start with 1", "Take 5"]
        shares = yield from next_token_shares(task, task.llm, prompts, "0", "1")
        found = yield from Verifier(yes="0", no="1").score(task, [A, B])
        reward = RewardModel(task.llm, good="0", bad="1", separator=" ok")
        rewards = yield from reward.score(task, [replace(A, text="1 + 1\n2 + 2")])
        every = yield from replace(reward, how="min").score(
            task, [replace(A, text="1 + 1\n2 + 2"), replace(A, text="")]
        )
        details = {"shares": shares, "verifier": found, "reward": rewards, "min": every}
        return Result(A, (A,), details=details)


def test_another_model_scores_by_its_next_token(llm: LLM) -> None:
    result = solve(llm, PROMPT, Shares(), answers=NUMBERS)
    prompts = ["Start with 17", "Start with 1", "Take 5"]
    zero, one = (llm.tokenizer.encode(d, add_special_tokens=False)[0] for d in "01")
    expected = []
    for prompt in prompts:
        ids = llm.tokenizer.encode(prompt)
        scores = [llm.score([*ids, token])[-1] for token in (zero, one)]
        expected.append(1 / (1 + math.exp(scores[1] - scores[0])))
    assert result.details["shares"] == pytest.approx(expected, abs=1e-3)
    assert len(result.details["verifier"]) == 2
    assert result.details["min"][0] <= result.details["reward"][0] + 1e-6
    assert result.details["min"][1] == 0.0
    assert result.usage.model_evaluations == 3 + 2 + 1 + 2
    assert not llm.engine.scheduler.held


def test_rounds_go_on_until_they_agree(llm: LLM) -> None:
    easy = solve(
        llm, PROMPT, VerifyRounds(), params=SamplingParams(temperature=0.0), answers=NUMBERS
    )
    assert len(easy.candidates) == 2
    assert easy.confidence == 1.0
    hard = solve(llm, PROMPT, VerifyRounds(most=6), params=HOT, seed=2, answers=NUMBERS)
    answers = [c.answer for c in hard.candidates]
    if len(answers) < 6:
        assert answers[-1] == answers[-2] == hard.answer
        assert all(a != b for a, b in pairwise(answers[:-1]))
    with pytest.raises(ValueError, match="least=3"):
        VerifyRounds(least=3, most=2)


def test_a_check_can_be_forced(llm: LLM) -> None:
    plain = solve(llm, PROMPT, Single(), params=SamplingParams(temperature=0.0), answers=NUMBERS)
    checked = solve(
        llm, PROMPT, CheckedOnce(2), params=SamplingParams(temperature=0.0), answers=NUMBERS
    )
    assert checked.text.count("Wait") == 2 + plain.text.count("Wait")


def test_the_confidence_window_is_a_sliding_mean(llm: LLM) -> None:
    class State:
        last = TokenScores()

    values = [3.0, 1.0, 5.0, 2.0, 0.0, 4.0, 4.0]
    window = ConfidenceWindow(3)
    for value in values:
        State.last = TokenScores(confidence=value)
        window.on_token(State(), 0)  # type: ignore[arg-type]
    groups = [sum(values[i : i + 3]) / 3 for i in range(len(values) - 2)]
    assert window.lowest == pytest.approx(min(groups))
    assert window.tail == pytest.approx(groups[-1])


def test_deepconf_stops_what_falls_below_the_bar(llm: LLM) -> None:
    online = DeepConf(warmup=8, total=24, keep=0.5, window=16, wave=8, stop=None)
    result = solve(llm, PROMPT, online, params=HOT, answers=NUMBERS, seed=1)
    bar = result.details["bar"]
    assert len(result.candidates) == 24
    warm = [c.scores[LOWEST] for c in result.candidates[:8]]
    assert bar == pytest.approx(float(np.median(warm)))
    stopped = [c for c in result.candidates if c.stop_reason == STOPPED]
    assert stopped
    assert all(c.scores[LOWEST] < bar for c in stopped)
    assert result.details["num_voters"] <= 24 - len(stopped)
    offline = replace(online, mode="offline", total=16)
    full = solve(llm, PROMPT, offline, params=HOT, answers=NUMBERS, seed=1)
    assert len(full.candidates) == 16
    assert not [c for c in full.candidates if c.stop_reason == STOPPED]
    lowest = [c.scores[LOWEST] for c in full.candidates]
    assert full.details["bar"] == pytest.approx(float(np.median(lowest)))
    assert full.details["num_voters"] == sum(x >= full.details["bar"] for x in lowest) < 16
    early = replace(online, stop=BetaStop())
    cold = SamplingParams(temperature=0.0)
    assert len(solve(llm, PROMPT, early, params=cold, answers=NUMBERS).candidates) == 8
    for options in ({"mode": "both"}, {"keep": 0.0}, {"total": 3}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            DeepConf(**options)  # type: ignore[arg-type]


class Slow(NumberAnswers):
    """Compares modulo 10, and notes on which thread."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.num_calls = 0

    def group(self, answers: Sequence[str]) -> list[int]:
        self.threads.add(threading.current_thread().name)
        self.num_calls += 1
        last = [answer[-1] for answer in answers]
        return [last.index(digit) for digit in last]


def test_answers_are_compared_in_the_background_and_once(llm: LLM) -> None:
    slow = Slow()
    result = solve(llm, PROMPT, Sample(12, stop=BetaStop(0.99), wave=3), params=HOT, answers=slow)
    assert all(name.startswith("moejet-strategy") for name in slow.threads)
    different = {c.answer for c in result.candidates} - {None}
    assert slow.num_calls <= 2 * len(different)
    ends = {str(answer)[-1] for answer in different}
    assert len(result.details["votes"]) == len(ends)


def test_a_model_says_which_lines_are_steps(llm: LLM, tmp_path: Path) -> None:
    """By its config.json; without a word there all lines are. The tiny reasoner's calculate a step, or check it."""
    head = llm.engine.step_head
    assert head is not None
    assert head.pattern == "[A-J](?=[:?])"
    weights = {"step_head.weight": torch.ones(1, 8), "step_head.bias": torch.zeros(1)}
    save_file(weights, tmp_path / "step_head.safetensors")
    for given, found in ((None, None), ("Step \\d+", "Step \\d+")):
        (tmp_path / "config.json").write_text(json.dumps({"step_head_pattern": given}))
        read = read_step_head(tmp_path, 8)
        assert read is not None
        assert read.pattern == found
    for bad in ("(", 7):
        (tmp_path / "config.json").write_text(json.dumps({"step_head_pattern": bad}))
        with pytest.raises(ValueError, match=r"step_head_pattern=.*config\.json must be a regular"):
            read_step_head(tmp_path, 8)
    result = solve(
        llm, PROMPT, Sample(2, select=Best(StepHead())), answers=NUMBERS, params=SamplingParams()
    )
    steps = [s for s in result.candidate.steps if s.text[1] in ":?" and s.text[0] in "ABCDEFGHIJ"]
    latest = {step.text[0]: step.score for step in steps}
    assert result.candidate.scores["score"] == pytest.approx(math.prod(latest.values()))
