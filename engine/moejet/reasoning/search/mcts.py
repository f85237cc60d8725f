"""Monte Carlo tree search over reasoning, with pluggable actions (`moejet.reasoning.search.actions`) and value."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

from moejet.branch import Branch
from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.scorers import Confidence, StepScorer
from moejet.reasoning.search.actions import Action, Child, NextStep, Place, rstar_actions
from moejet.reasoning.search.steps import Steps, complete
from moejet.reasoning.search.tree import Final, Tree, conclude
from moejet.reasoning.select import SCORE
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams
from moejet.validation import checked, require_int, require_number

Simulation = Literal["finish", "expand", "none"]


@runtime_checkable
class Value(Protocol):
    """What a simulation is worth, best between 0 and 1."""

    def rewards(
        self,
        task: Task,
        branches: Sequence[Branch],
        candidates: Sequence[Candidate],
        found: Sequence[Candidate],
    ) -> Run[list[float]]:
        """Of each branch. candidates: what the branches are · found: all that have ended so far, these included."""


@dataclass(frozen=True, slots=True)
class VoteShare:
    """The share of all candidates found so far that give the same answer; 0 without one (rStar, arXiv 2408.06195)."""

    def rewards(
        self,
        task: Task,
        branches: Sequence[Branch],
        candidates: Sequence[Candidate],
        found: Sequence[Candidate],
    ) -> Run[list[float]]:
        given = [candidate.answer for candidate in found if candidate.answer is not None]
        wanted = [candidate.answer for candidate in candidates if candidate.answer is not None]
        yield from task.classify([*given, *wanted])
        groups = task.answers.group([*given, *wanted])
        shares = iter(
            [groups[: len(given)].count(g) / max(1, len(given)) for g in groups[len(given) :]]
        )
        return [next(shares) if c.answer is not None else 0.0 for c in candidates]


@dataclass(frozen=True, slots=True)
@checked
class Scored:
    """What a verifier says: process reward models, the model's own confidence, programs."""

    scorer: StepScorer

    def rewards(
        self,
        task: Task,
        branches: Sequence[Branch],
        candidates: Sequence[Candidate],
        found: Sequence[Candidate],
    ) -> Run[list[float]]:
        rewards = yield from self.scorer.score_steps(task, branches)
        return rewards


def uct(total: float, visits: int, parent_visits: int, c: float) -> float:
    """Mean reward plus c * sqrt(ln(parent's visits) / visits); infinite without a visit."""
    if visits == 0:
        return math.inf
    return total / visits + c * math.sqrt(math.log(parent_visits) / visits)


@dataclass(frozen=True, slots=True)
@checked
class MCTS:
    """Rollouts from the root of a tree of partial solutions, led by UCT.

    Each rollout follows the children of largest UCT, unvisited ones first, to a place without any; if it has been there
    before, all `actions` that apply add children, and it goes on to a random one. It simulates from there and adds the
    reward to every place on its path.

    simulation: "finish" lets the model write on to the end, `samples` times, the mean reward counting; "expand" goes on
    with random actions to an end, as rStar does; "none" takes the value of the unfinished place, for process reward
    models · value: `VoteShare()` unless given · c: 2, of rStar · depth: steps, after which a simulation finishes ·
    final: "vote" weighs the answers found by their rewards, "best" takes the largest
    """

    actions: tuple[Action, ...] = (NextStep(),)
    value: Value = field(default_factory=VoteShare)
    rollouts: int = 16
    c: float = 2.0
    depth: int = 40
    simulation: Simulation = "finish"
    samples: int = 1
    final: Final = "vote"
    params: SamplingParams | None = None

    def __post_init__(self) -> None:
        for name in ("rollouts", "depth", "samples"):
            require_int(name, getattr(self, name), 1)
        if not self.actions:
            raise ValueError("actions is empty: a search needs at least one")
        require_number("c", self.c, 0)

    def run(self, task: Task) -> Run[Result]:
        search = Search(self, task)
        [branch] = yield from task.open()
        root = Place(branch, 0)
        for number in range(1, self.rollouts + 1):
            path = select(root, self.c, search.rng)
            yield from search.descend(path)
            reward = yield from search.reward(path[-1])
            for place in path:
                place.visits += 1
                place.total += reward
                search.tree.update(place.number, visits=place.visits, score=place.mean)
            message = f"rollout {number} of {self.rollouts}: reward {reward:.3f}"
            yield from search.tree.tell(task, [place.number for place in path[1:]], message)
            if task.is_exhausted:
                break
        if not search.found:
            place = root
            while place.children:
                place = max(place.children, key=lambda child: (child.visits, child.mean))
            yield from search.finish(place)
        result = yield from conclude(task, search.tree, search.found, self.final)
        return replace(result, details={**result.details, "rollouts": root.visits})


