"""Steps that are programs: what does not run does not stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moejet.branch import Branch
from moejet.reasoning.result import Result
from moejet.reasoning.scorers import StepScorer
from moejet.reasoning.search.actions import NextStep
from moejet.reasoning.search.mcts import MCTS, Scored
from moejet.reasoning.search.step_beam import StepBeam
from moejet.reasoning.search.steps import Steps
from moejet.reasoning.select import SCORE, choose_by_votes, votes
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams
from moejet.validation import checked, require_int

END_OF_STEP = "<end_of_step>"
RunPython = Callable[[str], Any]  # to something with a `status`, "ok" if the program ran to its end
_FENCED = re.compile(r"```(?:python|py)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_MARKED = re.compile(r"<code>(.*?)(?:<end_of_code>|</code>|\Z)", re.DOTALL)


def code_of(text: str) -> str | None:
    """All Python so far: of ```python fences or between <code> and <end_of_code>, the last one perhaps not closed."""
    text = text.replace(END_OF_STEP, "")
    parts = _FENCED.findall(text) or _MARKED.findall(text)
    code = "\n".join(part.strip("\n") for part in parts)
    return code if code.strip() else None


@dataclass(frozen=True, slots=True)
@checked
class CodeCheck:
    """Lets branches stay whose Python so far runs without an error; those without any stay as well.

    python: runs a program, `moejet.reasoning.sandbox.run_python` unless given, on another thread · code: finds it
    """

    python: RunPython | None = None
    code: Callable[[str], str | None] = code_of

    def check_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[bool]]:
        fine = yield from self.check_texts(task, [branch.text for branch in branches])
        return fine

    def check_texts(self, task: Task, texts: Sequence[str]) -> Run[list[bool]]:
        """Whether the program of each text runs; equal ones run once."""
        programs = [self.code(text) for text in texts]
        distinct = list(dict.fromkeys(program for program in programs if program is not None))
        task.usage.model_evaluations += len(distinct)
        results = yield from task.gather(
            [task.background(self._runner(program)) for program in distinct]
        )
        is_fine = dict(zip(distinct, results, strict=True))
        return [program is None or bool(is_fine[program]) for program in programs]

    def _runner(self, program: str) -> Callable[[], bool]:
        def run() -> bool:
            python = self.python
            if python is None:
                from moejet.reasoning.sandbox import run_python

                python = run_python
            return bool(python(program).status == "ok")

        return run


@dataclass(frozen=True, slots=True)
@checked
class CodeSteps:
    """rStar-Math's search (arXiv 2501.04519): steps with Python, of which only those stay whose program still runs.

    A process preference model, as `scorer`, leads it. The answer is the majority of the `top` best trajectories.

    method: "beam" keeps `beams` of beams * children at each step, 8 x 8 as published; "tree" is a tree search of
    `rollouts` in which the children of a place are sampled `children` at a time · depth: 16 steps · python: see
    `CodeCheck`
    """

    scorer: StepScorer
    method: Literal["beam", "tree"] = "beam"
    beams: int = 8
    children: int = 8
    rollouts: int = 12
    depth: int = 16
    top: int = 4
    step: Steps = field(default_factory=lambda: Steps(END_OF_STEP))
    python: RunPython | None = None
    params: SamplingParams | None = None

    def __post_init__(self) -> None:
        for name in ("beams", "children", "rollouts", "depth", "top"):
            require_int(name, getattr(self, name), 1)

    def run(self, task: Task) -> Run[Result]:
        check = CodeCheck(self.python)
        result = yield from self._search(check).run(task)
        # What a tree search finished in one go has not been checked yet.
        fine = yield from check.check_texts(task, [c.text for c in result.candidates])
        fit = [c for c, is_fine in zip(result.candidates, fine, strict=True) if is_fine]
        if not fit:
            return replace(result, confidence=0.0)
        able = [c for c in fit if c.answer is not None] or fit
        best = sorted(able, key=lambda c: (-c.scores[SCORE], -c.mean.logprob))[: self.top]
        yield from task.classify(candidate.answer for candidate in best)
        chosen = yield from choose_by_votes(task, best, votes(task, best))
        return replace(chosen, candidates=tuple(fit), nodes=result.nodes)

    def _search(self, check: CodeCheck) -> StepBeam | MCTS:
        if self.method == "beam":
            return StepBeam(
                self.beams * self.children,
                self.children,
                self.scorer,
                self.step,
                self.depth,
                check=check,
                params=self.params,
            )
        action = NextStep(self.children, self.step, check=check)
        return MCTS(
            (action,), Scored(self.scorer), self.rollouts, depth=self.depth, params=self.params
        )
