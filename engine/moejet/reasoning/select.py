"""Choosing among candidates: by votes, scores or likeness. Selectors see candidates only, never a reference answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.task import Run, Task


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
    """The answer that most candidates give, in the words of the likeliest of them."""

    def choose(self, task: Task, candidates: Sequence[Candidate]) -> Run[Result]:
        result = yield from choose_by_votes(task, candidates, votes(task, candidates))
        return result


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
