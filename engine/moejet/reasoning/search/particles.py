"""Particle filtering over steps."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from moejet.branch import Branch
from moejet.reasoning.result import Result
from moejet.reasoning.scorers import StepScorer
from moejet.reasoning.search.steps import Step, Steps, complete
from moejet.reasoning.search.tree import Final, Tree, conclude
from moejet.reasoning.select import SCORE
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams
from moejet.validation import checked, require_int, require_number

Resampling = Literal["systematic", "multinomial"]
_SMALLEST = 1e-6  # probabilities are read as between this and 1 minus this


@dataclass(eq=False, slots=True)
class _Particle:
    branch: Branch
    node: int
    step: Step | None = None
    score: float = 0.0
    log_weight: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.step is not None and self.step.is_last


@dataclass(frozen=True, slots=True)
@checked
class ParticleFilter:
    """n particles that are drawn anew, by weight, after each step (arXiv 2502.01618).

    A particle's weight is exp(logit(score)): the verifier's score is taken for the probability that all is well so
    far, and drawing keeps uncertain particles alive that a beam would drop. What has ended is drawn as well. In the
    end the particle with the largest weight answers.

    resampling: "systematic" draws with one random number and gives each its share up to rounding, "multinomial" draws
    each alone · scale: "log" for scores that are logarithms already, such as a log-probability · temperature: divides
    the logarithms of weights; above 1 selects more softly
    """

    n: int
    scorer: StepScorer
    step: Steps = field(default_factory=Steps)
    max_steps: int = 40
    resampling: Resampling = "systematic"
    scale: Literal["probability", "log"] = "probability"
    temperature: float = 1.0
    final: Final = "best"
    params: SamplingParams | None = None

    def __post_init__(self) -> None:
        for name in ("n", "max_steps"):
            require_int(name, getattr(self, name), 1)
        require_number("temperature", self.temperature, above=0)

    def run(self, task: Task) -> Run[Result]:
        tree, rng = Tree(), random.Random(task.next_seed())
        particles = [_Particle(branch, 0) for branch in (yield from task.open(self.n))]
        for depth in range(1, self.max_steps + 1):
            is_last = depth == self.max_steps or task.is_ending
            yield from self._advance(task, tree, particles, is_last=is_last)
            if task.is_exhausted or all(particle.is_over for particle in particles):
                break
            weights = normalised([particle.log_weight for particle in particles])
            if self.resampling == "systematic":
                drawn = systematic(weights, self.n, rng.random())
            else:
                drawn = multinomial(weights, self.n, rng)
            for i, particle in enumerate(particles):
                tree.update(particle.node, state="kept" if i in drawn else "pruned")
            message = f"step {depth}: {len(set(drawn))} of {self.n} were drawn"
            yield from tree.tell(task, [particle.node for particle in particles], message)
            particles = yield from self._copies(task, particles, drawn)
        candidates = [
            task.candidate(
                particle.branch,
                None if particle.step is None else particle.step.ended(task),
                parent=particle.node,
                scores={SCORE: particle.score},
            )
            for particle in particles
        ]
        task.release([particle.branch for particle in particles])
        weights = normalised([particle.log_weight for particle in particles])
        result = yield from conclude(task, tree, candidates, self.final, weights)
        return result

    def _advance(
        self, task: Task, tree: Tree, particles: Sequence[_Particle], *, is_last: bool
    ) -> Run[None]:
        live = [particle for particle in particles if not particle.is_over]
        branches = [particle.branch for particle in live]
        if is_last:
            steps = yield from complete(task, branches, params=self.params)
        else:
            steps = yield from self.step.advance(task, branches, params=self.params)
        scores = yield from self.scorer.score_steps(task, branches)
        for particle, step, score in zip(live, steps, scores, strict=True):
            particle.step, particle.score = step, score
            particle.log_weight = self._log_weight(score) / self.temperature
            particle.node = tree.add(particle.node, step.text, score=score)

    def _log_weight(self, score: float) -> float:
        if self.scale == "log":
            return score
        if not 0 <= score <= 1:
            raise ValueError(f'the score {score} is no probability: use scale="log" for logarithms')
        share = min(max(score, _SMALLEST), 1 - _SMALLEST)
        return math.log(share / (1 - share))

    def _copies(
        self, task: Task, particles: Sequence[_Particle], drawn: Sequence[int]
    ) -> Run[list[_Particle]]:
        """Of each particle as many as it was drawn; what has ended is shared by its copies."""
        found: list[_Particle] = []
        for i, particle in enumerate(particles):
            count = drawn.count(i)
            if count == 0:
                continue
            branches = [particle.branch] * count
            if count > 1 and not particle.is_over:
                branches[1:] = yield from task.fork(particle.branch, count - 1)
            found += [
                _Particle(b, particle.node, particle.step, particle.score, particle.log_weight)
                for b in branches
            ]
        kept = {particle.branch for particle in found}
        task.release([particle.branch for particle in particles if particle.branch not in kept])
        return found


def normalised(log_weights: Sequence[float]) -> list[float]:
    """The weights, summing to 1."""
    top = max(log_weights)
    weights = [math.exp(value - top) for value in log_weights]
    total = sum(weights)
    return [weight / total for weight in weights]


def systematic(weights: Sequence[float], n: int, offset: float) -> list[int]:
    """n indices by evenly spaced points, the first at offset / n: i comes n * weights[i] times, rounded up or down.

    weights sum to 1; offset is uniform in [0, 1).
    """
    found: list[int] = []
    total = 0.0
    for i, weight in enumerate(weights):
        total += weight
        while len(found) < n and (len(found) + offset) / n < total:
            found.append(i)
    last = max(i for i, weight in enumerate(weights) if weight > 0)
    return found + [last] * (n - len(found))  # where rounding left the sum below 1


def multinomial(weights: Sequence[float], n: int, rng: random.Random) -> list[int]:
    """n indices, each drawn alone."""
    return rng.choices(range(len(weights)), weights, k=n)
