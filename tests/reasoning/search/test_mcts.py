"""Tree search: UCT by hand, sums over the tree, rStar's actions, and what it finds with a perfect verifier."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from moejet import LLM, SamplingParams
from moejet.branch import Branch
from moejet.reasoning.budget import Budget
from moejet.reasoning.result import Candidate, Node, Result
from moejet.reasoning.search.actions import NextStep, Place, rstar_actions
from moejet.reasoning.search.mcts import MCTS, Scored, VoteShare, marco, rstar, select, uct
from moejet.reasoning.search.steps import Steps
from moejet.reasoning.single import Single
from moejet.reasoning.solver import solve
from moejet.reasoning.task import Run, Task
from moejet.testing import arithmetic
from moejet.testing.arithmetic_oracle import StepOracle
from moejet.testing.number_answers import NumberAnswers
from moejet.testing.script import scripted

PROBLEM, TEXT = arithmetic.held_out_problems(3, seed=5, min_steps=7, max_steps=8)[0]
PROMPT = [{"role": "user", "content": TEXT}]
SHORT = [{"role": "user", "content": "Take 90, subtract 34, then divide by 7."}]
HOT = SamplingParams(temperature=1.2)


def test_uct_by_hand() -> None:
    assert uct(3.0, 4, 16, 2.0) == pytest.approx(0.75 + 2 * math.sqrt(math.log(16) / 4))
    assert uct(3.0, 4, 16, 2.0) == pytest.approx(2.4151, abs=1e-4)
    assert uct(0.0, 0, 5, 2.0) == math.inf
    root = Place(None, 0, visits=10)  # type: ignore[arg-type]
    root.children = [
        Place(None, 1, visits=6, total=5.0),  # type: ignore[arg-type]
        Place(None, 2, visits=4, total=1.0),  # type: ignore[arg-type]
    ]
    # 0.8333 + c * 0.6195 against 0.25 + c * 0.7587: equal at c = 4.19
    rng = random.Random(0)
    assert [select(root, c, rng)[-1].number for c in (0.0, 2.0, 4.1, 4.3)] == [1, 1, 1, 2]
    root.children.append(Place(None, 3))  # type: ignore[arg-type]
    assert select(root, 0.0, rng)[-1].number == 3


@dataclass(frozen=True)
class Contains:
    """Rewards a text."""

    text: str

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        return [float(self.text in branch.text) for branch in branches]
        yield


def _two_ways(llm: LLM) -> SamplingParams:
    """A generator that goes left and right in turn, and says 1 on the left and 2 on the right."""
    turns = itertools.cycle(["left\n", "right\n"])

    def reply(context: str) -> str:
        if context.endswith("?"):
            return next(turns)
        return f"so {1 + ('right' in context)}"

    return scripted(llm, reply)


@pytest.mark.parametrize(("c", "parallel"), [(0.5, 1), (2.0, 1), (0.5, 2)])
def test_visits_of_a_scripted_generator_follow_uct(llm: LLM, c: float, parallel: int) -> None:
    """Of rollouts side by side, the second sees the first as a visit that has brought nothing yet."""
    strategy = MCTS(
        (NextStep(2),), Scored(Contains("left")), 24, c, simulation="none", parallel=parallel
    )
    result = solve(llm, "which way?", strategy, params=_two_ways(llm), answers=NumberAnswers())
    visits, totals = [1, 1], [1.0, 0.0]  # each way once, then by hand
    for parent in range(2, 24, parallel):
        ways = []
        for pending in range(parallel):
            values = [
                total / n + c * math.sqrt(math.log(parent + pending) / n)
                for n, total in zip(visits, totals, strict=True)
            ]
            ways.append(values.index(max(values)))
            visits[ways[-1]] += 1
        totals[0] += ways.count(0)
    found = {node.text: node for node in result.nodes if node.parent == 0}
    assert {text: node.visits for text, node in found.items()} == {
        "left\n": visits[0],
        "right\n": visits[1],
    }
    assert (found["left\n"].score, found["right\n"].score) == (1.0, 0.0)
    assert result.nodes[0].visits == 24
    assert result.nodes[0].score == pytest.approx(totals[0] / 24)
    assert result.answer == "1"


def _check_sums(nodes: Sequence[Node], own: int) -> int:
    """Visits and rewards of places are those of their children, and of `own` simulations that began there."""
    checked = 0
    for node in nodes:
        children = [child for child in nodes if child.parent == node.number]
        if not any(child.visits for child in children):
            continue
        begun = own if node.parent >= 0 else 0
        assert node.visits == begun + sum(child.visits for child in children)
        gained = node.visits * (node.score or 0.0)
        passed = sum(child.visits * (child.score or 0.0) for child in children if child.visits)
        assert passed - 1e-9 <= gained <= passed + begun + 1e-9
        checked += 1
    return checked


def test_sums_are_consistent_on_the_tiny_reasoner(llm: LLM) -> None:
    strategy = MCTS((NextStep(2),), VoteShare(), rollouts=12, c=0.5)
    result = solve(llm, SHORT, strategy, params=HOT, answers=NumberAnswers(), seed=1)
    assert result.nodes[0].visits == 12 == result.details["rollouts"]
    assert _check_sums(result.nodes, own=1) > 2
    assert result.answer is not None
    assert llm.engine.scheduler.held == []


def test_rollouts_side_by_side_use_the_batch(llm: LLM) -> None:
    def run(parallel: int) -> Result:
        strategy = MCTS((NextStep(2),), rollouts=8, parallel=parallel)
        return solve(llm, SHORT, strategy, params=HOT, answers=NumberAnswers(), seed=3)

    alone, first, second = run(1), run(4), run(4)
    one, four = (r.usage.steps / r.usage.generated_tokens for r in (alone, first))
    assert four < 0.6 * one
    assert [c.text for c in first.candidates] == [c.text for c in second.candidates]
    assert first.nodes == second.nodes
    assert first.nodes[0].visits == first.details["rollouts"] == 8
    assert llm.engine.scheduler.held == []


@pytest.mark.parametrize("simulation", ["finish", "none"])
def test_a_perfect_verifier_leads_the_search(llm: LLM, simulation: str) -> None:
    plain = solve(llm, PROMPT, Single(), params=HOT, answers=NumberAnswers(), seed=7)
    assert plain.answer != str(PROBLEM.answer), "too easy to show anything"
    rollouts = 16 if simulation == "finish" else 40
    value = Scored(StepOracle(PROBLEM))
    strategy = MCTS((NextStep(4),), value, rollouts, 0.5, simulation=simulation)  # type: ignore[arg-type]
    result = solve(llm, PROMPT, strategy, params=HOT, answers=NumberAnswers(), seed=7)
    assert result.answer == str(PROBLEM.answer)


def _rstar_script(llm: LLM) -> SamplingParams:
    numbers = itertools.cycle(["7", "7", "9"])

    def reply(context: str) -> str:
        if context.endswith("next? "):
            return "How many apples?\n"
        if context.endswith("asked: "):
            return "apples are counted\n"
        if context.endswith(("find: ", "small steps: ")):
            return f"there are {next(numbers)}\n"
        return f"one more step\nThe answer is {next(numbers)}"

    return scripted(llm, reply)


def test_rstar_uses_its_five_actions_where_they_apply(llm: LLM) -> None:
    strategy = rstar(rollouts=5, depth=2)
    result = solve(llm, "x", strategy, params=_rstar_script(llm), answers=NumberAnswers())
    nodes = result.nodes

    def kind(node: Node) -> str:
        text = node.text
        for name, mark in (
            ("A3", "What should"),
            ("A4", "Let me answer"),
            ("A5", "In other words"),
            ("A2", "The answer"),
        ):
            if mark in text:
                return name
        return "A1"

    first = sorted(kind(node) for node in nodes if node.parent == 0)
    assert first == ["A1", "A2", "A3", "A5"]  # equal steps and questions are one child
    for node in nodes[1:]:
        if kind(node) == "A5":
            assert node.parent == 0
        if kind(node) == "A4":
            assert kind(nodes[node.parent]) == "A3"
        if kind(node) == "A3":
            assert node.text.endswith("This is what I find: there are 7\n")  # 7 of 10, not 9
    assert any(kind(node) == "A4" for node in nodes)
    # 32 ends, of which two thirds say 7: the leaf is worth their share.
    end = next(node for node in nodes if node.parent == 0 and kind(node) == "A2")
    if end.visits:
        assert end.score == pytest.approx(21.5 / 32, abs=0.5 / 32 + 1e-9)
    assert result.answer == "7"
    assert nodes[0].visits == 5
    _check_sums(nodes, own=0)
    assert llm.engine.scheduler.held == []


def test_prompts_of_actions_are_ones_own_to_choose() -> None:
    names = [action.name for action in rstar_actions()]
    assert names == ["step", "finish", "sub-question", "re-answer", "rephrase"]
    assert len(set(names)) == 5


def test_vote_share_counts_all_that_were_found() -> None:
    class Anything:
        answers = NumberAnswers()

        def classify(self, answers: object) -> Run[None]:
            yield from ()

    def candidate(answer: str | None) -> Candidate:
        return Candidate("", None, "", answer, 0)

    found = [candidate(answer) for answer in ("1", "2", "1", None)]
    run = VoteShare().rewards(Anything(), [], [found[2], found[3]], found)  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as end:
        next(run)
    assert end.value.value == [pytest.approx(2 / 3), 0.0]


def test_marco_rewards_the_share_among_the_five_likeliest(llm: LLM) -> None:
    strategy = marco(Steps.mini(32), width=2, rollouts=4)
    result = solve(llm, SHORT, strategy, params=HOT, answers=NumberAnswers(), seed=3)
    for candidate in result.candidates:
        assert candidate.scores["score"] == pytest.approx(candidate.mean.top5_share)
        assert 0.2 < candidate.mean.top5_share <= 1
    for node in result.nodes[1:]:
        assert len(llm.tokenizer.encode(node.text, add_special_tokens=False)) <= 32 or (
            "</think>" in node.text
        )


@pytest.mark.parametrize("total", [1, 80, 300])
@pytest.mark.parametrize("strategy", [MCTS(), rstar(rollouts=2)], ids=["plain", "rstar"])
def test_a_budget_ends_the_search(llm: LLM, strategy: MCTS, total: int) -> None:
    result: Result = solve(
        llm, PROMPT, strategy, answers=NumberAnswers(), budget=Budget(total_tokens=total)
    )
    assert result.is_exhausted
    assert result.usage.generated_tokens <= total
    assert result.candidates
    assert not llm.engine.has_work
    assert llm.engine.scheduler.held == []


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="rollouts=0"):
        MCTS(rollouts=0)
    with pytest.raises(ValueError, match="actions is empty"):
        MCTS(())
    with pytest.raises(ValueError, match="c=-1"):
        MCTS(c=-1)
    with pytest.raises(ValueError, match="simulation='deep'"):
        MCTS(simulation="deep")  # type: ignore[arg-type]
