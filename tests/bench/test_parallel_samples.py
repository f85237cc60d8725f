"""What `bench/parallel_samples.py` counts, on the embedded model."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from moejet import LLM

BENCH = Path(__file__).parents[2] / "bench/parallel_samples.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parallel_samples", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_counts_of_common_steps(bench: ModuleType) -> None:
    prompt = list(range(5, 20))
    with LLM(num_threads=1, prefix_caching=False) as llm:
        one, many = (bench.take_turn(llm, prompt, n, 12, seed=1) for n in (1, 6))
        rows = [bench.summary(llm, n, [turn]) for n, turn in ((1, one), (6, many))]
        model = llm.model_config
    # The prompt's step is left out, and with it the first token.
    assert (one.steps, one.positions) == (12, 12)
    assert many.positions - 12 * 6 <= 6
    assert many.steps <= 13
    assert rows[0]["distinct_experts"] == model.num_experts_per_tok
    assert model.num_experts_per_tok <= rows[1]["distinct_experts"] <= model.num_experts
    assert rows[0]["distinct_expected"] == model.num_experts_per_tok
    assert one.expert_bytes < many.expert_bytes < 6 * one.expert_bytes
