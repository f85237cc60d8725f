"""Candidates that a second model arrives at as well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from moejet.llm import LLM
from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.select import SCORE, votes
from moejet.reasoning.task import Run, Strategy, Task
from moejet.request import SamplingParams
from moejet.validation import checked, require_number

AGREEMENT = "agreement"


@dataclass(frozen=True, slots=True)
@checked
class MutualCheck:
    """rStar's discriminator (arXiv 2408.06195): a second model completes beginnings of each candidate's reasoning.

    masks: the shares of words that it is given · need: the share of completions that must give the candidate's answer
    for it to be kept · second: None for the same model with other seeds · params: of the second, temperature 1 unless
    given. Of the kept answers the one with the largest sum of its share (of rewards where the search gave some, else of
    votes) and its agreement is chosen; if none is kept, of all. Neither model sees a reference answer.
    """

    inner: Strategy
    second: LLM | None = None
    masks: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5)
    need: float = 0.5
    params: SamplingParams | None = None

    def __post_init__(self) -> None:
        if not self.masks or not all(0 <= mask < 1 for mask in self.masks):
            raise ValueError(f"masks={self.masks!r} must hold shares of at least 0 and below 1")
        require_number("need", self.need, 0, 1)

    def run(self, task: Task) -> Run[Result]:
        result = yield from self.inner.run(task)
        able = [c for c in result.candidates if c.answer is not None]
        if not able or task.is_ending:
            return result
        other = yield from task.on(llm=self.second, params=self.params or SamplingParams())
        prefixes = [_beginning(candidate, mask) for candidate in able for mask in self.masks]
        distinct = list(dict.fromkeys(prefixes))
        completed = yield from _complete(other, distinct)
        yield from task.classify([*(candidate.answer for candidate in able), *completed])
        answers = dict(zip(distinct, completed, strict=True))
        checked = []
        for number, candidate in enumerate(able):
            begin = number * len(self.masks)
            given = [answers[p] for p in prefixes[begin : begin + len(self.masks)]]
            agreement = task.answers.count(candidate.answer, given) / len(given)
            checked.append(replace(candidate, scores={**candidate.scores, AGREEMENT: agreement}))
        kept = [c for c in checked if c.scores[AGREEMENT] >= self.need]
        message = f"{len(kept)} of {len(checked)} candidates are confirmed"
        yield from task.tell("note", message, kept=len(kept))
        best, agreement = _choose(task, kept or checked)
        details = {**result.details, "kept": [c in kept for c in checked]}
        return replace(
            result,
            candidate=best,
            candidates=tuple(checked),
            confidence=agreement,
            details=details,
        )


def _beginning(candidate: Candidate, share: float) -> str:
    """That share of the words of the reasoning, or of the answer where there is none; at least one."""
    trace = candidate.reasoning or candidate.content
    words = re.findall(r"\s*\S+\s*", trace)
    # A space belongs to the word behind it, which the second model shall choose.
    return "".join(words[: max(1, round(share * len(words)))]).rstrip(" ")


def _complete(other: Task, prefixes: Sequence[str]) -> Run[list[str | None]]:
    """The answers at which the second model arrives; one that it was given does not count as its own."""
    encode = partial(other.tokenizer.encode, add_special_tokens=False)
    tokens = yield from other.background(lambda: [encode(prefix) for prefix in prefixes])
    branches = yield from other.open(len(prefixes))
    for branch, ids in zip(branches, tokens, strict=True):
        if ids:
            other.append(branch, ids)
    segments = yield from other.complete(branches)
    answers: list[str | None] = []
    for branch, segment in zip(branches, segments, strict=True):
        if branch.is_thinking:
            answers.append(None)
        else:
            own = segment.text if branch.reasoning is None else branch.content
            answers.append(other.answers.extract(own))
    other.close()
    return answers


def _choose(task: Task, candidates: Sequence[Candidate]) -> tuple[Candidate, float]:
    """The best of the answer with the largest sum of share and agreement, and that agreement."""
    rewards = [max(0.0, candidate.scores.get(SCORE, 1.0)) for candidate in candidates]
    if not any(rewards):
        rewards = [1.0] * len(candidates)
    ranking = votes(task, candidates, rewards.__getitem__)
    total = sum(rewards)

    def agreement(members: Sequence[int]) -> float:
        return sum(candidates[i].scores[AGREEMENT] for i in members) / len(members)

    first = max(ranking, key=lambda vote: vote.weight / total + agreement(vote.members))
    best = max(
        first.members,
        key=lambda i: (rewards[i], candidates[i].scores[AGREEMENT], candidates[i].mean.logprob),
    )
    return candidates[best], agreement(first.members)
