"""How answers are found and compared, and what is known of which are equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Answers(Protocol):
    """How answers are found in a text and compared."""

    def extract(self, content: str) -> str | None:
        """The answer that a finished text gives, None if it gives none."""

    def group(self, answers: Sequence[str]) -> list[int]:
        """For each answer the index of the first one that is equal to it."""


class KnownAnswers:
    """Answers that remembers which ones are equal: comparing may take a proof, and an engine waits for nobody.

    `Task.classify` finds it out in the background; what it has seen is grouped at once.
    """

    def __init__(self, answers: Answers):
        self.answers = answers
        self.classes: dict[
            str, str
        ] = {}  # each answer and the one that stands for all that equal it

    def extract(self, content: str) -> str | None:
        return self.answers.extract(content)

    def group(self, answers: Sequence[str]) -> list[int]:
        if not all(answer in self.classes for answer in answers):
            return self.answers.group(answers)
        classes = [self.classes[answer] for answer in answers]
        return [classes.index(name) for name in classes]

    def count(self, answer: str | None, others: Iterable[str | None]) -> int:
        """How many of the others are equal to an answer."""
        if answer is None:
            return 0
        return self.group([answer, *(other for other in others if other is not None)])[1:].count(0)
