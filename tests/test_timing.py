"""What the benchmark runs: the right tokens at the right places, and all memory given back."""

from dataclasses import replace

import pytest
import torch

from moejet import LLM, timing
from moejet.presets import PRESETS

SHAPE = replace(PRESETS["deepseek-v2-lite"], num_hidden_layers=2, vocab_size=500, hidden_size=256)


@pytest.fixture(params=["bf16", "fp8"])
def engine(request):
    options = {"max_context": 128, "max_batch_tokens": 16, "cache_tokens": 512}
    with LLM.synthetic(SHAPE, cache_dtype=request.param, **options) as llm:
        # As fp8, all bits set are scales that are NaN.
        llm.engine.runner.latent_cache.fill_(255 if request.param == "fp8" else float("nan"))
        yield llm.engine


@pytest.fixture
def batches(engine, monkeypatch):
    """The batches that were run, and their logits."""
    seen = []
    execute = engine.runner.execute

    def record(batch):
        logits = execute(batch)
        seen.append((batch, logits))
        return logits

    monkeypatch.setattr(engine.runner, "execute", record)
    return seen


def test_prompts_are_read_in_chunks_behind_the_context(engine, batches):
    assert timing.time_prefill(engine, 40, depth=50) > 0
    assert [batch.num_tokens for batch, _ in batches] == [16, 16, 8]
    assert [batch.context_lens for batch, _ in batches] == [[66], [82], [90]]
    for _, logits in batches:
        assert logits.shape == (1, 500)
        # The context was not computed, but it holds numbers.
        assert torch.isfinite(logits).all()
    assert engine.block_pool.num_free == engine.block_pool.num_blocks


@pytest.mark.parametrize("depth", [0, 33, 64])
def test_sequences_are_decoded_together(engine, batches, depth):
    assert timing.time_decode(engine, 3, depth, batch=4) > 0
    assert [batch.query_lens for batch, _ in batches] == [[1] * 4] * 3
    assert [batch.context_lens for batch, _ in batches] == [[depth + i + 1] * 4 for i in range(3)]
    for batch, logits in batches:
        assert logits.shape == (4, 500)
        assert torch.isfinite(logits).all()
        assert len(set(batch.slot_mapping.tolist())) == 4
    # Sequences have tokens and context of their own.
    assert not torch.equal(batches[0][1][0], batches[0][1][1])
    assert engine.block_pool.num_free == engine.block_pool.num_blocks


def test_a_context_beyond_the_cache_is_refused(engine):
    with pytest.raises(ValueError, match="raise cache_tokens"):
        timing.time_decode(engine, 1, 120, batch=5)
    assert engine.block_pool.num_free == engine.block_pool.num_blocks


def test_overhead_is_the_time_outside_the_forward_pass(engine, monkeypatch):
    """Time that the forward pass takes does not count, whatever it is."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    execute, step = engine.runner.execute, engine.step

    def slow_execute(batch):
        logits = execute(batch)
        clock[0] += 5.0
        engine.runner.native_seconds += 5.0
        return logits

    def slow_step():
        clock[0] += 0.5
        return step()

    monkeypatch.setattr(engine.runner, "execute", slow_execute)
    monkeypatch.setattr(engine, "step", slow_step)
    assert timing.step_overhead(engine, batch=1) == pytest.approx(0.5)
    assert timing.step_overhead(engine, batch=2) == pytest.approx(0.25)
    assert not engine.has_work


def test_native_time_is_counted(engine):
    before = engine.runner.native_seconds
    assert timing.step_overhead(engine, batch=1) > 0
    assert engine.runner.native_seconds > before
