"""One pass of the model."""

from __future__ import annotations

from dataclasses import dataclass

from moejet.reasoning.result import Result
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams
from moejet.validation import checked


@dataclass(frozen=True, slots=True)
@checked
class Single:
    """The model's answer as it comes. params: instead of the task's."""

    params: SamplingParams | None = None

    def run(self, task: Task) -> Run[Result]:
        [branch] = yield from task.open()
        [segment] = yield from task.complete([branch], params=self.params)
        candidate = task.candidate(branch, segment)
        task.release([branch])
        return Result(candidate, (candidate,))
