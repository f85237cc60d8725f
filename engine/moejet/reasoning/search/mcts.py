"""Monte Carlo tree search over reasoning, with pluggable actions (`moejet.reasoning.search.actions`) and value."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

from moejet.branch import Branch, Segment
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

    parallel: rollouts at the same time, so that the batch is used. Those that are under way count as visits without a
    reward (virtual loss, Chaslot et al., 2008), which leads the others elsewhere; 1 knows most before it chooses
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
    parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("rollouts", "depth", "samples", "parallel"):
            require_int(name, getattr(self, name), 1)
        if not self.actions:
            raise ValueError("actions is empty: a search needs at least one")
        require_number("c", self.c, 0)

    def run(self, task: Task) -> Run[Result]:
        search = Search(self, task)
        [branch] = yield from task.open()
        root = Place(branch, 0)
        number = 0
        while number < self.rollouts and not (number and task.is_ending):
            count = min(self.parallel, self.rollouts - number)
            paths = [search.begin(root) for _ in range(count)]
            yield from search.descend(paths)
            rewards = yield from search.rewards([path[-1] for path in paths])
            for path, reward in zip(paths, rewards, strict=True):
                number += 1
                for place in path:
                    place.total += reward
                    search.tree.update(place.number, visits=place.visits, score=place.mean)
                message = f"rollout {number} of {self.rollouts}: reward {reward:.3f}"
                yield from search.tree.tell(task, [place.number for place in path[1:]], message)
        if not search.found:
            place = root
            while place.children:
                place = max(place.children, key=lambda child: (child.visits, child.mean))
            place.reward = place.children = None  # it may be a dead end
            yield from search.rewards([place], is_end=True)
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
    parallel: int = 1,
    params: SamplingParams | None = None,
) -> MCTS:
    """Marco-o1's search: steps or mini-steps, reward by the mean share of chosen tokens among the five likeliest."""
    return MCTS(
        (NextStep(width, Steps.mini(32) if step is None else step),),
        Scored(Confidence("top5_share")),
        rollouts,
        params=params,
        parallel=parallel,
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


_End = tuple[Branch, Segment | None]


class Search:
    """The state of one run."""

    def __init__(self, method: MCTS, task: Task):
        self.method = method
        self.task = task
        self.tree = Tree()
        self.rng = random.Random(task.next_seed())
        self.found: list[Candidate] = []
        self.num_parts = 0

    def begin(self, root: Place) -> list[Place]:
        """The path to the leaf that is looked at next, which counts as visited, without a reward yet, from now on."""
        path = select(root, self.method.c, self.rng)
        for place in path:
            place.visits += 1
        return path

    def descend(self, paths: Sequence[list[Place]]) -> Run[None]:
        """Expands the leaves of paths and goes on to a child of each; with "expand" again and again."""
        going = list(paths)
        while going and not self.task.is_ending:
            going = [path for path in going if self._goes_on(path[-1])]
            leaves = dict.fromkeys(path[-1] for path in going if not path[-1].children)
            yield from self._expand(list(leaves))
            for path in going:
                if children := path[-1].children:
                    fewest = min(child.visits for child in children)
                    path.append(self.rng.choice([c for c in children if c.visits == fewest]))
                    path[-1].visits += 1
            if self.method.simulation != "expand":
                break

    def rewards(self, places: Sequence[Place], *, is_end: bool = False) -> Run[list[float]]:
        """Of a simulation from each place; is_end: to the end in any case, for want of another candidate."""
        ways = [self._is_simulated(place) or (is_end and not place.is_last) for place in places]
        ends = iter(
            (yield from self._simulate([p for p, way in zip(places, ways, strict=True) if way]))
        )
        found = []
        for place, is_simulated in zip(places, ways, strict=True):
            found.append((yield from self._reward(place, next(ends) if is_simulated else None)))
        return found

    def _goes_on(self, place: Place) -> bool:
        """Whether a path goes on from its last place; one that nobody has looked at is looked at first."""
        is_new = place.visits == 1 and place.depth > 0 and self.method.simulation != "expand"
        is_dead = place.children is not None and not place.children
        return not (place.is_last or is_new or is_dead or place.depth >= self.method.depth)

    def _is_simulated(self, place: Place) -> bool:
        is_dead = place.children is not None and not place.children
        return not (place.is_last or is_dead or self.method.simulation == "none")

    def _simulate(self, places: Sequence[Place]) -> Run[list[list[_End]]]:
        """Ends that are reached from each place, all of them at the same time."""
        task, method = self.task, self.method
        branches = []
        for place in places:
            branches += yield from task.fork(place.branch, method.samples)
        steps = (yield from complete(task, branches, params=method.params)) if branches else []
        ends: list[_End] = [
            (branch, step.segment) for branch, step in zip(branches, steps, strict=True)
        ]
        return [ends[i : i + method.samples] for i in range(0, len(ends), method.samples)]

    def _reward(self, place: Place, ends: Sequence[_End] | None) -> Run[float]:
        """What ends are worth, which count as candidates; of a place that has ended it is the same every time."""
        task, method = self.task, self.method
        if place.children is not None and not place.children:  # a dead end
            place.is_last, place.reward = True, 0.0
        if place.reward is not None:
            return place.reward
        is_whole = ends is not None or place.is_last
        ends = ends or [(place.branch, place.segment)]
        candidates = [task.candidate(*end, parent=place.number) for end in ends]
        branches = [branch for branch, _ in ends]
        known = [*self.found, *candidates] if is_whole else self.found
        rewards = yield from method.value.rewards(task, branches, candidates, known)
        mean = sum(rewards) / len(rewards)
        if is_whole:
            task.release(branches)
            for candidate, reward in zip(candidates, rewards, strict=True):
                self.found.append(replace(candidate, scores={SCORE: reward}))
        if place.is_last:
            place.reward = mean
        return mean

    def _expand(self, places: Sequence[Place]) -> Run[None]:
        """Adds the children of places; of several, all at the same time."""
        task, runs = self.task, []
        for place in places:
            place.children = []
            if len(places) > 1:
                self.num_parts += 1
                task = self.task.part(self.num_parts)
            runs.append(self._children(task, place))
        for place, children in zip(places, (yield from task.gather(runs)), strict=True):
            for action, child in children or ():
                self._add(place, action, child)
            if place.children:
                self.task.release([place.branch])

    def _children(self, task: Task, place: Place) -> Run[list[tuple[Action, Child]]]:
        found: list[tuple[Action, Child]] = []
        for action in self.method.actions:
            if action.applies(place) and not task.is_ending:
                children = yield from action.expand(task, place, self.method.params)
                found += [(action, child) for child in children]
        return found

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
