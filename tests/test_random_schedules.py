"""Random traffic through the engine against every request alone: identical tokens, nothing lost.

Arrivals, lengths, samples, priorities, cancellations, prefix overlaps, pools too small, odd chunk sizes. Deterministic
mode, so equal means equal. MOEJET_SCHEDULES sets the number of schedules.
"""

import os
import random

import pytest

from moejet import LLM, SamplingParams
from moejet.testing.checkpoints import tiny_checkpoint

NUM_SCHEDULES = int(os.environ.get("MOEJET_SCHEDULES", "200"))
NUM_PROMPTS = 24
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("schedules"), "deepseek_v3", num_hidden_layers=2)


def _prompts() -> list[list[int]]:
    rng = random.Random(0)
    trunk = [rng.randrange(10, 250) for _ in range(60)]
    return [
        trunk[: rng.randint(1, 60)] + [rng.randrange(10, 250) for _ in range(rng.choice([0, 1, 9]))]
        for _ in range(NUM_PROMPTS)
    ]


PROMPTS = _prompts()


@pytest.fixture(scope="module")
def alone(path):
    """(prompt, temperature, seed) -> the longest answer of each sample, computed with nothing beside it."""
    known: dict[tuple[int, float], list[tuple[int, ...]]] = {}
    with LLM(path, deterministic=True, max_context=128, prefix_caching=False) as llm:

        def get(prompt: int, temperature: float) -> list[tuple[int, ...]]:
            key = prompt, temperature
            if key not in known:
                params = SamplingParams(
                    temperature=temperature,
                    seed=prompt,
                    n=3,
                    max_tokens=MAX_TOKENS,
                    ignore_eos=True,
                )
                result = llm.generate([PROMPTS[prompt]], params)[0]
                known[key] = [output.token_ids for output in result.outputs]
            return known[key]

        yield get


@pytest.fixture(scope="module")
def engines(path):
    """A few engines with caches of different sizes; they keep what earlier schedules computed."""
    settings = [
        {"block_size": 4, "cache_tokens": 128, "max_batch_tokens": 17, "max_num_requests": 5},
        {"block_size": 8, "cache_tokens": 320, "max_batch_tokens": 64, "max_mixed_tokens": 5},
        {"block_size": 16, "cache_tokens": 2048, "max_batch_tokens": 256, "max_num_requests": 9},
    ]
    llms = [LLM(path, deterministic=True, max_context=128, **options) for options in settings]
    yield llms
    for llm in llms:
        llm.close()


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
def test_random_schedule(seed, engines, alone):
    rng = random.Random(seed)
    engine = engines[seed % len(engines)].engine
    expected: dict[str, list[tuple[int, ...]]] = {}
    got: dict[str, dict[int, list[int]]] = {}
    finished: set[str] = set()
    pending = rng.randint(4, 14)
    steps = 0
    while pending or engine.has_work:
        while pending and rng.random() < 0.4:
            pending -= 1
            prompt, temperature = rng.randrange(NUM_PROMPTS), rng.choice([0.0, 1.0])
            params = SamplingParams(
                temperature=temperature,
                seed=prompt,
                n=rng.choice([1, 1, 1, 2, 3]),
                max_tokens=rng.randint(1, MAX_TOKENS),
                ignore_eos=True,
            )
            name = engine.add_request(
                PROMPTS[prompt], params, priority=rng.choice([0, 0, 0, -1, 2])
            )
            answers = alone(prompt, temperature)
            expected[name] = [answers[i][: params.max_tokens] for i in range(params.n)]
            got[name] = {i: [] for i in range(params.n)}
        if rng.random() < 0.05 and got:
            name = rng.choice(list(got))
            if name not in finished:
                for delta in engine.abort(name):
                    assert delta.finish_reason == "abort"
                finished.add(name)
                del expected[name]
        for delta in engine.step():
            got[delta.request_id][delta.index] += delta.token_ids
            if delta.output is not None:
                finished.add(delta.request_id)
        engine.scheduler.check_integrity()
        steps += 1
        assert steps < 5000
    assert finished == set(got)
    for name, answers in expected.items():
        assert [tuple(got[name][i]) for i in range(len(answers))] == answers
    assert engine.block_pool.num_free == engine.block_pool.num_blocks
