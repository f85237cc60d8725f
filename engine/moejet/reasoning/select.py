"""Choosing among candidates: by votes, scores or likeness. Selectors see candidates only, never a reference answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.scorers import Scorer
from moejet.reasoning.task import Run, Task
from moejet.validation import checked, require_number, require_type

SCORE = "score"


@runtime_checkable
class Select(Protocol):
    def choose(self, task: Task, candidates: Sequence[Candidate]) -> Run[Result]:
        """The result of at least one candidate; scorers that it asks may take the engine's time."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One answer and who gave it. weight: of all of them · members: indices of the candidates"""

    answer: str
    weight: float
    members: tuple[int, ...]


def votes(
    task: Task,
    candidates: Sequence[Candidate],
    weight: Callable[[int], float] = lambda index: 1.0,
) -> list[Vote]:
    """The answers that were given, most weight first; ties by the summed log-probability, never by order.

    weight: of a candidate, by its index. Candidates without an answer do not vote.
    """
    voters = [i for i, candidate in enumerate(candidates) if candidate.answer is not None]
    given = [candidates[i].answer or "" for i in voters]
    classes: dict[int, list[int]] = {}
    for voter, first in zip(voters, task.answers.group(given), strict=True):
        classes.setdefault(first, []).append(voter)
    found = [
        Vote(given[first], sum(weight(i) for i in members), tuple(members))
        for first, members in classes.items()
    ]

    def rank(vote: Vote) -> tuple[float, float]:
        return vote.weight, sum(candidates[i].logprob for i in vote.members)

    return sorted(found, key=rank, reverse=True)


def most_likely(candidates: Sequence[Candidate], members: Sequence[int]) -> int:
    """Of the members the one with the highest mean log-probability; the first of equals."""
    return max(members, key=lambda i: (candidates[i].mean.logprob, -i))


@dataclass(frozen=True, slots=True)
class Majority:
    """The answer that most candidates give, in the words of the likeliest of them (arXiv 2203.11171)."""

    def choose(self, task: Task, candidates: Sequence[Candidate]) -> Run[Result]:
        yield from task.classify(candidate.answer for candidate in candidates)
        result = yield from choose_by_votes(task, candidates, votes(task, candidates))
        return result


@dataclass(frozen=True, slots=True)
@checked
class Weighted:
    """A vote in which a candidate counts by its score (arXiv 2408.03314). Scores below 0 count as 0.

    temperature: votes count exp(score / temperature) instead, for scores that have no natural zero
    """

    scorer: Scorer
    temperature: float | None = None

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, above=0, or_none=True)

    def choose(self, task: Task, candidates: Sequence[Candidate]) -> Run[Result]:
        scored = yield from with_scores(task, candidates, self.scorer)
        scores = [candidate.scores[SCORE] for candidate in scored]
        if self.temperature is None:
            weights = [max(0.0, score) for score in scores]
        else:
            top, scale = max(scores, default=0.0), self.temperature
            weights = [math.exp((score - top) / scale) for score in scores]
        result = yield from choose_by_votes(task, scored, votes(task, scored, weights.__getitem__))
        return result


@dataclass(frozen=True, slots=True)
@checked
class Borda:
    """A vote in which the candidate of rank r of N counts (N - r) ** p, r from 0 by score (arXiv 2502.18581).

    p=0 is the majority; large p is the best candidate's answer.
    """

    scorer: Scorer
    p: float = 0.5

    def __post_init__(self) -> None:
        require_number("p", self.p, 0)

    def choose(self, task: Task, candidates: Sequence[Candidate]) -> Run[Result]:
        scored = yield from with_scores(task, candidates, self.scorer)
        order = sorted(range(len(scored)), key=lambda i: -scored[i].scores[SCORE])
        weights = {i: (len(scored) - rank) ** self.p for rank, i in enumerate(order)}
        result = yield from choose_by_votes(task, scored, votes(task, scored, weights.__getitem__))
        return result


@dataclass(frozen=True, slots=True)
@checked
class Best:
    """The candidate with the highest score, among those with an answer if there are any: best-of-n.

    margin: what the scorer cannot tell apart, for instance its calibration error. Among candidates whose scores lie
    within it below the highest, the answer that most of them give decides. The highest of many scores is otherwise the
    one with the largest error: candidates that agree have nearly equal scores, and any odd one may lie above them.
    """

    scorer: Scorer
    margin: float = 0.0

    def __post_init__(self) -> None:
        require_number("margin", self.margin, 0)

    def choose(self, task: Task, candidates: Sequence[Candidate]) -> Run[Result]:
        scored = yield from with_scores(task, candidates, self.scorer)
        able = [i for i, c in enumerate(scored) if c.answer is not None] or range(len(scored))
        if self.margin:
            least = max(scored[i].scores[SCORE] for i in able) - self.margin
            near = [i for i in able if scored[i].scores[SCORE] >= least]
            yield from task.classify(scored[i].answer for i in near)
            agreed = votes(task, [scored[i] for i in near])
            able = [near[member] for member in agreed[0].members] if agreed else near
        best = max(able, key=lambda i: (scored[i].scores[SCORE], scored[i].mean.logprob, -i))
        yield from task.tell("vote", f"best of {len(scored)}: {scored[best].scores[SCORE]:.3f}")
        return Result(scored[best], tuple(scored))


