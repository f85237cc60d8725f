"""Parallel thinking filtered by confidence (DeepConf, arXiv 2508.15260).

A token's confidence is -mean(log p) of the 20 likeliest tokens, high where the distribution is peaked. A trace's is the
lowest mean over `window` tokens in a row. Online, a few traces set a bar, and later ones are stopped once their window
falls below it; offline, all are finished and the worst are left out of the vote. Votes count by confidence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from moejet.policy import Action, Keep, Stop, TokenPolicy
from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.select import choose_by_votes, votes
from moejet.reasoning.stopping import BetaStop, StopRule
from moejet.reasoning.task import Run, Task, with_policy
from moejet.sample_state import SampleState
from moejet.validation import checked, require_int, require_number

LOWEST, TAIL = "lowest_group_confidence", "tail_confidence"
STOPPED = "low confidence"


class ConfidenceWindow(TokenPolicy):
    """Follows the mean confidence of the last `window` tokens; below `bar` it stops the sample."""

    needs_statistics = True

    def __init__(self, window: int, bar: float | None = None):
        self.window, self.bar = window, bar
        self.lowest = float("inf")
        self._values: deque[float] = deque(maxlen=window)
        self._sum = 0.0

    @property
    def tail(self) -> float:
        """Mean of the last window, or of all if there were fewer tokens."""
        return self._sum / max(1, len(self._values))

    def on_token(self, state: SampleState, token_id: int) -> Action:
        assert state.last is not None
        if len(self._values) == self.window:
            self._sum -= self._values[0]
        self._values.append(state.last.confidence)
        self._sum += state.last.confidence
        if len(self._values) < self.window:
            return Keep()
        self.lowest = min(self.lowest, self.tail)
        return Stop(STOPPED) if self.bar is not None and self.tail < self.bar else Keep()


@dataclass(frozen=True, slots=True)
@checked
class DeepConf:
    """total traces at most, of which `warmup` set the bar.

    keep: share of traces that stay above the bar, or in the vote · window: tokens · mode: "online" stops traces that
    fall below the bar, and sampling once `stop` holds; "offline" finishes all · wave: traces at once after the warm-up
    """

    warmup: int = 16
    total: int = 64
    keep: float = 0.9
    window: int = 2048
    mode: Literal["online", "offline"] = "online"
    wave: int = 16
    stop: StopRule | None = field(default_factory=BetaStop)

    def __post_init__(self) -> None:
        for name in ("warmup", "window", "wave"):
            require_int(name, getattr(self, name), 1)
        if self.total < self.warmup:
            raise ValueError(f"total={self.total!r} must be at least warmup={self.warmup!r}")
        require_number("keep", self.keep, above=0, high=1)

    def run(self, task: Task) -> Run[Result]:
        is_online = self.mode == "online"
        count = self.warmup if is_online else self.total
        candidates = yield from self._trace(task, count, None)
        bar = float(np.quantile([c.scores[LOWEST] for c in candidates], 1 - self.keep))
        while is_online and len(candidates) < self.total and not task.is_ending:
            finished = [c for c in candidates if c.stop_reason != STOPPED]
            if self.stop is not None and self.stop.is_enough(finished, task.answers):
                yield from task.tell("stop", f"{len(candidates)} traces are enough")
                break
            wave = min(self.wave, self.total - len(candidates))
            candidates += yield from self._trace(task, wave, bar)
        voters = [c for c in candidates if c.scores[LOWEST] >= bar and c.stop_reason != STOPPED]
        voters = voters or candidates
        weight = _weights(voters)
        result = yield from choose_by_votes(task, voters, votes(task, voters, weight.__getitem__))
        return replace(
            result,
            candidates=tuple(candidates),
            details={**result.details, "bar": bar, "num_voters": len(voters)},
        )

    def _trace(self, task: Task, count: int, bar: float | None) -> Run[list[Candidate]]:
        branches = yield from task.open(count)
        windows = [ConfidenceWindow(self.window, bar) for _ in branches]
        params = task.params
        runs = [
            task.advance([branch], params=with_policy(params, window))
            for branch, window in zip(branches, windows, strict=True)
        ]
        segments = yield from task.gather(runs)
        candidates = []
        for branch, window, gained in zip(branches, windows, segments, strict=True):
            assert gained is not None
            lowest = window.tail if window.lowest == float("inf") else window.lowest
            scores = {LOWEST: lowest, TAIL: window.tail}
            candidates.append(task.candidate(branch, gained[0], scores=scores))
        task.release(branches)
        yield from task.classify(candidate.answer for candidate in candidates)
        return candidates


def _weights(candidates: Sequence[Candidate]) -> list[float]:
    return [max(0.0, candidate.scores[LOWEST]) for candidate in candidates]
