"""A method by difficulty."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moejet.reasoning.result import Result
from moejet.reasoning.sample import Sample
from moejet.reasoning.select import Select
from moejet.reasoning.task import Run, Strategy, Task
from moejet.validation import checked, require_number


@dataclass(frozen=True, slots=True, kw_only=True)
@checked
class Adaptive:
    """A few answers tell how hard a problem is, and so which method it gets (compute-optimal, arXiv 2408.03314).

    probe: its confidence, the share of the commonest answer, measures the difficulty · easy: from `threshold` on; None:
    the probe's answer stands · hard: otherwise, and where the probe knows no confidence · merge: chooses among the
    probe's candidates and the new ones; None: a `Sample` votes over both, and of another strategy its own choice stands
    Nest one in `hard` or `easy` for more levels.
    """

    hard: Strategy
    easy: Strategy | None = None
    probe: Strategy = field(default_factory=lambda: Sample(4))
    threshold: float = 0.75
    merge: Select | None = None

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold, 0, 1)

    def run(self, task: Task) -> Run[Result]:
        probe = yield from self.probe.run(task)
        is_easy = probe.confidence >= self.threshold
        strategy = self.easy if is_easy else self.hard
        level = "easy" if is_easy else "hard"
        message = f"{level}: the probe's confidence is {probe.confidence:.2f}"
        yield from task.tell("note", message, confidence=probe.confidence)
        details = {"level": level, "probe": probe.confidence}
        if strategy is None or task.is_ending:
            return replace(probe, details={**probe.details, **details})
        result = yield from strategy.run(task)
        # Numbers of tree nodes mean something in one tree only.
        others = [replace(candidate, parent=-1) for candidate in probe.candidates]
        candidates = (*others, *result.candidates)
        merge = self.merge or (strategy.select if isinstance(strategy, Sample) else None)
        if merge is not None:
            chosen = yield from merge.choose(task, candidates)
            result = replace(chosen, nodes=result.nodes)
        return replace(result, candidates=candidates, details={**result.details, **details})
