"""What a tree search may do at a place: a next step, or one of rStar's five ways to go on (arXiv 2408.06195)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from moejet.branch import Branch, Segment
from moejet.reasoning.search.step_beam import StepCheck
from moejet.reasoning.search.steps import Step, Steps, complete
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams
from moejet.validation import checked


@dataclass(eq=False, slots=True)
class Place:
    """A partial solution. action: that led here · reward: of an end, once it is known · children: None if unexpanded"""

    branch: Branch
    number: int
    action: str = ""
    depth: int = 0
    segment: Segment | None = None
    is_last: bool = False
    reward: float | None = None
    children: list[Place] | None = None
    visits: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.visits if self.visits else 0.0


@dataclass(frozen=True, slots=True)
class Child:
    """What an action made of a copy of a place. reward: if the action knows it, of an end."""

    branch: Branch
    text: str
    segment: Segment
    is_last: bool
    reward: float | None = None


@runtime_checkable
class Action(Protocol):
    @property
    def name(self) -> str: ...

    def applies(self, place: Place) -> bool: ...

    def expand(self, task: Task, place: Place, params: SamplingParams | None) -> Run[list[Child]]:
        """Children of the place, whose branch stays as it is."""


@dataclass(frozen=True, slots=True)
@checked
class NextStep:
    """One step, sampled `width` times; equal ones are one child (A1 of rStar).

    prompt: text put before the step · check: who may stay
    """

    width: int = 3
    step: Steps = field(default_factory=Steps)
    prompt: str = ""
    check: StepCheck | None = None
    name: str = "step"

    def applies(self, place: Place) -> bool:
        return True

    def expand(self, task: Task, place: Place, params: SamplingParams | None) -> Run[list[Child]]:
        branches = yield from _begin(task, place, self.prompt, self.width)
        steps = yield from self.step.advance(task, branches, params=params)
        stay = [True] * len(branches)
        if self.check is not None:
            stay = yield from self.check.check_steps(task, branches)
        children: dict[tuple[int, ...], Child] = {}
        for branch, step, may_stay in zip(branches, steps, stay, strict=True):
            if may_stay and branch.token_ids not in children:
                children[branch.token_ids] = _child(place, branch, step)
            else:
                task.release([branch])
        return list(children.values())


@dataclass(frozen=True, slots=True)
@checked
class Finish:
    """All remaining steps, `samples` times; the likeliest of the commonest answer stays, worth its share (A2)."""

    samples: int = 32
    prompt: str = ""
    name: str = "finish"

    def applies(self, place: Place) -> bool:
        return True

    def expand(self, task: Task, place: Place, params: SamplingParams | None) -> Run[list[Child]]:
        branches = yield from _begin(task, place, self.prompt, self.samples)
        steps = yield from complete(task, branches, params=params)
        best, share = yield from commonest(task, branches, [branch.content for branch in branches])
        task.release([branch for i, branch in enumerate(branches) if i != best])
        return [_child(place, branches[best], steps[best], is_last=True, reward=share)]


@dataclass(frozen=True, slots=True)
@checked
class SubQuestion:
    """The next question to ask oneself, `width` of them, each with the commonest of `votes` answers to it (A3)."""

    width: int = 3
    votes: int = 10
    step: Steps = field(default_factory=Steps)
    prompt: str = "What should I find out next? "
    answer_prompt: str = "This is what I find: "
    name: str = "sub-question"

    def applies(self, place: Place) -> bool:
        return True

    def expand(self, task: Task, place: Place, params: SamplingParams | None) -> Run[list[Child]]:
        askers = yield from _begin(task, place, self.prompt, self.width)
        steps = yield from self.step.advance(task, askers, params=params)
        children: dict[str, Child] = {}
        for asker, step in zip(askers, steps, strict=True):
            if step.is_last and not asker.is_finished:  # cut off
                task.release([asker])
            elif step.is_last:
                children.setdefault(asker.text, _child(place, asker, step))
            elif asker.text in children:
                task.release([asker])
            else:
                asked = asker.text
                child = yield from _answer(
                    task, place, asker, self.answer_prompt, self.votes, self.step, params
                )
                children[asked] = child
        return list(children.values())


@dataclass(frozen=True, slots=True)
@checked
class ReAnswer:
    """Another answer to the question that was just asked, the commonest of `votes` (A4)."""

    votes: int = 10
    step: Steps = field(default_factory=Steps)
    prompt: str = "Let me answer that question once more, carefully and in small steps: "
    after: tuple[str, ...] = ("sub-question",)
    name: str = "re-answer"

    def applies(self, place: Place) -> bool:
        return place.action in self.after

    def expand(self, task: Task, place: Place, params: SamplingParams | None) -> Run[list[Child]]:
        [branch] = yield from task.fork(place.branch)
        child = yield from _answer(task, place, branch, self.prompt, self.votes, self.step, params)
        return [child]


@dataclass(frozen=True, slots=True)
@checked
class Rephrase:
    """The problem in other words, only at the beginning (A5)."""

    step: Steps = field(default_factory=Steps)
    prompt: str = "In other words, with every given fact and what is asked: "
    name: str = "rephrase"

    def applies(self, place: Place) -> bool:
        return place.depth == 0

    def expand(self, task: Task, place: Place, params: SamplingParams | None) -> Run[list[Child]]:
        branches = yield from _begin(task, place, self.prompt, 1)
        steps = yield from self.step.advance(task, branches, params=params)
        return [_child(place, branches[0], steps[0])]


def rstar_actions(
    step: Steps | None = None, *, width: int = 3, samples: int = 32, votes: int = 10
) -> tuple[Action, ...]:
    """A1 to A5, with rStar's numbers of steps and sub-questions (width), ends (samples), and answers (votes)."""
    step = step or Steps()
    return (
        NextStep(width, step),
        Finish(samples),
        SubQuestion(width, votes, step),
        ReAnswer(votes, step),
        Rephrase(step),
    )


