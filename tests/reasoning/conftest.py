"""What the tests of strategies share."""

import re
from collections.abc import Iterator, Sequence

import pytest

from moejet import LLM


class Numbers:
    """The last number of a text."""

    def extract(self, content: str) -> str | None:
        found = re.findall(r"\d+", content)
        return found[-1] if found else None

    def group(self, answers: Sequence[str]) -> list[int]:
        return [answers.index(answer) for answer in answers]


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


@pytest.fixture(scope="package")
def llm() -> Iterator[LLM]:
    """The embedded tiny reasoner."""
    with LLM(num_threads=1) as llm:
        yield llm
