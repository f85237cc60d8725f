"""Methods on top of others: by difficulty, confirmed by a second model, with steps that are programs."""

import contextlib
import io
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from moejet import LLM, SamplingParams
from moejet.reasoning.budget import Budget
from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.sample import Sample
from moejet.reasoning.scorers import Confidence
from moejet.reasoning.search.adaptive import Adaptive
from moejet.reasoning.search.code_steps import CodeSteps, code_of
from moejet.reasoning.search.mutual_check import AGREEMENT, MutualCheck, _beginning
from moejet.reasoning.select import Majority
from moejet.reasoning.single import Single
from moejet.reasoning.solver import solve, solve_many
from moejet.reasoning.task import Run, Task
from moejet.testing import arithmetic
from moejet.testing.number_answers import NumberAnswers
from moejet.testing.script import scripted

POSED = arithmetic.held_out_problems(6, seed=5, min_steps=6, max_steps=8)
PROMPTS = [[{"role": "user", "content": text}] for _, text in POSED]
EASY = [{"role": "user", "content": "Start with 17, add 25."}]
HOT = SamplingParams(temperature=1.3)


@dataclass(frozen=True)
class Says:
    """Answers without any model."""

    answers: tuple[str | None, ...]
    confidence: float = 1.0

    def run(self, task: Task) -> Run[Result]:
        candidates = tuple(Candidate(f"{a}", None, f"{a}", a, 1) for a in self.answers)
        yield from task.tell("note", "said")
        return Result(candidates[0], candidates, self.confidence)


@pytest.mark.parametrize(
    ("confidence", "answer"), [(0.75, "easy"), (0.74, "hard"), (float("nan"), "hard")]
)
def test_confidence_decides_about_the_method(llm: LLM, confidence: float, answer: str) -> None:
    probe = Says(("probe", "other"), confidence)
    strategy = Adaptive(probe=probe, easy=Says(("easy",)), hard=Says(("hard",)))
    result = solve(llm, "x", strategy, answers=NumberAnswers())
    assert result.answer == answer == result.details["level"]
    assert [c.answer for c in result.candidates] == ["probe", "other", answer]
    stands = solve(llm, "x", Adaptive(probe=probe, hard=Says(("hard",))), answers=NumberAnswers())
    assert stands.answer == ("probe" if answer == "easy" else "hard")
    merged = Adaptive(probe=Says(("1", "2"), 0), hard=Says(("2", "3")), merge=Majority())
    result = solve(llm, "x", merged, answers=NumberAnswers())
    assert (result.answer, result.confidence) == ("2", 0.5)
    with pytest.raises(ValueError, match="threshold=2"):
        Adaptive(hard=probe, threshold=2)


def test_easy_problems_cost_less_and_the_probe_is_used_again(llm: LLM) -> None:
    strategy = Adaptive(probe=Sample(4), hard=Sample(8), threshold=0.9)
    few, many = solve_many(
        llm, [EASY, PROMPTS[0]], strategy, params=HOT, answers=NumberAnswers(), seeds=[0, 4]
    )
    assert (few.details["level"], many.details["level"]) == ("easy", "hard")
    assert (few.usage.branches, many.usage.branches) == (4, 12)
    assert len(many.candidates) == 12
    assert sum(many.details["votes"].values()) == sum(c.answer is not None for c in many.candidates)
    cut = solve(
        llm,
        PROMPTS[0],
        strategy,
        params=HOT,
        answers=NumberAnswers(),
        budget=Budget(total_tokens=200),
    )
    assert cut.usage.generated_tokens <= 200


@pytest.fixture(scope="module")
def second() -> Iterator[LLM]:
    with LLM(num_threads=1) as model:
        yield model


