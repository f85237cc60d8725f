"""Batches that cannot be computed as a whole: who is to blame, what the others get, and how many attempts it takes."""

import math
import random

import pytest

from moejet import LLM, SamplingParams
from moejet.batch import Batch
from moejet.isolation import compute_apart
from moejet.output import OutputAssembler
from moejet.policy import Keep, TokenPolicy
from moejet.request import Request
from moejet.testing.checkpoints import tiny_checkpoint

SIZE = 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", num_hidden_layers=2)


def _batch(num_requests: int) -> Batch:
    requests = []
    for i in range(num_requests):
        tokens = tuple(range(100 * i, 100 * i + 1 + i % 7))
        request = Request(str(i), 0, tokens, SamplingParams(), 0, 64, frozenset())
        request.block_table = [2 * i, 2 * i + 1]
        requests.append(request)
    return Batch.build(requests, [len(r.token_ids) for r in requests], block_size=SIZE)


@pytest.mark.parametrize("num_requests", [1, 2, 3, 16, 37])
@pytest.mark.parametrize("num_culprits", [0, 1, 3, 37])
def test_culprits_are_found_and_the_rest_is_computed(num_requests, num_culprits):
    rng = random.Random(num_requests)
    batch = _batch(num_requests)
    bad = set(rng.sample(batch.requests, min(num_culprits, num_requests)))
    copies = batch.block_copies = [(0, 1)]
    attempts = 0

    def compute(part: Batch) -> Batch:
        nonlocal attempts
        attempts += 1
        assert part.block_copies is copies
        if found := bad & set(part.requests):
            raise ValueError(min(r.request_id for r in found))
        return part

    parts, culprits = compute_apart(batch, compute, block_size=SIZE)
    assert set(culprits) == bad
    assert all(str(error) == request.request_id for request, error in culprits.items())
    computed = [r for part in parts for r in part.requests]
    assert set(computed) == set(batch.requests) - bad
    assert len(computed) == len(set(computed))
    assert sum(part.num_tokens for part in parts) == sum(len(r.token_ids) for r in computed)
    assert attempts <= 2 * max(1, len(bad)) * max(1, math.ceil(math.log2(num_requests)))
    assert attempts < 2 * num_requests


def test_batches_that_are_too_large_are_computed_in_parts():
    batch = _batch(24)

    def compute(part: Batch) -> int:
        if part.num_tokens > 20:
            raise MemoryError
        return part.num_tokens

    parts, culprits = compute_apart(batch, compute, block_size=SIZE)
    assert sum(parts) == batch.num_tokens
    assert not culprits


def test_llm_raises_to_who_asked_and_streams_go_on(path):
    with LLM(path, max_context=128, block_size=8, deterministic=True) as llm:
        expected = llm.generate([[5, 6, 7], [8] * 30], GREEDY)
        execute = llm.engine.runner.execute

        def poisoned(batch):
            if 200 in batch.token_ids.tolist():
                raise MemoryError("a poisonous token")
            return execute(batch)

        llm.engine.runner.execute = poisoned
        stream = llm.stream([5, 6, 7], GREEDY)
        tokens = list(next(stream).token_ids)
        with pytest.raises(MemoryError, match="a poisonous token"):
            llm.generate([[8] * 30, [9] * 20 + [200]], GREEDY)
        assert not llm.engine.scheduler.waiting
        for delta in stream:
            tokens += delta.token_ids
        assert tuple(tokens) == expected[0].outputs[0].token_ids
        again = llm.generate([[8] * 30], GREEDY)[0]
        assert again.outputs[0].token_ids == expected[1].outputs[0].token_ids
        assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks


def test_llm_raises_if_nothing_works_and_can_be_used_when_it_does_again(path):
    with LLM(path, max_context=128, block_size=8, deterministic=True) as llm:
        expected = llm.generate([[5, 6, 7]], GREEDY)[0].outputs
        execute = llm.engine.runner.execute
        attempts = []

        def broken(batch):
            attempts.append(batch)
            raise OSError("the card is gone")

        llm.engine.runner.execute = broken
        with pytest.raises(OSError, match="the card is gone"):
            llm.generate([[5 + i] * 9 for i in range(20)], GREEDY)
        assert len(attempts) == 2  # the step and the probe
        llm.engine.scheduler.check_integrity()
        assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks
        llm.engine.runner.execute = execute
        assert llm.generate([[5, 6, 7]], GREEDY)[0].outputs == expected


