"""What the tests of strategies share."""

from collections.abc import Iterator

import pytest

from moejet import LLM


@pytest.fixture(scope="package")
def llm() -> Iterator[LLM]:
    """The embedded tiny reasoner."""
    with LLM(num_threads=1) as llm:
        yield llm
