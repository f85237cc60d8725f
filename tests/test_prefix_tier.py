"""Prefixes on disk: the same tokens after a restart, nothing unfinished or damaged is ever used."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moejet import LLM, SamplingParams, block_file, framed_file, prefix_tier
from moejet.cli.main import main
from moejet.config import EngineConfig
from moejet.prefix_store import segments
from moejet.testing.checkpoints import tiny_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS = {
    "deterministic": True,
    "block_size": 8,
    "max_context": 512,
    "cache_tokens": 1024,
    "max_batch_tokens": 128,
    "prefix_min_tokens": 16,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("prefixes"), "deepseek_v3")


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, object]:
    return {**OPTIONS, "prefix_disk_gib": 1.0, "prefix_dir": tmp_path / "prefix"}


def prompt(seed: int, length: int = 200) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 250) for _ in range(length)]


def run(llm: LLM, ids: list[int], params: SamplingParams = GREEDY) -> tuple[list[int], int]:
    """Generated tokens, and how many of the prompt's were cached."""
    [result] = llm.generate([ids], params)
    llm.engine.scheduler.check_integrity()
    return list(result.outputs[0].token_ids), result.timings.cached_tokens


def logits(llm: LLM, ids: list[int]) -> tuple[torch.Tensor, int]:
    rows, execute = [], llm.engine.runner.execute

    def record(batch):  # type: ignore[no-untyped-def]
        rows.append(execute(batch).clone())
        return rows[-1]

    llm.engine.runner.execute = record
    try:
        cached = run(llm, ids)[1]
    finally:
        llm.engine.runner.execute = execute
    return torch.cat([r for r in rows if r.numel()]), cached


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[int, list[int]]:
    with LLM(model, **OPTIONS, prefix_caching=False) as llm:
        return {seed: run(llm, prompt(seed))[0] for seed in range(12)}


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_a_new_start_reads_what_the_last_one_computed(
    dtype: str, model: Path, disk: dict[str, object]
) -> None:
    ids = prompt(0)
    with LLM(model, **disk, cache_dtype=dtype) as llm:
        cold, cached = logits(llm, ids)
        assert cached == 0
    with LLM(model, **disk, cache_dtype=dtype) as llm:
        warm, cached = logits(llm, ids)
        assert cached == 192
        assert torch.equal(warm, cold)
        # 211 tokens are known, the answer's among them.
        longer = [*ids, *run(llm, ids)[0], 77]
        assert run(llm, longer)[1] == 208
    with LLM(model, **OPTIONS, cache_dtype=dtype, prefix_caching=False) as llm:
        assert torch.equal(logits(llm, ids)[0], cold)


def test_salts_separate_what_is_on_disk(model: Path, disk: dict[str, object]) -> None:
    ids = prompt(0)
    mine, other = (replace(GREEDY, cache_salt=salt) for salt in ("mine", "other"))
    with LLM(model, **disk) as llm:
        first, cached = run(llm, ids, mine)
        assert cached == 0
        assert run(llm, ids, mine)[1] == 192
    with LLM(model, **disk) as llm:
        for params, expected in ((other, 0), (GREEDY, 0), (mine, 192), (other, 192)):
            assert run(llm, ids, params) == (first, expected)


_CHILD = textwrap.dedent(
    """
    import json, sys
    from moejet import LLM, SamplingParams
    job = json.load(sys.stdin)
    llm = LLM(job["model"], **job["options"])
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    for ids in job["prompts"]:
        [result] = llm.generate([ids], params)
        print(json.dumps([result.outputs[0].token_ids, result.timings.cached_tokens]), flush=True)
    """
)