def test_a_full_cache_does_not_look_like_a_dead_engine(path):
    """The probe needs a block; without one, whoever cannot be computed is found all the same."""
    options = {"max_context": 64, "cache_tokens": 64, "block_size": 16, "deterministic": True}
    with LLM(path, **options) as llm:
        prompts = [[10 + i] * 15 for i in range(4)]
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        expected = [r.outputs[0].token_ids for r in llm.generate(prompts, params)]
        execute = llm.engine.runner.execute

        def poisoned(batch):
            assert llm.engine.block_pool.num_free == 0
            if 12 in batch.token_ids.tolist():
                raise ArithmeticError("a poisonous token")
            return execute(batch)

        llm.engine.runner.execute = poisoned
        names = [llm.engine.add_request(prompt, params) for prompt in prompts]
        got = dict.fromkeys(names, ())
        deltas = llm.engine.step()
        llm.engine.runner.execute = execute
        deltas += llm.engine.step()
        for delta in deltas:
            got[delta.request_id] += delta.token_ids
        failed = [delta for delta in deltas if delta.error is not None]
        assert [delta.request_id for delta in failed] == [names[2]]
        assert failed[0].is_step_error
        assert isinstance(failed[0].error, ArithmeticError)
        del got[names[2]], expected[2]
        assert list(got.values()) == expected


def test_forks_get_their_copies_when_the_first_attempt_fails(path):
    """A step that copies blocks and fails: the parts make the copies before they compute."""
    options = {"max_context": 128, "block_size": 8, "deterministic": True}
    params = SamplingParams(temperature=1.0, seed=3, n=5, max_tokens=12, ignore_eos=True)
    with LLM(path, **options) as llm:
        expected = llm.generate([[5] * 13], params)[0].outputs
    with LLM(path, **options) as llm:
        execute = llm.engine.runner.execute
        num_failed = 0

        def picky(batch):
            nonlocal num_failed
            if len(batch.requests) > 2:
                num_failed += 1
                raise MemoryError
            return execute(batch)

        llm.engine.runner.execute = picky
        assert llm.generate([[5] * 13], params)[0].outputs == expected
        assert num_failed > 11


def test_a_policy_that_fails_in_one_part_ends_its_samples_in_the_others(path):
    class Mistaken(TokenPolicy):
        def on_token(self, state, token_id):
            if state.index == 3 and state.num_output_tokens == 3:
                raise LookupError("a mistake")
            return Keep()

    with LLM(path, max_context=128, block_size=8, deterministic=True) as llm:
        expected = llm.generate([[5] * 9], GREEDY)[0].outputs[0].token_ids
        execute = llm.engine.runner.execute

        def picky(batch):
            if len(batch.requests) > 1:
                raise MemoryError
            return execute(batch)

        llm.engine.runner.execute = picky
        params = SamplingParams(n=4, max_tokens=9, ignore_eos=True, policy=Mistaken)
        bad = llm.engine.add_request([6] * 9, params)
        good = llm.engine.add_request([5] * 9, GREEDY)
        tokens, errors = [], []
        while llm.engine.has_work:
            for delta in llm.engine.step():
                if delta.request_id == good:
                    tokens += delta.token_ids
                elif delta.error is not None:
                    errors.append((delta.request_id, str(delta.error), delta.is_step_error))
        assert tuple(tokens) == expected
        assert errors == [(bad, "a mistake", False)] * 4
        assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks


def test_the_probe_makes_copies_that_are_due(path):
    """Its block may be the source of a copy; made late, the copy would hold the probe's latents."""
    with LLM(path, max_context=128, block_size=8, deterministic=True) as llm:
        engine = llm.engine
        engine.runner.latent_cache.zero_()
        source, target = engine.block_pool._unused[-1], engine.block_pool._unused[0]
        engine.runner.latent_cache[:, source] = 1
        engine.scheduler.copies.append((source, target))
        engine.probe()
        assert engine.scheduler.copies == []
        assert bool((engine.runner.latent_cache[:, target] == 1).all())
        assert not bool((engine.runner.latent_cache[:, source] == 1).all())


def test_a_broken_text_does_not_keep_a_failed_request_alive(path, monkeypatch):
    with LLM(path, max_context=128, block_size=8, deterministic=True) as llm:
        expected = llm.generate([[5] * 9], GREEDY)[0].outputs[0].token_ids
        execute = llm.engine.runner.execute

        def poisoned(batch):
            if 200 in batch.token_ids.tolist():
                raise ArithmeticError("a poisonous token")
            return execute(batch)

        def broken(self):
            raise IndexError("no such character")

        llm.engine.runner.execute = poisoned
        monkeypatch.setattr(OutputAssembler, "flush", broken)
        bad = llm.engine.add_request([200] * 9, GREEDY)
        good = llm.engine.add_request([5] * 9, GREEDY)
        deltas = {bad: [], good: []}
        for _ in range(7):
            for delta in llm.engine.step():
                deltas[delta.request_id].append(delta)
        assert [str(delta.error) for delta in deltas[bad]] == ["a poisonous token"]
        assert deltas[bad][0].is_step_error
        assert deltas[bad][0].output is not None
        assert tuple(t for delta in deltas[good] for t in delta.token_ids) == expected[:7]
        monkeypatch.undo()
        llm.engine.abort(good)
        assert not llm.engine._groups
