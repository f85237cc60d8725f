"""Answers that are numbers, compared by their spelling."""

import re
from collections.abc import Sequence


class NumberAnswers:
    """The last number of a text; see `moejet.reasoning.task.Answers`."""

    def extract(self, content: str) -> str | None:
        found = re.findall(r"\d+", content)
        return found[-1] if found else None

    def group(self, answers: Sequence[str]) -> list[int]:
        return [answers.index(answer) for answer in answers]
