"""One tiny model, its greedy answers, and engines that are closed after the test."""

import asyncio

import pytest
import torch

from moejet import LLM, AsyncLLM
from moejet.testing.async_engine import OPTIONS, PROMPTS, SHORT
from moejet.testing.checkpoints import tiny_checkpoint


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def expected(path):
    """Greedy answers, by prompt."""
    with LLM(path, **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, SHORT)
        return {p: o.outputs[0].token_ids for p, o in zip(PROMPTS, outputs, strict=True)}


@pytest.fixture
def make(path):
    """AsyncLLMs that are closed after the test."""
    made = []

    def create(**options):
        made.append(AsyncLLM(path, **{**OPTIONS, **options}))
        return made[-1]

    yield create
    for llm in made:
        asyncio.run(llm.close(drain=False))
