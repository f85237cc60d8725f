"""Answering again until rounds agree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moejet.policy import ForceContinuation
from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.single import Single
from moejet.reasoning.task import Run, Strategy, Task
from moejet.request import SamplingParams
from moejet.validation import checked


@dataclass(frozen=True, slots=True)
@checked
class VerifyRounds:
    """Independent rounds until the last `agree` answers are equal, as reported of Step R-mini.

    least, most: rounds · agree: how many equal answers in a row end it. The answer is the last that was agreed on, the
    last of all if there was no agreement; confidence is the share of rounds that gave it.
    """

    least: int = 2
    most: int = 5
    agree: int = 2
    inner: Strategy = field(default_factory=Single)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most or not 1 <= self.agree <= self.most:
            raise ValueError(
                f"least={self.least!r}, agree={self.agree!r} and most={self.most!r}: rounds need 1 <= least <= most "
                "and 1 <= agree <= most"
            )

    def run(self, task: Task) -> Run[Result]:
        candidates: list[Candidate] = []
        chosen: Candidate | None = None
        while len(candidates) < self.most and not (candidates and task.is_ending):
            result = yield from self.inner.run(task)
            candidates.append(result.candidate)
            yield from task.classify([result.answer])
            yield from task.tell(
                "candidate", f"round {len(candidates)}: {result.answer}", answer=result.answer
            )
            if self._agrees(task, candidates):
                chosen = candidates[-1]
                if len(candidates) >= self.least:
                    break
        final = chosen or candidates[-1]
        same = task.answers.count(final.answer, (c.answer for c in candidates))
        return Result(final, tuple(candidates), same / len(candidates))

    def _agrees(self, task: Task, candidates: list[Candidate]) -> bool:
        last = candidates[-self.agree :]
        same = task.answers.count(last[-1].answer, (c.answer for c in last))
        return same == self.agree


@dataclass(frozen=True, slots=True)
@checked
class CheckedOnce:
    """One pass whose thinking is made to go on `times` times before it may answer (s1, arXiv 2501.19393).

    greedy: what follows the first `text` is read at temperature 0, see `ForceContinuation`.
    """

    times: int = 1
    text: str = "Wait"
    greedy: bool = False
    params: SamplingParams | None = None

    def run(self, task: Task) -> Run[Result]:
        params = self.params or task.params

        def force() -> ForceContinuation:
            return ForceContinuation(self.times, self.text, greedy=self.greedy)

        checked = replace(params, policy=(*params.policies, force))
        result = yield from Single(checked).run(task)
        return result