def child(model: Path, options: dict[str, object], prompts: list[list[int]]) -> subprocess.Popen:
    """A process that answers prompts, one line each, and never closes its LLM."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    job = {"model": str(model), "options": options, "prompts": prompts}
    process.stdin.write(json.dumps(job, default=str))
    process.stdin.close()
    return process


def answers(process: subprocess.Popen) -> list[list[object]]:
    assert process.stdout is not None
    lines = [json.loads(line) for line in process.stdout]
    assert process.wait(timeout=120) == 0
    return lines


def test_processes_share_the_directory(
    model: Path, disk: dict[str, object], expected: dict[int, list[int]]
) -> None:
    """Two at once with overlapping work, then a third that finds all of it."""
    with LLM(model, **disk) as watcher:
        assert run(watcher, prompt(11))[1] == 0
        first = child(model, disk, [prompt(seed) for seed in range(6)])
        second = child(model, disk, [prompt(seed) for seed in range(3, 9)])
        for process, seeds in ((first, range(6)), (second, range(3, 9))):
            for seed, (tokens, _) in zip(seeds, answers(process), strict=True):
                assert tokens == expected[seed]
        # One that was there before sees what others wrote.
        assert run(watcher, prompt(0)) == (expected[0], 192)
    third = answers(child(model, disk, [prompt(seed) for seed in (*range(9), 11)]))
    assert [cached for _, cached in third] == [192] * 10
    for file, _, _ in segments(Path(str(disk["prefix_dir"]))):
        block_file.verify(file)


def test_killed_at_random_points(
    model: Path, disk: dict[str, object], expected: dict[int, list[int]]
) -> None:
    """MOEJET_KILL_ROUNDS sets the number of rounds."""
    rounds = int(os.environ.get("MOEJET_KILL_ROUNDS", "2"))
    rng = random.Random(rounds)
    # Few blocks per segment: many files.
    options = {**disk, "prefix_disk_gib": 0.0005}
    num_found = 0
    for _ in range(rounds):
        process = child(model, options, [prompt(rng.randrange(12)) for _ in range(2000)])
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(rng.random() * 0.5)
        process.kill()
        process.stdout.close()
        assert process.wait(timeout=60) == -signal.SIGKILL
        for file, _, _ in segments(Path(str(disk["prefix_dir"]))):
            block_file.verify(file)
        with LLM(model, **options) as llm:
            for seed in range(12):
                tokens, cached = run(llm, prompt(seed))
                assert tokens == expected[seed]
                num_found += cached
    assert num_found > 0


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_noticed_and_computed_again(
    seed: int, model: Path, disk: dict[str, object], expected: dict[int, list[int]]
) -> None:
    rng = random.Random(seed)
    directory = Path(str(disk["prefix_dir"]))
    with LLM(model, **disk) as llm:
        for number in range(4):
            run(llm, prompt(number))
            llm.engine.scheduler.store.flush()
    files = [file for file, _, _ in segments(directory)]
    assert len(files) == 4
    for file in files:
        raw = bytearray(file.read_bytes())
        if seed == 0:
            raw = raw[: rng.randrange(len(raw))]
        for _ in range(rng.choice([1, 100]) if raw else 0):
            raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        file.write_bytes(raw)
    with LLM(model, **disk) as llm:
        for number in range(4):
            tokens, cached = run(llm, prompt(number))
            assert tokens == expected[number]
            assert cached <= 192
    # What was damaged has been replaced.
    with LLM(model, **disk) as llm:
        assert run(llm, prompt(0)) == (expected[0], 192)
    for file, _, _ in segments(directory):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(framed_file, "_FIRST_READ_BYTES", 64)
            fd = os.open(file, os.O_RDONLY)
            assert block_file.read_header(fd).digests  # a header longer than the first read
            os.close(fd)


def test_damage_while_running(
    model: Path, disk: dict[str, object], expected: dict[int, list[int]]
) -> None:
    """The index has the block, its bytes are gone: tokens are computed, and written again."""
    with LLM(model, **disk) as llm:
        run(llm, prompt(0))
    with LLM(model, **disk) as llm:
        [(file, size, _)] = segments(Path(str(disk["prefix_dir"])))
        raw = bytearray(file.read_bytes())
        raw[size // 2] ^= 4
        file.write_bytes(raw)
        tokens, cached = run(llm, prompt(0))
        assert tokens == expected[0]
        assert 0 < cached < 192
        assert not file.exists()
    with LLM(model, **disk) as llm:
        # The beginning was in memory only when its segment went; it is not written a second time.
        assert run(llm, prompt(0))[0] == expected[0]


def test_the_size_is_limited_and_the_last_used_stay(
    model: Path, disk: dict[str, object], expected: dict[int, list[int]]
) -> None:
    options = {**disk, "prefix_disk_gib": 0.0005}
    limit = int(0.0005 * 2**30)
    with LLM(model, **options) as llm:
        for seed in range(12):
            assert run(llm, prompt(seed))[0] == expected[seed]
            llm.engine.scheduler.store.flush()
            assert sum(size for _, size, _ in segments(Path(str(disk["prefix_dir"])))) <= limit
        assert run(llm, prompt(11))[1] == 192
    with LLM(model, **options) as llm:
        assert run(llm, prompt(11)) == (expected[11], 192)
        assert run(llm, prompt(0)) == (expected[0], 0)


def test_using_a_chain_keeps_it(model: Path, disk: dict[str, object]) -> None:
    """A prompt found in memory counts as a use of its segments, of the first ones most."""
    directory = Path(str(disk["prefix_dir"]))
    with LLM(model, **disk) as llm:
        tier = llm.engine.scheduler.store
        for seed in (0, 1, 0):
            run(llm, prompt(seed, 100 if seed else 200))
            tier.flush()
        files = sorted(segments(directory), key=lambda entry: entry[0])
        assert len(files) == 2
        assert files[0][2] > files[1][2]


def test_a_full_disk_is_reported_once(
    model: Path,
    disk: dict[str, object],
    expected: dict[int, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefix_tier, "_PAUSE_S", 0.0)
    for name in ("posix_fallocate", "pwrite"):
        caplog.clear()
        with LLM(model, **disk) as llm, monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            for seed in range(3):
                assert run(llm, prompt(seed))[0] == expected[seed]
                llm.engine.scheduler.store.flush()
            assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
                f"prefixes are not kept in {disk['prefix_dir']}: no room on the disk"
            ]
            assert run(llm, prompt(0))[1] == 192
            assert not list(Path(str(disk["prefix_dir"])).glob("*/*"))
            # There is room again.
            patch.undo()
            run(llm, prompt(3))
            llm.engine.scheduler.store.flush()
            [(file, _, _)] = segments(Path(str(disk["prefix_dir"])))
            file.unlink()


def test_a_file_in_place_of_the_directory(
    model: Path,
    disk: dict[str, object],
    expected: dict[int, list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path(str(disk["prefix_dir"])).write_text("")
    with LLM(model, **disk) as llm:
        assert run(llm, prompt(0))[0] == expected[0]
    assert "prefixes are not kept" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"expert_format": "int8"},
        {"dense_format": "bf16"},
        {"cache_dtype": "fp32"},
        {"block_size": 16},
        {"isa": "avx2"},
        {"deterministic": False},
        {"arithmetic": "int8"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_have_other_prefixes(
    change: dict[str, object], model: Path, disk: dict[str, object], tmp_path: Path
) -> None:
    with LLM(model, **disk) as llm:
        run(llm, prompt(0))
        llm.save_session(tmp_path / "session", prompt(0))
    with LLM(model, **{**disk, **change}) as llm:
        assert run(llm, prompt(0))[1] == 0
        with pytest.raises(ValueError, match=rf"saved with another .*{next(iter(change))}"):
            llm.load_session(tmp_path / "session")
    assert len(list(Path(str(disk["prefix_dir"])).glob("*/"))) >= 2
    with LLM(model, **disk) as llm:
        assert run(llm, prompt(0))[1] == 192


def test_other_weights_and_references_have_other_prefixes(
    model: Path, disk: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / model.name
    subprocess.run(["cp", "-a", str(model), str(copy)], check=True)
    with LLM(model, **disk) as llm:
        run(llm, prompt(0))
        llm.save_session(tmp_path / "session", prompt(0))
    with LLM(copy, **disk) as llm:
        assert run(llm, prompt(0))[1] == 192
    os.utime(copy / "model.safetensors", ns=(1, 1))
    with LLM(copy, **disk) as llm:
        assert run(llm, prompt(0))[1] == 0
        with pytest.raises(ValueError, match="its weight files differ"):
            llm.load_session(tmp_path / "session")
    monkeypatch.setenv("MOEJET_REF", "1")
    with LLM(model, **disk) as llm:
        assert run(llm, prompt(0, 40))[1] == 0


def test_what_memory_has_lost_comes_back_from_disk(
    model: Path, disk: dict[str, object], expected: dict[int, list[int]]
) -> None:
    """Ten prompts in a cache for five, while another one decodes: reads are spread over steps."""
    with LLM(model, **disk) as llm:
        for seed in range(10):
            assert run(llm, prompt(seed))[0] == expected[seed]
        llm.engine.scheduler.store.flush()
        tier = llm.engine.scheduler.store
        tier.read_seconds = lambda num_blocks: num_blocks * 0.007  # two per step beside others
        sizes, read = [], tier.read

        def record(digests, blocks):  # type: ignore[no-untyped-def]
            sizes.append(len(blocks))
            return read(digests, blocks)

        tier.read = record
        llm.engine.scheduler._seconds_per_token = 1.0
        params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
        stream = llm.stream(prompt(100, 20), params)
        next(stream)
        assert run(llm, prompt(0)) == (expected[0], 192)
        assert sizes == [2] * 12
        long = [d.token_ids[0] for d in stream]
        assert len(long) == 99
        assert run(llm, prompt(1)) == (expected[1], 192)
        assert sizes[12:] == [24]
        # Not worth it: computed, and next time the estimate is lower.
        llm.engine.scheduler._seconds_per_token = 1e-9
        rate = tier._read_rate
        assert run(llm, prompt(2)) == (expected[2], 0)
        assert tier._read_rate > rate


def test_short_contexts_are_not_written(model: Path, disk: dict[str, object]) -> None:
    options = {**disk, "prefix_min_tokens": 150}
    with LLM(model, **options) as llm:
        run(llm, prompt(0, 130))
        llm.engine.scheduler.store.flush()
        assert llm.engine.scheduler.store.store.num_blocks == 0
        run(llm, prompt(1, 140))  # grows beyond it
        llm.engine.scheduler.store.flush()
        assert llm.engine.scheduler.store.store.num_blocks == 18


def test_forgetting_to_close_loses_nothing(model: Path, disk: dict[str, object]) -> None:
    llm = LLM(model, **disk)
    run(llm, prompt(0))
    thread = llm.engine.scheduler.store._writer._thread
    del llm
    gc.collect()
    assert not thread.is_alive()
    assert answers(child(model, disk, [prompt(0), prompt(1)]))[0][1] == 192
    with LLM(model, **disk) as llm:
        assert run(llm, prompt(1))[1] == 192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_disk_gib": -1}, "prefix_disk_gib=-1 must be a number of at least 0"),
        ({"prefix_disk_gib": "8"}, "prefix_disk_gib='8' must be a finite number"),
        ({"prefix_disk_gib": 1, "prefix_caching": False}, "needs prefix_caching=True"),
        ({"prefix_dir": ""}, "prefix_dir='' must be a directory"),
        ({"prefix_min_tokens": 0}, "prefix_min_tokens=0 must be a positive integer"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="x", **options)


def test_a_store_needs_a_place_and_room(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MOEJET_CACHE is off: set prefix_dir"):
        LLM(model, prefix_disk_gib=1)
    with pytest.raises(ValueError, match="does not hold two blocks"):
        LLM(model, prefix_disk_gib=1e-9, prefix_dir=tmp_path)


def test_cache_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOEJET_CACHE", str(tmp_path))
    for block_size in (8, 16):
        with LLM(model, **{**OPTIONS, "block_size": block_size}, prefix_disk_gib=1) as llm:
            for seed in range(3):
                run(llm, prompt(seed))
                llm.engine.scheduler.store.flush()
    assert main(["cache", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [e["format"] for e in entries] == ["prefixes"] * 2
    assert {e["model"] for e in entries} == {model.name}
    assert main(["cache", "verify"]) == 0
    assert capsys.readouterr().out.count(": sound") == 2
    first = sorted(Path(entries[0]["file"]).iterdir())[0]
    raw = bytearray(first.read_bytes())
    raw[-9] ^= 1
    first.write_bytes(raw)
    dead = first.with_name("x.blocks.1-1.tmp")
    dead.write_bytes(b"x")
    os.utime(dead, (1, 1))
    assert main(["cache", "verify"]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert not first.exists()
    assert main(["cache", "prune"]) == 0
    assert not dead.exists()
    assert len(segments(tmp_path / "prefix")) == 5
    assert main(["cache", "prune", "--all", "--dry-run"]) == 0
    assert len(segments(tmp_path / "prefix")) == 5
    assert main(["cache", "prune", "--all"]) == 0
    assert sorted(p.name for p in (tmp_path / "prefix").iterdir()) == [".lock"]
