"""Beam search over steps with a verifier, and its variant of independent subtrees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from moejet.branch import Branch
from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.scorers import StepScorer
from moejet.reasoning.search.steps import Step, Steps, complete
from moejet.reasoning.search.tree import Final, Tree, conclude
from moejet.reasoning.select import SCORE
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams
from moejet.validation import checked, require_int


@runtime_checkable
class StepCheck(Protocol):
    """Whether branches may stay in a search, whatever their score."""

    def check_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[bool]]: ...


@dataclass(eq=False, slots=True)
class _Beam:
    """node: its last step in the tree · subtree: which of the independent ones it belongs to"""

    branch: Branch
    node: int
    subtree: int
    step: Step | None = None
    score: float = 0.0
    is_refused: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_refused or (self.step is not None and self.step.is_last)


@dataclass(frozen=True, slots=True)
@checked
class StepBeam:
    """Beam search with a verifier (Snell et al., arXiv 2408.03314; DVTS with independent=True).

    n beams take a step, are scored, the best n / width stay, and each of these goes on `width` times. With
    independent=True they are n / width subtrees that never compete: each keeps its own best beam, which keeps the
    answers diverse where there are many beams. What has ended keeps its place as long as its score is among the best.
    Sampling decides how siblings differ: at temperature 0 they are all equal.

    step, max_steps: the last of max_steps goes on to the end; 40, as in published runs · final: "best" takes the
    candidate with the highest score, "vote" the answer with most of it; by default best, and vote of subtrees · check:
    who may stay at all · filter_duplicates: of equal beams that compete only one stays
    """

    n: int
    width: int
    scorer: StepScorer
    step: Steps = field(default_factory=Steps)
    max_steps: int = 40
    independent: bool = False
    final: Final | None = None
    check: StepCheck | None = None
    filter_duplicates: bool = True
    params: SamplingParams | None = None

    def __post_init__(self) -> None:
        for name in ("n", "width", "max_steps"):
            require_int(name, getattr(self, name), 1)
        if self.n % self.width:
            raise ValueError(f"n={self.n} must be a multiple of width={self.width}")

    def run(self, task: Task) -> Run[Result]:
        tree = Tree()
        beams = [
            _Beam(branch, 0, number // self.width)
            for number, branch in enumerate((yield from task.open(self.n)))
        ]
        for depth in range(1, self.max_steps + 1):
            is_last = depth == self.max_steps or task.is_ending
            yield from self._advance(task, tree, beams, is_last=is_last)
            if task.is_exhausted:
                break
            beams = yield from self._prune(task, tree, beams, depth)
            if all(beam.is_over for beam in beams):
                break
            beams = yield from self._widen(task, beams)
        beams = [beam for beam in beams if not beam.is_refused] or beams
        candidates = [_candidate(task, beam) for beam in beams]
        task.release([beam.branch for beam in beams])
        result = yield from conclude(
            task, tree, candidates, self.final or ("vote" if self.independent else "best")
        )
        return result

    def _advance(self, task: Task, tree: Tree, beams: list[_Beam], *, is_last: bool) -> Run[None]:
        """Takes those that have not ended one step further and scores them."""
        live = [beam for beam in beams if not beam.is_over]
        branches = [beam.branch for beam in live]
        if is_last:
            steps = yield from complete(task, branches, params=self.params)
        else:
            steps = yield from self.step.advance(task, branches, params=self.params)
        fine = [True] * len(live)
        if self.check is not None:
            fine = yield from self.check.check_steps(task, branches)
        able = [branch for branch, is_fine in zip(branches, fine, strict=True) if is_fine]
        scores = iter((yield from self.scorer.score_steps(task, able)) if able else ())
        for beam, step, is_fine in zip(live, steps, fine, strict=True):
            beam.step, beam.is_refused = step, not is_fine
            beam.score = next(scores) if is_fine else 0.0
            score = beam.score if is_fine else None
            beam.node = tree.add(beam.node, step.text, score=score)

    def _prune(self, task: Task, tree: Tree, beams: list[_Beam], depth: int) -> Run[list[_Beam]]:
        """Those that stay, best first; the others are released. If none may, one that was refused ends the search."""
        order = sorted(beams, key=_rank, reverse=True)
        kept = list(self._choose([beam for beam in order if not beam.is_refused]))
        for beam in beams:
            state = "pruned" if beam not in kept else "finished" if beam.is_over else "kept"
            tree.update(beam.node, state=state)
        numbers = [beam.node for beam in beams]
        message = f"step {depth}: {len(kept)} of {len(beams)} stay"
        yield from tree.tell(task, numbers, message)
        kept = kept or order[:1]
        task.release([beam.branch for beam in beams if beam not in kept])
        return kept

    def _choose(self, order: Sequence[_Beam]) -> Iterator[_Beam]:
        """Of beams in the order of their scores those that stay."""
        keep = self.n // self.width
        seen: set[object] = set()
        for beam in order:
            key: object = beam.branch.token_ids if self.filter_duplicates else beam
            key = beam.subtree if self.independent else key
            if key not in seen and len(seen) < keep:
                seen.add(key)
                yield beam

    def _widen(self, task: Task, beams: list[_Beam]) -> Run[list[_Beam]]:
        """What has not ended, copied until there are n again; those that have ended keep the places of their copies."""
        live = [beam for beam in beams if not beam.is_over]
        copies = self.width * len(live)
        if not self.independent:
            copies = max(copies, self.n - self.width * (len(beams) - len(live)))
        wider = [beam for beam in beams if beam.is_over]
        for rank, beam in enumerate(live):
            count = copies // len(live) + (rank < copies % len(live))
            forks = (yield from task.fork(beam.branch, count - 1)) if count > 1 else []
            wider += [
                _Beam(branch, beam.node, beam.subtree, beam.step, beam.score)
                for branch in (beam.branch, *forks)
            ]
        return wider


def _rank(beam: _Beam) -> tuple[bool, float, float]:
    """What was cut off comes last."""
    is_whole = not beam.is_over or beam.branch.is_finished
    return is_whole, beam.score, beam.branch.statistics.mean.logprob


def _candidate(task: Task, beam: _Beam) -> Candidate:
    segment = None if beam.step is None else beam.step.ended(task)
    return task.candidate(beam.branch, segment, parent=beam.node, scores={SCORE: beam.score})