def test_models_that_number_their_requests_alike_are_told_apart(
    llm: LLM, second: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Both:
        def run(self, task: Task) -> Run[Result]:
            other = yield from task.on(llm=second)
            assert other.prompt_token_ids == task.prompt_token_ids
            assert other.messages == task.messages
            results = yield from task.gather([Single().run(t) for t in (task, other) * 3])
            candidates = tuple(result.candidate for result in results if result is not None)
            return Result(candidates[0], candidates)

    for model in (llm, second):
        monkeypatch.setattr(model.engine, "next_number", itertools.count(10**6).__next__)
    params = SamplingParams(max_tokens=12)
    results = solve_many(llm, PROMPTS[:2], Both(), params=params, answers=NumberAnswers())
    assert [len(result.candidates) for result in results] == [6, 6]
    for model in (llm, second):
        assert not model.engine.has_work
        assert model.engine.scheduler.held == []


def test_another_model_needs_words(llm: LLM, second: LLM) -> None:
    with pytest.raises(ValueError, match="as messages or as a text"):
        solve(llm, [5, 6, 7], MutualCheck(Says(("1",)), second), answers=NumberAnswers())


def test_beginnings_are_whole_words() -> None:
    candidate = Candidate("", "one two\nthree four five  ", "six", "6", 1)
    expected = {
        0.0: "one",
        0.2: "one",
        0.4: "one two\n",
        0.6: "one two\nthree",
        0.9: "one two\nthree four",
    }
    for share, text in expected.items():
        assert _beginning(candidate, share) == text
    assert _beginning(Candidate("", None, "six seven", "7", 1), 0.5) == "six"


def test_what_a_second_model_confirms_is_kept(llm: LLM, second: LLM) -> None:
    """It completes 4 beginnings of each; the script confirms 7 always, 8 half of the time, and 9 never."""
    turns = itertools.count()
    asked: list[str] = []

    def complete(context: str) -> str:
        asked.append(context)
        own = "7" if "sevens" in context else "8" if "eights" in context else "nothing"
        return own if own != "8" or next(turns) % 2 else "1"

    @dataclass(frozen=True)
    class Traces:
        def run(self, task: Task) -> Run[Result]:
            yield from task.tell("note", "said")
            words = {"7": "sevens", "8": "eights", "9": "nines"}
            candidates = tuple(
                Candidate("", None, f"{words[a]} {a} w w w w w w w {n}", a, 1)
                for n, a in enumerate("97998")
            )
            return Result(candidates[0], candidates)

    params = scripted(second, complete)
    strategy = MutualCheck(Traces(), second, params=params)
    result = solve(llm, "the question ", strategy, answers=NumberAnswers())
    assert [c.scores[AGREEMENT] for c in result.candidates] == [0.0, 1.0, 0.0, 0.0, 0.5]
    assert result.details["kept"] == [False, True, False, False, True]
    assert (result.answer, result.confidence) == ("7", 1.0)
    assert all(context.startswith("the question ") for context in asked)
    # 2 to 5 of 10 words; equal beginnings of different candidates are completed once.
    assert sorted(asked) == sorted(set(asked))
    assert {len(c.removeprefix("the question ").split()) for c in asked} == {2, 3, 4, 5}
    strict = MutualCheck(
        Traces(), second, need=1.0, masks=(0.5,), params=scripted(second, lambda c: "no")
    )
    result = solve(llm, "the question ", strict, answers=NumberAnswers())
    assert result.answer == "9"  # none is kept: the commonest
    assert result.confidence == 0.0
    for model in (llm, second):
        assert model.engine.scheduler.held == []
        assert not model.engine.has_work


def test_what_is_kept_is_more_often_right(llm: LLM, second: LLM) -> None:
    strategy = MutualCheck(Sample(4), second, masks=(0.3, 0.5))
    results = solve_many(llm, PROMPTS[:3], strategy, params=HOT, answers=NumberAnswers())
    right: dict[bool, list[bool]] = {True: [], False: []}
    for (problem, _), result in zip(POSED[:3], results, strict=True):
        for candidate, is_kept in zip(result.candidates, result.details["kept"], strict=True):
            right[is_kept].append(candidate.answer == str(problem.answer))
    everything = right[True] + right[False]
    assert len(right[False]) > 1
    assert sum(right[True]) / len(right[True]) > sum(everything) / len(everything)


def test_code_is_found_in_fences_and_between_marks() -> None:
    assert code_of("text ```python\na = 1\n``` more ```py\nb = a") == "a = 1\nb = a"
    assert code_of("<code>\nx = 1 <end_of_step>\ny = 2\n<end_of_step>") == "x = 1 \ny = 2"
    assert code_of("<code>x\n<end_of_code> then <code>y</code> z") == "x\ny"
    assert code_of("no code") is None
    assert code_of("```python\n```") is None


def _python(code: str) -> SimpleNamespace:
    """Runs the script's own programs."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "script", "exec"), {})
    except Exception as error:
        return SimpleNamespace(status="error", stderr=str(error))
    return SimpleNamespace(status="ok")


def _coder(llm: LLM) -> SamplingParams:
    first = itertools.cycle(["x = 2", "x = 1 / 0", "x = 3"])
    then = itertools.cycle(["y = x * 3", "y = undefined", "import nothing_at_all"])

    def reply(context: str) -> str:
        steps = context.count("<end_of_step>")
        if steps == 0:
            return f"<code>\n{next(first)}\n<end_of_step>"
        if steps == 1:
            return f"\n{next(then)}\n<end_of_step>"
        return f"\nprint(y)\n<end_of_code> The answer is {3 * int(context.split('x = ')[1][0])}"

    return scripted(llm, reply)


@pytest.mark.parametrize("method", ["beam", "tree"])
def test_steps_that_survive_run(llm: LLM, method: str) -> None:
    threads: set[int] = set()

    def python(code: str) -> SimpleNamespace:
        threads.add(threading.get_ident())
        return _python(code)

    strategy = CodeSteps(Confidence(), method, 2, 4, 6, top=3, python=python)  # type: ignore[arg-type]
    result = solve(llm, "Compute.", strategy, params=_coder(llm), answers=NumberAnswers())
    assert threading.get_ident() not in threads
    assert threads
    survivors = failures = 0
    for node in result.nodes[1:]:
        text, at = "", node
        while at.number:
            text, at = at.text + text, result.nodes[at.parent]
        runs = _python(code_of(text) or "").status == "ok"
        if method == "tree" or node.state in ("kept", "finished", "chosen"):
            assert runs, text
            survivors += 1
        failures += not runs
    assert survivors >= 3
    assert failures >= (2 if method == "beam" else 0)
    assert result.answer in ("6", "9")
    assert all(_python(code_of(c.text) or "").status == "ok" for c in result.candidates)
    assert result.usage.model_evaluations > 3


def test_without_a_program_that_runs_there_is_no_confidence(llm: LLM) -> None:
    params = scripted(llm, lambda context: "<code>\n1 / 0\n<end_of_step>")
    strategy = CodeSteps(Confidence(), beams=1, children=2, python=_python)
    result = solve(llm, "Compute.", strategy, params=params, answers=NumberAnswers())
    assert result.confidence == 0.0
    with pytest.raises(ValueError, match="method='both'"):
        CodeSteps(Confidence(), "both")  # type: ignore[arg-type]


def test_programs_run_in_the_sandbox_unless_told_otherwise(llm: LLM) -> None:
    strategy = CodeSteps(Confidence(), beams=1, children=3)
    result = solve(llm, "Compute.", strategy, params=_coder(llm), answers=NumberAnswers())
    assert result.answer in ("6", "9")
    assert any(node.state == "pruned" and "1 / 0" in node.text for node in result.nodes)


def test_everything_nests(llm: LLM) -> None:
    inner = Adaptive(probe=Sample(2), hard=Single(), threshold=1.0)
    strategy = MutualCheck(Sample(2, Adaptive(probe=inner, hard=Single())), masks=(0.5,))
    result = solve(llm, EASY, strategy, params=HOT, answers=NumberAnswers())
    assert result.candidates
    assert llm.engine.scheduler.held == []