def commonest(
    task: Task, branches: Sequence[Branch], texts: Sequence[str]
) -> Run[tuple[int, float]]:
    """The likeliest of the branches whose texts give the commonest answer, and that answer's share of all."""
    given = [(i, found) for i, text in enumerate(texts) if (found := task.answers.extract(text))]
    members: list[int] = list(range(len(branches)))
    share = 0.0
    if given:
        yield from task.classify(answer for _, answer in given)
        groups = task.answers.group([answer for _, answer in given])
        first = max(groups, key=lambda group: (groups.count(group), -group))
        members = [i for (i, _), group in zip(given, groups, strict=True) if group == first]
        share = len(members) / len(branches)
    return max(members, key=lambda i: (branches[i].statistics.mean.logprob, -i)), share


def _begin(task: Task, place: Place, prompt: str, width: int) -> Run[list[Branch]]:
    """Copies of a place, with a prompt that is computed once."""
    branches = yield from task.fork(place.branch)
    if prompt:
        task.append(branches[0], prompt)
    if width > 1:
        branches += yield from task.fork(branches[0], width - 1)
    return branches


def _answer(
    task: Task,
    place: Place,
    branch: Branch,
    prompt: str,
    votes: int,
    step: Steps,
    params: SamplingParams | None,
) -> Run[Child]:
    """Lets a branch answer in one step; of `votes` answers the commonest stays."""
    if prompt:
        task.append(branch, prompt)
    branches = [branch]
    if votes > 1:
        branches += yield from task.fork(branch, votes - 1)
    steps = yield from step.advance(task, branches, params=params)
    best, _ = yield from commonest(task, branches, [step.text for step in steps])
    task.release([b for i, b in enumerate(branches) if i != best])
    return _child(place, branches[best], steps[best])


def _child(
    place: Place,
    branch: Branch,
    step: Step,
    *,
    is_last: bool | None = None,
    reward: float | None = None,
) -> Child:
    """text: all that is new since the place, prompts included"""
    text = branch.text[len(place.branch.text) :]
    return Child(branch, text, step.segment, step.is_last if is_last is None else is_last, reward)
