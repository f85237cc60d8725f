"""What the tasks of one run have spent together, and what each may still take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from moejet.branch import Branch
from moejet.reasoning.budget import Budget, Deadline
from moejet.reasoning.result import Usage
from moejet.request import FinishReason, SamplingParams


@dataclass(slots=True)
class Ledger:
    """Shared by all tasks of a run.

    held: tokens that branches under way may still take · live: runs that go on at the same time · holding: those of
    them that hold tokens · has_cut: something has ended a branch early · cache_salt: of all their branches
    is_aborted: somebody wants no further token · answers_now: somebody wants no further thought
    """

    budget: Budget
    seed: int
    cache_salt: str | None = None
    usage: Usage = field(default_factory=Usage)
    start_s: float = field(default_factory=time.monotonic)
    held: int = 0
    live: int = 1
    holding: int = 0
    has_cut: bool = False
    is_aborted: bool = False
    answers_now: bool = False
    generating: set[int] = field(default_factory=set)  # numbers of branches

    @property
    def num_left(self) -> int | None:
        """Tokens that nobody has spent or holds."""
        total = self.budget.total_tokens
        return None if total is None else total - self.usage.generated_tokens - self.held

    @property
    def deadline_s(self) -> float | None:
        return None if self.budget.wall_s is None else self.start_s + self.budget.wall_s

    @property
    def is_exhausted(self) -> bool:
        left, deadline = self.num_left, self.deadline_s
        return (
            self.is_aborted
            or (left is not None and left <= 0)
            or (deadline is not None and time.monotonic() >= deadline)
        )

    @property
    def width(self) -> int:
        """How many branches one of the runs may let go on at the same time."""
        most = self.budget.branches
        return sys.maxsize if most is None else max(1, most // self.live)

    @property
    def cut(self) -> tuple[FinishReason, str | None]:
        """Why branches end that may not go on."""
        return ("abort", None) if self.is_aborted else ("length", "budget")

    def limited(self, params: SamplingParams) -> SamplingParams:
        """With the limits on thinking and time."""
        budget = self.budget
        most = [x for x in (params.max_thinking_tokens, budget.thinking_tokens) if x is not None]
        if budget.answer_reserve:
            left = self.num_left
            share = None if left is None else left // self.live
            ends = [x for x in (params.max_tokens, share) if x is not None]
            most += [max(0, min(ends) - budget.answer_reserve)] if ends else []
        if self.answers_now:
            most.append(0)
        changes: dict[str, Any] = {"max_thinking_tokens": min(most)} if most else {}
        deadline = self.deadline_s
        if deadline is not None:
            changes["policy"] = (*params.policies, lambda: Deadline(deadline))
        return replace(params, **changes) if changes else params

    @contextmanager
    def charging(
        self, branches: Sequence[Branch], wanted: Sequence[int | None]
    ) -> Iterator[list[int | None]]:
        """How many tokens each branch may take inside; at the end what they took is counted."""
        shares = self._reserve(wanted)
        before = [_counts(branch) for branch in branches]
        try:
            yield shares
        finally:
            if self.budget.total_tokens is not None:
                self.held -= sum(share or 0 for share in shares)
                self.holding -= 1
            for branch, counts in zip(branches, before, strict=True):
                gained, thoughts, chosen = (
                    a - b for a, b in zip(_counts(branch), counts, strict=True)
                )
                self.usage.generated_tokens += gained
                self.usage.thinking_tokens += thoughts
                self.usage.injected_tokens += gained - chosen
                if gained:
                    self.generating.add(branch.number)
            self.usage.branches = len(self.generating)

    def _reserve(self, wanted: Sequence[int | None]) -> list[int | None]:
        """Tokens that branches may take now, of those that are left: equal shares, and nobody more than it wants."""
        left = self.num_left
        if left is None:
            return list(wanted)
        left //= max(1, self.live - self.holding)
        wants = [left if want is None else want for want in wanted]
        shares = [0] * len(wants)
        order = sorted(range(len(wants)), key=wants.__getitem__)
        for place, i in enumerate(order):
            shares[i] = min(wants[i], left // (len(order) - place))
            left -= shares[i]
        self.held += sum(shares)
        self.holding += 1
        return list(shares)


def _counts(branch: Branch) -> tuple[int, int, int]:
    """Tokens since the prompt, those of thinking, and those that the model chose."""
    return len(branch.token_ids), branch.num_thinking_tokens, branch.statistics.num_tokens
