"""Random traffic through the engine against every request alone: identical tokens, nothing lost.

Arrivals, lengths, samples, priorities, cancellations, prefix overlaps, pools too small, odd chunk sizes, policies that
replace and inject tokens, grammars, prompts to be scored, steps that fail. Deterministic mode, so equal means equal.
MOEJET_SCHEDULES sets the number of schedules.
"""

import os
import random
from dataclasses import dataclass

import pytest

from moejet import LLM, Grammar, SamplingParams
from moejet.policy import ForceContinuation, Inject, Keep, Replace, Stop, TokenPolicy
from moejet.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_SCHEDULES = int(os.environ.get("MOEJET_SCHEDULES", "200"))
NUM_PROMPTS = 24
MAX_TOKENS = 24
OPEN, CLOSE = 5, 6  # the tags of the tiny checkpoint


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


class Scripted(TokenPolicy):
    """Replaces, injects and stops at places that depend on the tokens alone, so on nothing else in the batch."""

    needs_logits = True

    def on_logits(self, state, row):
        allowed = row > float("-inf")
        allowed[state.num_output_tokens % 256] = False
        return allowed

    def on_token(self, state, token_id):
        match (token_id + state.num_output_tokens) % 11:
            case 0:
                return Replace((token_id // 2, token_id // 3, 7))
            case 1 | 2:
                return Inject(range(3, 4 + token_id % 29))
            case 3 if state.num_output_tokens > 9:
                return Stop("scripted")
        return Keep()

    def on_append(self, state, token_id):
        return Inject((9, 8)) if token_id == 7 and state.num_pending == 0 else None


@dataclass(frozen=True)
class Kind:
    """What a request asks for besides its prompt; thinks: behind an opening tag."""

    options: dict[str, object]
    thinks: bool = False


KINDS = {
    "greedy": Kind({"temperature": 0.0}),
    "sampled": Kind({}),
    "scripted": Kind({"policy": Scripted}),
    "penalised": Kind({"repetition_penalty": 1.5, "policy": Scripted}),
    "budget": Kind({"max_thinking_tokens": 5}, thinks=True),
    "forced": Kind(
        {"policy": lambda: ForceContinuation(2, "Wait, "), "logit_bias": {CLOSE: 30.0}},
        thinks=True,
    ),
    "forced budget": Kind(
        {
            "policy": lambda: ForceContinuation(1, "no, no"),
            "max_thinking_tokens": 9,
            "logit_bias": {CLOSE: 6.0},
        },
        thinks=True,
    ),
    "grammar": Kind({"grammar": Grammar.regex("[a-c]{2,5} (yes|no)")}),
}


def _params(kind: str, prompt: int, max_tokens: int, n: int) -> SamplingParams:
    return SamplingParams(
        seed=prompt, max_tokens=max_tokens, n=n, ignore_eos=True, **KINDS[kind].options
    )


def _tokens(kind: str, prompt: int) -> list[int]:
    return [*PROMPTS[prompt], OPEN] if KINDS[kind].thinks else PROMPTS[prompt]


@pytest.fixture(scope="module")
def alone(path):
    """(prompt, kind) -> the longest answer of each sample, computed with nothing beside it."""
    known: dict[tuple[int, str], list[tuple[int, ...]]] = {}
    with LLM(path, deterministic=True, max_context=128, prefix_caching=False) as llm:

        def get(prompt: int, kind: str) -> list[tuple[int, ...]]:
            key = prompt, kind
            if key not in known:
                params = _params(kind, prompt, MAX_TOKENS, 3)
                result = llm.generate([_tokens(kind, prompt)], params)[0]
                known[key] = [output.token_ids for output in result.outputs]
            return known[key]

        yield get


@pytest.fixture(scope="module")
def scores(path):
    """prompt -> its tokens' log-probabilities, alone."""
    known: dict[int, list[float]] = {}
    with LLM(path, deterministic=True, max_context=128, prefix_caching=False) as llm:

        def get(prompt: int) -> list[float]:
            if prompt not in known:
                known[prompt] = llm.score(PROMPTS[prompt])
            return known[prompt]

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


def _step(engine, rng):
    """One step, which now and then fails for batches of more than a few requests, or at its first attempt."""
    if rng.random() > 0.03:
        return engine.step()
    execute, limit, attempts = engine.runner.execute, rng.randint(1, 3), []

    def fail(batch):
        attempts.append(batch)
        if len(batch.requests) > limit or len(attempts) == 1:
            raise MemoryError("as asked")
        return execute(batch)

    engine.runner.execute = fail
    try:
        return engine.step()
    finally:
        engine.runner.execute = execute


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
def test_random_schedule(seed, engines, alone, scores):
    rng = random.Random(seed)
    engine = engines[seed % len(engines)].engine
    expected: dict[str, list[tuple[int, ...]]] = {}
    expected_scores: dict[str, list[float]] = {}
    got: dict[str, dict[int, list[int]]] = {}
    finished: set[str] = set()
    pending = rng.randint(4, 14)
    steps = 0
    while pending or engine.has_work:
        while pending and rng.random() < 0.4:
            pending -= 1
            prompt, priority = rng.randrange(NUM_PROMPTS), rng.choice([0, 0, 0, -1, 2])
            if len(PROMPTS[prompt]) > 1 and rng.random() < 0.1:
                name = engine.add_scoring(PROMPTS[prompt], priority=priority)
                expected_scores[name] = scores(prompt)
                got[name] = {0: []}
                continue
            kind = rng.choice(["greedy", "sampled", *KINDS])
            n, max_tokens = rng.choice([1, 1, 1, 2, 3]), rng.randint(1, MAX_TOKENS)
            params = _params(kind, prompt, max_tokens, n)
            name = engine.add_request(_tokens(kind, prompt), params, priority=priority)
            answers = alone(prompt, kind)
            expected[name] = [answers[i][:max_tokens] for i in range(n)]
            got[name] = {i: [] for i in range(n)}
        if rng.random() < 0.05 and got:
            name = rng.choice(list(got))
            if name not in finished:
                for delta in engine.abort(name):
                    assert delta.finish_reason == "abort"
                finished.add(name)
                expected.pop(name, None)
                expected_scores.pop(name, None)
        for delta in _step(engine, rng):
            assert delta.error is None
            got[delta.request_id][delta.index] += delta.token_ids
            if delta.output is not None:
                finished.add(delta.request_id)
                if delta.request_id in expected_scores:
                    found = delta.output.prompt_logprobs
                    assert found == pytest.approx(expected_scores[delta.request_id], abs=1e-5)
        engine.scheduler.check_integrity()
        steps += 1
        assert steps < 5000
    assert finished == set(got)
    for name, answers in expected.items():
        assert [tuple(got[name][i]) for i in range(len(answers))] == answers
    assert engine.block_pool.num_free == engine.block_pool.num_blocks


def test_the_kinds_do_what_they_are_for(alone):
    """So that the schedules above cover injected, replaced and constrained tokens, and stops."""
    lengths = {kind: {len(a) for p in range(6) for a in alone(p, kind)} for kind in KINDS}
    assert lengths["greedy"] == lengths["sampled"] == {MAX_TOKENS}
    assert min(lengths["scripted"]) > 9
    assert len(lengths["scripted"]) > 2
    assert min(lengths["grammar"]) < MAX_TOKENS
    for kind in ("budget", "forced budget"):
        assert all(CLOSE in a for p in range(6) for a in alone(p, kind))
    forced = alone(0, "forced")[0]
    assert forced.index(CLOSE) == 12
    assert forced[:6] == forced[6:12]
