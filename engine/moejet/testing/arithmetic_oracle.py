"""A verifier that knows the task of the tiny reasoner: for showing what a search can gain at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moejet.branch import Branch
from moejet.reasoning.task import Run, Task
from moejet.testing import arithmetic


@dataclass(frozen=True, slots=True)
class StepOracle:
    """1 where the answer is right, or, before there is one, plan and steps so far; else 0.

    A wrong line that a later check has repaired counts as right.
    """

    problem: arithmetic.Problem

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        return [float(self.is_right(branch)) for branch in branches]
        yield  # a generator like the others

    def is_right(self, branch: Branch) -> bool:
        if branch.is_finished:
            return arithmetic.extract_answer(branch.text) == self.problem.answer
        # The last one is not complete yet, or empty before the closing tag.
        lines = branch.text.partition("</think>")[0].split("\n")[:-1]
        if lines and lines[0] != arithmetic.plan_line(self.problem):
            return False
        values = {
            check.label: check.correct
            for check in arithmetic.check_steps("\n".join(lines), self.problem)
            if check.kind == "step"
        }
        return all(values.values())
