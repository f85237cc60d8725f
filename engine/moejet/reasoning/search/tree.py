"""The tree that a search has looked at, and how a search ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from moejet.reasoning.result import Candidate, Node, Result
from moejet.reasoning.select import SCORE, votes
from moejet.reasoning.task import Run, Task

Final = Literal["best", "vote"]


class Tree:
    """Nodes by their numbers; number 0 is the prompt."""

    def __init__(self) -> None:
        self._nodes = [Node(0, -1, "", state="kept")]

    def add(self, parent: int, text: str, **values: Any) -> int:
        """The number of a new node."""
        assert 0 <= parent < len(self._nodes), f"{parent=}"
        self._nodes.append(Node(len(self._nodes), parent, text, **values))
        return len(self._nodes) - 1

    def update(self, number: int, **values: Any) -> None:
        self._nodes[number] = replace(self._nodes[number], **values)

    def __getitem__(self, number: int) -> Node:
        return self._nodes[number]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(self._nodes)

    def path(self, number: int) -> list[int]:
        """From the first step to this node."""
        found: list[int] = []
        while number > 0:
            found.append(number)
            number = self._nodes[number].parent
        return found[::-1]

    def tell(self, task: Task, numbers: Sequence[int], message: str) -> Run[None]:
        """Reports what became of nodes, with one message for all of them."""
        for number in numbers:
            yield from task.tell("step", message, node=self._nodes[number])


def vote_weights(scores: Sequence[float]) -> list[float]:
    """What candidates with these scores count in a vote: the score, or its exponential where some are below 0."""
    if min(scores, default=0.0) >= 0:
        return list(scores)
    top = max(scores)
    return [math.exp(score - top) for score in scores]


def conclude(
    task: Task,
    tree: Tree,
    candidates: Sequence[Candidate],
    final: Final,
    weights: Sequence[float] | None = None,
) -> Run[Result]:
    """Chooses by `scores["score"]`: the best candidate with an answer, or the best of the answer with most weight.

    weights: in the vote, `vote_weights` unless given. Confidence is the chosen answer's share of it.
    """
    yield from task.classify(candidate.answer for candidate in candidates)
    scores = [candidate.scores[SCORE] for candidate in candidates]
    weights = vote_weights(scores) if weights is None else weights
    ranking = votes(task, candidates, weights.__getitem__)
    members: Sequence[int] = range(len(candidates))
    if ranking and final == "vote":
        members = ranking[0].members
    elif ranking:
        members = [i for i in members if candidates[i].answer is not None]
    best = max(members, key=lambda i: (scores[i], candidates[i].mean.logprob, -i))
    total = sum(vote.weight for vote in ranking)
    of_best = next((vote.weight for vote in ranking if best in vote.members), 0.0)
    chosen = candidates[best]
    for number in tree.path(chosen.parent):
        tree.update(number, state="chosen")
    shares = {vote.answer: vote.weight for vote in ranking}
    message = f"{chosen.answer}: the {'answer' if final == 'vote' else 'best'} of {len(candidates)}"
    yield from task.tell("vote", message, votes=shares)
    return Result(
        chosen,
        tuple(candidates),
        of_best / total if total > 0 else 0.0,
        nodes=tree.nodes,
        details={"votes": shares},
    )