@dataclass(frozen=True, slots=True)
@checked
class MinimumBayesRisk:
    """The candidate that agrees most with all others: largest mean utility, which takes two texts and is symmetric.

    utility None compares answers, 1 or 0, which is the majority. `token_f1` suits free text.
    """

    utility: Callable[[str, str], float] | None = None

    def choose(self, task: Task, candidates: Sequence[Candidate]) -> Run[Result]:
        if self.utility is None:
            result = yield from Majority().choose(task, candidates)
            return result
        utility, texts = self.utility, [c.content for c in candidates]

        def risks() -> list[float]:
            means = [0.0] * len(texts)
            for i, text in enumerate(texts):
                for j in range(i):
                    value = utility(text, texts[j]) / max(1, len(texts) - 1)
                    means[i] += value
                    means[j] += value
            return means

        means = yield from task.background(risks)
        best = max(range(len(means)), key=lambda i: (means[i], candidates[i].mean.logprob, -i))
        confidence = min(1.0, max(0.0, means[best])) if len(means) > 1 else math.nan
        return Result(candidates[best], tuple(candidates), confidence, details={"utility": means})


@dataclass(frozen=True, slots=True)
@checked
class Shortest:
    """The shortest of the candidates whose answer another selector chooses (Kimi k1.5, arXiv 2501.12599)."""

    by: Select = field(default_factory=Majority)

    def choose(self, task: Task, candidates: Sequence[Candidate]) -> Run[Result]:
        result = yield from self.by.choose(task, candidates)
        answers = [c for c in result.candidates if c.answer is not None]
        if result.answer is None:
            return result
        yield from task.classify(candidate.answer for candidate in answers)
        groups = task.answers.group([result.answer, *(c.answer or "" for c in answers)])
        agreeing = [c for c, group in zip(answers, groups[1:], strict=True) if group == 0]
        shortest = min(agreeing, key=lambda c: (c.num_tokens, -c.mean.logprob))
        return replace(result, candidate=shortest)


def token_f1(a: str, b: str) -> float:
    """Harmonic mean of precision and recall of words, between 0 and 1."""
    for name, text in (("a", a), ("b", b)):
        require_type(name, text, str)
    first, second = Counter(a.split()), Counter(b.split())
    common = (first & second).total()
    total = first.total() + second.total()
    return 2 * common / total if total else 1.0


def with_scores(
    task: Task, candidates: Sequence[Candidate], scorer: Scorer
) -> Run[list[Candidate]]:
    """The candidates with what a scorer says of them as `scores[SCORE]`."""
    yield from task.classify(candidate.answer for candidate in candidates)
    scores = yield from scorer.score(task, candidates)
    for score in scores:
        if not math.isfinite(score):
            raise ValueError(f"{scorer!r} gave the score {score}: scores must be finite")
    return [
        replace(candidate, scores={**candidate.scores, SCORE: score})
        for candidate, score in zip(candidates, scores, strict=True)
    ]


def choose_by_votes(
    task: Task, candidates: Sequence[Candidate], ranking: Sequence[Vote]
) -> Run[Result]:
    """The first of the ranking; without any vote the likeliest candidate, with confidence 0."""
    total = sum(vote.weight for vote in ranking)
    if not ranking:
        best, confidence = most_likely(candidates, range(len(candidates))), 0.0
    else:
        best = most_likely(candidates, ranking[0].members)
        confidence = ranking[0].weight / total if total > 0 else 0.0
    shares = {vote.answer: vote.weight for vote in ranking}
    yield from task.tell("vote", _sentence(ranking, len(candidates)), votes=shares)
    return Result(candidates[best], tuple(candidates), confidence, details={"votes": shares})


def _sentence(ranking: Sequence[Vote], num_candidates: int) -> str:
    if not ranking:
        return f"none of {num_candidates} candidates gives an answer"
    parts = ", ".join(f"{vote.answer}: {vote.weight:g}" for vote in ranking[:5])
    return f"{num_candidates} candidates, votes {parts}{' ...' if len(ranking) > 5 else ''}"
