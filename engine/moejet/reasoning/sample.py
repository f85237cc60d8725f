"""Many answers, of which one is selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.select import Majority, Select
from moejet.reasoning.single import Single
from moejet.reasoning.stopping import StopRule
from moejet.reasoning.task import Run, Strategy, Task
from moejet.validation import checked, require_int


@dataclass(frozen=True, slots=True)
@checked
class Sample:
    """n runs of `inner` (self-consistency, arXiv 2203.11171, with `Majority`); best-of-n with a `Best` as select.

    stop: ends what still runs once it is satisfied · wave: runs at the same time, so that `stop` can save something;
    None: all of them
    """

    n: int = 8
    inner: Strategy = field(default_factory=Single)
    select: Select = field(default_factory=Majority)
    stop: StopRule | None = None
    wave: int | None = None

    def __post_init__(self) -> None:
        require_int("n", self.n, 1)
        require_int("wave", self.wave, 1, or_none=True)

    def run(self, task: Task) -> Run[Result]:
        stop = self.stop
        root = yield from task.open()  # computed once, before the runs fork it
        task.release(root)
        results = yield from task.gather(
            [self._one(task.part(number), number) for number in range(self.n)],
            limit=self.wave,
            stop=None
            if stop is None
            else lambda results: stop.is_enough(_candidates(results), task.answers),
        )
        candidates = _candidates(results)
        if len(candidates) < self.n:
            yield from task.tell("stop", f"{len(candidates)} of {self.n} answers are enough")
        choice = yield from self.select.choose(task, candidates)
        return choice

    def _one(self, task: Task, number: int) -> Run[Result | None]:
        if number and task.is_ending:
            return None
        result = yield from self.inner.run(task)
        answer = result.answer
        yield from task.classify([answer])
        yield from task.tell(
            "candidate", f"answer {number + 1} of {self.n}: {answer}", number=number, answer=answer
        )
        return result


def _candidates(results: Sequence[Result | None]) -> list[Candidate]:
    return [result.candidate for result in results if result is not None]
