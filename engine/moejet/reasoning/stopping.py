"""When enough answers have come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moejet.reasoning.answer_classes import Answers
from moejet.reasoning.result import Candidate
from moejet.validation import checked, require_number


@runtime_checkable
class StopRule(Protocol):
    """When no more answers are needed."""

    def is_enough(self, candidates: Sequence[Candidate], answers: Answers) -> bool:
        """candidates: complete so far, in the order in which they were begun."""


def beta_confidence(first: int, second: int) -> float:
    """Probability that the answer with `first` votes is more frequent than the one with `second`, from a flat prior.

    It is 1 - I(1/2; first + 1, second + 1), the regularised incomplete beta function, which for whole numbers is the
    sum of a binomial distribution: P(Bin(first + second + 1, 1/2) <= first).
    """
    n = first + second + 1
    return float(sum(math.comb(n, k) for k in range(first + 1)) / 2**n)


@dataclass(frozen=True, slots=True)
@checked
class BetaStop:
    """Stops once the leading answer is ahead of the next with this probability (Adaptive-Consistency, 2305.11860).

    At 0.95 four answers are enough if they are equal.
    """

    confidence: float = 0.95
    least: int = 2

    def __post_init__(self) -> None:
        require_number("confidence", self.confidence, 0.5, below=1)

    def is_enough(self, candidates: Sequence[Candidate], answers: Answers) -> bool:
        if len(candidates) < self.least:
            return False
        first, second = leading_counts(candidates, answers)
        return first > 0 and beta_confidence(first, second) >= self.confidence


@dataclass(frozen=True, slots=True)
@checked
class Unanimous:
    """Stops once one answer has `count` votes and no other has any."""

    count: int = 4

    def is_enough(self, candidates: Sequence[Candidate], answers: Answers) -> bool:
        first, second = leading_counts(candidates, answers)
        return first >= self.count and second == 0


@dataclass(frozen=True, slots=True)
@checked
class Decided:
    """Stops once those of `total` that are still to come cannot change who leads."""

    total: int

    def is_enough(self, candidates: Sequence[Candidate], answers: Answers) -> bool:
        first, second = leading_counts(candidates, answers)
        return first - second > self.total - len(candidates)


def leading_counts(candidates: Sequence[Candidate], answers: Answers) -> tuple[int, int]:
    """Votes of the two answers that have most."""
    given = [c.answer for c in candidates if c.answer is not None]
    counts = [count for _, count in Counter(answers.group(given)).most_common(2)]
    return (*counts, 0, 0)[:2]  # type: ignore[return-value]
