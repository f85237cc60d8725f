"""Saved conversations: their next turn computes only what is new; files that do not fit are refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moejet import LLM, SamplingParams
from moejet.testing.checkpoints import tiny_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS = {"deterministic": True, "block_size": 8, "max_context": 512, "cache_tokens": 1024}
IDS = [10 + i * i % 230 for i in range(203)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sessions"), "deepseek_v3")


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "session"
    with LLM(model, **OPTIONS) as llm:
        session = llm.save_session(path, IDS)
    assert (session.token_ids, session.messages, session.num_cached_tokens) == (
        tuple(IDS),
        None,
        200,
    )
    return path


def test_the_next_turn_computes_what_is_new(model: Path, saved: Path) -> None:
    turn = [*IDS, 33, 44, 55]
    with LLM(model, **OPTIONS, prefix_caching=False) as llm:
        [expected] = llm.generate([turn], GREEDY)
    with LLM(model, **OPTIONS) as llm:
        assert llm.load_session(saved).num_cached_tokens == 200
        [result] = llm.generate([turn], GREEDY)
        assert result.timings.cached_tokens == 200
        assert result.outputs[0].token_ids == expected.outputs[0].token_ids
        # Loading what is there already changes nothing.
        evictions = llm.engine.block_pool.num_evictions
        llm.load_session(saved)
        llm.engine.scheduler.check_integrity()
        assert llm.engine.block_pool.num_evictions == evictions


def test_messages_come_back(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Start with 17, add 25."}]
    with LLM(deterministic=True, block_size=8) as llm:
        [result] = llm.chat([messages], SamplingParams(temperature=0.0, max_tokens=400))
        messages.append({"role": "assistant", "content": result.outputs[0].content})
        llm.save_session(tmp_path / "chat", messages)
        turn = [*messages, {"role": "user", "content": "Now add 4."}]
        [expected] = llm.chat([turn], SamplingParams(temperature=0.0, max_tokens=50))
    with LLM(deterministic=True, block_size=8) as llm:
        session = llm.load_session(tmp_path / "chat")
        assert session.messages == tuple(messages)
        turn = [*session.messages, {"role": "user", "content": "Now add 4."}]
        [result] = llm.chat([turn], SamplingParams(temperature=0.0, max_tokens=50))
        assert result.outputs[0].token_ids == expected.outputs[0].token_ids
        assert result.timings.cached_tokens == session.num_cached_tokens > 0


@pytest.mark.parametrize("at", [3, 20, 60, 0.5, 0.99])
def test_damaged_sessions_are_refused(at: float, model: Path, saved: Path, tmp_path: Path) -> None:
    raw = bytearray(saved.read_bytes())
    raw[at if isinstance(at, int) else int(at * len(raw))] ^= 1
    (tmp_path / "s").write_bytes(raw)
    with LLM(model, **OPTIONS) as llm:
        with pytest.raises(ValueError, match=r"cannot be used: .*(damaged|complete|claims)"):
            llm.load_session(tmp_path / "s")
        llm.engine.scheduler.check_integrity()
        # Nothing of what is damaged can be found; blocks before it are sound.
        [result] = llm.generate([IDS], GREEDY)
        [expected] = llm.generate([IDS], GREEDY)
        assert result.outputs[0].token_ids == expected.outputs[0].token_ids
        assert result.timings.cached_tokens < 200
    (tmp_path / "s").write_bytes(raw[:-1])
    with LLM(model, **OPTIONS) as llm, pytest.raises(ValueError, match="cannot be used"):
        llm.load_session(tmp_path / "s")


def test_a_cache_that_is_too_small(model: Path, saved: Path) -> None:
    with LLM(model, **{**OPTIONS, "max_context": 64, "cache_tokens": 64}) as llm:
        with pytest.raises(ValueError, match="its 200 tokens do not fit into the cache"):
            llm.load_session(saved)
        llm.engine.scheduler.check_integrity()
        assert llm.engine.block_pool.num_free == 8


def test_places_that_cannot_be_written_or_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with LLM(model, **OPTIONS) as llm:
        with pytest.raises(ValueError, match="cannot be read, No such file"):
            llm.load_session(tmp_path / "missing")
        with pytest.raises(ValueError, match="cannot be saved there, No such file"):
            llm.save_session(tmp_path / "missing" / "s", IDS)
        llm.save_session(tmp_path / "s", IDS)
        before = (tmp_path / "s").read_bytes()
        monkeypatch.setattr(os, "pwrite", refuse)
        with pytest.raises(ValueError, match="no room on the disk"):
            llm.save_session(tmp_path / "s", IDS[:100])
        assert (tmp_path / "s").read_bytes() == before
        assert [f.name for f in tmp_path.iterdir()] == ["s"]
        with pytest.raises(ValueError, match="the prompt is empty"):
            llm.save_session(tmp_path / "s", [])


def test_without_prefix_reuse(model: Path, saved: Path, tmp_path: Path) -> None:
    with LLM(model, **OPTIONS, prefix_caching=False) as llm:
        with pytest.raises(ValueError, match="sessions need prefix_caching=True"):
            llm.save_session(tmp_path / "s", IDS)
        with pytest.raises(ValueError, match="sessions need prefix_caching=True"):
            llm.load_session(saved)
