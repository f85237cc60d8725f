"""Steps, and beam search over them: what stays, what is shared, what it finds with a perfect verifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from moejet import LLM, SamplingParams
from moejet.branch import Branch
from moejet.reasoning.budget import Budget
from moejet.reasoning.result import Result
from moejet.reasoning.scorers import Confidence
from moejet.reasoning.search.particles import ParticleFilter
from moejet.reasoning.search.step_beam import StepBeam
from moejet.reasoning.search.steps import Step, Steps
from moejet.reasoning.single import Single
from moejet.reasoning.solver import solve
from moejet.reasoning.task import Run, Strategy, Task
from moejet.testing import arithmetic
from moejet.testing.arithmetic_oracle import StepOracle
from moejet.testing.number_answers import NumberAnswers
from moejet.testing.script import scripted

POSED = arithmetic.held_out_problems(3, seed=5, min_steps=7, max_steps=8)
PROMPTS = [[{"role": "user", "content": text}] for _, text in POSED]
HOT = SamplingParams(temperature=1.5)


@dataclass
class Stepping:
    """Goes on step by step and keeps them."""

    steps: Steps
    found: list[Step] = field(default_factory=list)

    def run(self, task: Task) -> Run[Result]:
        [branch] = yield from task.open()
        while not self.found or not self.found[-1].is_last:
            self.found += yield from self.steps.advance(task, [branch])
        candidate = task.candidate(branch, self.found[-1].segment)
        return Result(candidate, (candidate,))


def test_lines_of_the_thinking_are_steps_and_the_answer_belongs_to_the_last(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0)
    plain = solve(llm, PROMPTS[0], Single(), params=greedy, answers=NumberAnswers())
    stepping = Stepping(Steps("\n"))
    result = solve(llm, PROMPTS[0], stepping, params=greedy, answers=NumberAnswers())
    assert result.text == plain.text
    texts = [step.text for step in stepping.found]
    assert "".join(texts) == plain.text
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in texts[:-1])
    assert texts[-1].startswith("</think>")
    assert len(texts) == 1 + len((plain.reasoning or "").split("\n"))
    divided = Stepping(Steps("\n", divides_answer=True))
    solve(llm, PROMPTS[0], divided, params=greedy, answers=NumberAnswers())
    assert [step.text for step in divided.found][-2:] == ["</think>\n", "\n" + plain.content]


@pytest.mark.parametrize("size", [32, 7])
def test_mini_steps_have_exactly_so_many_tokens(llm: LLM, size: int) -> None:
    greedy = SamplingParams(temperature=0.0)
    plain = solve(llm, PROMPTS[0], Single(), params=greedy, answers=NumberAnswers())
    stepping = Stepping(Steps(None, size, divides_answer=True))
    result = solve(llm, PROMPTS[0], stepping, params=greedy, answers=NumberAnswers())
    assert result.text == plain.text
    sizes = [len(step.segment.token_ids) for step in stepping.found]
    assert sizes[:-1] == [size] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= size
    limited = SamplingParams(temperature=0.0, max_tokens=2 * size + 3)
    stepping = Stepping(Steps.mini(size))
    result = solve(llm, PROMPTS[0], stepping, params=limited, answers=NumberAnswers())
    assert [len(step.segment.token_ids) for step in stepping.found] == [size, size, 3]
    assert result.candidate.finish_reason == "length"


def test_white_space_alone_is_no_step(llm: LLM) -> None:
    params = scripted(
        llm, lambda context: "\n\n  one\n\n\ntwo\n"[: None if "one" not in context else 0]
    )
    stepping = Stepping(Steps("\n"))
    solve(llm, "plain text", stepping, params=params, answers=NumberAnswers())
    assert stepping.found[0].text == "\n\n  one\n"


@dataclass(frozen=True)
class Watched:
    """Scores by log-probability and looks at the beams and their blocks meanwhile."""

    tables: list[list[list[int]]] = field(default_factory=list)
    ids: list[list[tuple[int, ...]]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        assert task._root is not None
        pool = task.llm.engine.block_pool
        tables = [list(branch._request.block_table) for branch in branches]
        own = set(task._root._request.block_table)
        self.used.append(pool.num_blocks - pool.num_free - len(own.difference(*tables)))
        self.tables.append(tables)
        self.ids.append([branch.token_ids for branch in branches])
        scores = yield from Confidence().score_steps(task, branches)
        return scores


@pytest.mark.parametrize("independent", [False, True])
def test_the_cache_holds_each_step_of_the_tree_once(llm: LLM, independent: bool) -> None:
    watched = Watched()
    params = SamplingParams(temperature=5.0, ignore_eos=True, max_tokens=161)
    strategy = StepBeam(
        8, 4, watched, Steps(None, 40, divides_answer=True), 5, independent=independent
    )
    solve(llm, PROMPTS[0], strategy, params=params, answers=NumberAnswers(), seed=1)
    size = llm.engine.block_pool.block_size
    prompt = len(llm.read_prompt(PROMPTS[0])[1])
    assert len(watched.ids) == 5
    for depth in range(1, 5):
        parents = dict(zip(watched.ids[depth - 1], watched.tables[depth - 1], strict=True))
        before = len(watched.ids[depth - 1][0])
        whole = (prompt + before - 1) // size  # blocks that nobody writes into any more
        shared: set[int] = set()
        for ids, table in zip(watched.ids[depth], watched.tables[depth], strict=True):
            assert table[:whole] == parents[ids[:before]][:whole]
            shared.update(table[:whole])
        own = 8 * (len(watched.tables[depth][0]) - whole)
        assert len({ids[:before] for ids in watched.ids[depth]}) == 2
        assert watched.used[depth] == len(shared) + own
        assert watched.used[depth] < sum(map(len, watched.tables[depth]))
    assert llm.engine.scheduler.held == []


def test_with_a_perfect_verifier_beams_find_the_answer(llm: LLM) -> None:
    problem = POSED[0][0]
    plain = solve(llm, PROMPTS[0], Single(), params=HOT, answers=NumberAnswers(), seed=2)
    assert plain.answer != str(problem.answer), "too easy to show anything"
    for independent in (False, True):
        strategy = StepBeam(8, 4, StepOracle(problem), independent=independent)
        result = solve(llm, PROMPTS[0], strategy, params=HOT, answers=NumberAnswers(), seed=2)
        assert result.answer == str(problem.answer)
        assert result.candidate.scores == {"score": 1.0}
        assert not result.is_exhausted


def test_subtrees_keep_their_own_best(llm: LLM) -> None:
    strategy = StepBeam(12, 3, Confidence(), independent=True)
    result = solve(llm, PROMPTS[1], strategy, params=HOT, answers=NumberAnswers(), seed=4)
    assert len(result.candidates) == 4
    nodes = result.nodes
    roots = []
    for candidate in result.candidates:
        number = candidate.parent
        assert nodes[number].state in ("finished", "chosen")
        while nodes[number].parent != 0:
            number = nodes[number].parent
        roots.append(number)
    assert len(set(roots)) == 4
    assert sorted((number - 1) // 3 for number in roots) == [0, 1, 2, 3]
    # Within a subtree the best of its own stayed.
    first = nodes[1:13]
    for begin in range(0, 12, 3):
        family = first[begin : begin + 3]
        stayed = [node for node in family if node.state != "pruned"]
        assert len(stayed) == 1
        assert stayed[0].score == max(node.score or -9.0 for node in family)
    votes = result.details["votes"]
    assert result.answer == max(votes, key=votes.get)
    assert result.confidence == pytest.approx(votes[result.answer] / sum(votes.values()))


def test_the_best_stay_and_are_the_parents_of_the_next(llm: LLM) -> None:
    strategy = StepBeam(8, 4, Confidence(), filter_duplicates=False)
    result = solve(llm, PROMPTS[2], strategy, params=HOT, answers=NumberAnswers(), seed=4)
    first = result.nodes[1:9]
    scores = sorted((node.score or -9.0 for node in first), reverse=True)
    stayed = [node for node in first if node.state != "pruned"]
    assert [node.score for node in sorted(stayed, key=lambda n: -(n.score or -9.0))] == scores[:2]
    children = [node.parent for node in result.nodes[9:17]]
    assert sorted(children) == sorted([node.number for node in stayed] * 4)
    assert result.candidate.scores["score"] == max(c.scores["score"] for c in result.candidates)


@dataclass(frozen=True)
class Refusing:
    """Lets nothing stay that holds a text."""

    text: str

    def check_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[bool]]:
        return [self.text not in branch.text for branch in branches]
        yield


def test_what_a_check_refuses_does_not_stay(llm: LLM) -> None:
    replies = iter(["good\n", "bad\n", "better\n", "good\n"] * 9)
    params = scripted(llm, lambda context: next(replies))
    strategy = StepBeam(4, 2, Confidence(), max_steps=3, check=Refusing("bad"))
    result = solve(llm, "x", strategy, params=params, answers=NumberAnswers())
    assert all(node.state == "pruned" for node in result.nodes if "bad" in node.text)
    assert "bad" not in result.text
    nothing = scripted(llm, lambda context: "bad\n")
    result = solve(llm, "x", strategy, params=nothing, answers=NumberAnswers())
    assert (result.text, result.confidence) == ("bad\n", 0.0)
    assert [node.state for node in result.nodes[1:]] == ["chosen", *["pruned"] * 3]


@pytest.mark.parametrize("total", [1, 60, 400])
def test_a_budget_ends_the_search_with_the_best_there_is(llm: LLM, total: int) -> None:
    strategy = StepBeam(8, 4, Confidence())
    budget = Budget(total_tokens=total)
    result = solve(llm, PROMPTS[0], strategy, answers=NumberAnswers(), budget=budget, seed=3)
    assert result.is_exhausted
    assert result.usage.generated_tokens <= total
    assert result.candidates
    assert not llm.engine.has_work
    assert llm.engine.scheduler.held == []


@dataclass(frozen=True)
class Ending:
    """Ends the run while it scores, when every branch stands between two steps."""

    is_aborted: bool

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        task.ledger.is_aborted = self.is_aborted
        task.ledger.budget = Budget(total_tokens=task.usage.generated_tokens)
        return [0.0] * len(branches)
        yield


@pytest.mark.parametrize(
    "make",
    [
        lambda scorer: StepBeam(4, 2, scorer),
        lambda scorer: StepBeam(4, 2, scorer, Steps.mini(4)),
        lambda scorer: ParticleFilter(3, scorer, scale="log"),
    ],
)
def test_a_search_that_ends_between_two_steps_has_cut_its_branches_off(
    llm: LLM, make: Callable[[Ending], Strategy]
) -> None:
    for is_aborted, end in ((True, ("abort", None)), (False, ("length", "budget"))):
        result = solve(llm, PROMPTS[0], make(Ending(is_aborted)), answers=NumberAnswers())
        ends = {(c.finish_reason, c.stop_reason) for c in result.candidates}
        assert ends == {end}
        assert result.is_exhausted


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="n=6"):
        StepBeam(6, 4, Confidence())
    with pytest.raises(ValueError, match="width=0"):
        StepBeam(4, 0, Confidence())
    with pytest.raises(ValueError, match="max_steps=0"):
        StepBeam(4, 2, Confidence(), max_steps=0)
    with pytest.raises(ValueError, match="max_tokens=None"):
        Steps(None, None)
    with pytest.raises(ValueError, match="delimiter=''"):
        Steps("")