def rstar(*, rollouts: int = 16, depth: int = 5, params: SamplingParams | None = None) -> MCTS:
    """rStar's generator: five actions, reward at the leaves by vote share (arXiv 2408.06195)."""
    return MCTS(
        rstar_actions(), VoteShare(), rollouts, depth=depth, simulation="expand", params=params
    )


def marco(
    step: Steps | None = None,
    *,
    width: int = 3,
    rollouts: int = 16,
    params: SamplingParams | None = None,
) -> MCTS:
    """Marco-o1's search: steps or mini-steps, reward by the mean share of chosen tokens among the five likeliest."""
    return MCTS(
        (NextStep(width, step or Steps.mini(32)),),
        Scored(Confidence("top5_share")),
        rollouts,
        params=params,
    )


def select(root: Place, c: float, rng: random.Random) -> list[Place]:
    """The path to the leaf that is looked at next."""
    path = [root]
    while children := path[-1].children:
        unvisited = [child for child in children if child.visits == 0]
        if unvisited:
            path.append(rng.choice(unvisited))
        else:
            visits = path[-1].visits
            path.append(max(children, key=lambda p: uct(p.total, p.visits, visits, c)))
    return path


class Search:
    """The state of one run."""

    def __init__(self, method: MCTS, task: Task):
        self.method = method
        self.task = task
        self.tree = Tree()
        self.rng = random.Random(task.next_seed())
        self.found: list[Candidate] = []

    def descend(self, path: list[Place]) -> Run[None]:
        """Expands the leaf of a path and goes on to a child; with "expand" again and again."""
        while not self.task.is_exhausted and not path[-1].is_last:
            place = path[-1]
            is_new = place.visits == 0 and place.depth > 0 and self.method.simulation != "expand"
            if is_new or place.depth >= self.method.depth:
                break
            yield from self._expand(place)
            if not place.children:
                break
            path.append(self.rng.choice(place.children))
            if self.method.simulation != "expand":
                break

    def reward(self, place: Place) -> Run[float]:
        """Of a simulation from a place. One that has ended is worth the same every time."""
        if place.reward is not None:
            return place.reward
        method = self.method
        if place.children is not None and not place.children:  # a dead end
            place.is_last, place.reward = True, 0.0
        elif place.is_last or method.simulation != "none":
            rewards = yield from self.finish(place)
            reward = sum(rewards) / len(rewards)
            if not place.is_last:
                return reward
            place.reward = reward
        else:
            branches = [place.branch]
            candidates = [self.task.candidate(place.branch, place.segment)]
            [reward] = yield from method.value.rewards(self.task, branches, candidates, self.found)
            return reward
        return place.reward

    def finish(self, place: Place) -> Run[list[float]]:
        """The rewards of ends that are reached from a place, which count as candidates."""
        task, method = self.task, self.method
        branches, segments = [place.branch], [place.segment]
        if not place.is_last:
            branches = yield from task.fork(place.branch, method.samples)
            steps = yield from complete(task, branches, params=method.params)
            segments = [step.segment for step in steps]
        candidates = [
            task.candidate(branch, segment, parent=place.number)
            for branch, segment in zip(branches, segments, strict=True)
        ]
        rewards = yield from method.value.rewards(
            task, branches, candidates, [*self.found, *candidates]
        )
        task.release(branches)
        for candidate, reward in zip(candidates, rewards, strict=True):
            self.found.append(replace(candidate, scores={SCORE: reward}))
        return rewards

    def _expand(self, place: Place) -> Run[None]:
        place.children = []
        for action in self.method.actions:
            if not action.applies(place) or self.task.is_exhausted:
                continue
            children = yield from action.expand(self.task, place, self.method.params)
            for child in children:
                self._add(place, action, child)
        if place.children:
            self.task.release([place.branch])

    def _add(self, place: Place, action: Action, child: Child) -> None:
        assert place.children is not None
        state = "finished" if child.is_last else "open"
        number = self.tree.add(place.number, child.text, state=state)
        place.children.append(
            Place(
                child.branch,
                number,
                action=action.name,
                depth=place.depth + 1,
                segment=child.segment,
                is_last=child.is_last,
                reward=child.reward,
            )
        )
        if child.reward is not None:
            ended = self.task.candidate(child.branch, child.segment, parent=number)
            self.found.append(replace(ended, scores={SCORE: child.reward}))
            self.task.release([child.branch])
