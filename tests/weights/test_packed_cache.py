"""Packed weights on disk: the same bytes come back, nothing unfinished or damaged is ever used."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moejet import _C, LLM
from moejet.cli.main import main
from moejet.config import EngineConfig
from moejet.experts import cpu_experts
from moejet.experts.cpu_experts import create_pool
from moejet.ops.linear import PackedMatrices
from moejet.testing.checkpoints import tiny_checkpoint
from moejet.testing.packed_weights import GREEDY, PROMPT, Used, files, flip_bit, tokens
from moejet.weights import packed_cache, packed_files
from moejet.weights.packed_cache import CacheFile

pytestmark = pytest.mark.usefixtures("directory")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert_format": "fp8", "dense_format": "bf16"},
        {"expert_format": "fp32", "dense_format": "fp32"},
        {"packed_cache": "verify"},
    ],
)
def test_second_load_gives_the_same_tokens(
    options: dict[str, object], model: Path, directory: Path, used: Used
) -> None:
    expected = tokens(model, **{**options, "packed_cache": "off"})
    assert files(directory) == []
    assert tokens(model, **options) == expected
    assert not used.mapped()
    assert len(files(directory)) == 1
    assert tokens(model, **options) == expected
    assert used.mapped()


def test_source_files_are_sampled_once_per_start(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[Path] = []
    real = packed_cache._sample
    monkeypatch.setattr(
        packed_cache, "_sample", lambda file, size: (sampled.append(file), real(file, size))[1]
    )
    weights = sorted(model.glob("*.safetensors"))
    for _ in range(2):
        sampled.clear()
        tokens(model)
        assert sorted(sampled) == weights


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_virtual_nodes(
    nodes: str, model: Path, monkeypatch: pytest.MonkeyPatch, used: Used
) -> None:
    expected = tokens(model, packed_cache="off")
    monkeypatch.setenv("MOEJET_NUMA_NODES", nodes)
    for _ in range(2):
        assert tokens(model) == expected
    assert used.mapped()


def test_small_models_are_not_cached_by_themselves(model: Path, directory: Path) -> None:
    tokens(model, packed_cache="auto")
    assert files(directory) == []


def test_off_by_environment(model: Path, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("MOEJET_CACHE", "off")
    tokens(model)
    assert files(directory) == []
    assert main(["cache", "list"]) == 2


def test_other_formats_sources_and_settings_have_other_files(
    model: Path, directory: Path, tmp_path: Path, used: Used
) -> None:
    tokens(model)
    tokens(model, expert_format="int8")
    tokens(model, dense_format="bf16")
    assert len(files(directory)) == 3
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(model), str(copy)], check=True)
    used.mapped()
    assert tokens(copy) == tokens(model)
    assert used.mapped()
    os.utime(copy / "model.safetensors", ns=(1, 1))
    tokens(copy)
    assert not used.mapped()
    config = json.loads((copy / "config.json").read_text())
    config["routed_scaling_factor"] = 1.25
    (copy / "config.json").write_text(json.dumps(config))
    changed = tokens(copy)
    assert not used.mapped()
    assert changed == tokens(copy, packed_cache="off")


def placed_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of the weights in memory of node 0, read as on a machine of two nodes."""
    monkeypatch.setenv("MOEJET_NUM_THREADS", "2")
    monkeypatch.setattr(cpu_experts, "divide_among_nodes", lambda cpus: ([0, 1], [0, 0]))


def test_placed_memory_is_read_into(
    model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, used: Used
) -> None:
    expected = tokens(model, packed_cache="off")
    placed_on_two_nodes(monkeypatch)
    assert tokens(model) == expected
    with LLM(model, packed_cache="on", max_context=64) as llm:
        assert used.mapped()
        assert str(directory) not in Path("/proc/self/maps").read_text()
        assert list(llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids) == expected


def test_nodes_are_read_at_the_same_time_by_threads_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "blobs"
    file.write_bytes(bytes(range(60)))
    together = threading.Barrier(3, timeout=20)
    real, mine = packed_cache._read_into, os.sched_getaffinity(0)

    def read(fd: int, target: NDArray[np.uint8], blob: packed_cache.Blob) -> None:
        if blob.name.endswith("first"):
            together.wait()
        if blob.name == "2 bad":
            raise OSError(errno.EIO, "Input/output error")
        real(fd, target, blob)

    monkeypatch.setattr(packed_cache, "_read_into", read)

    def work(
        node: int, names: tuple[str, ...]
    ) -> list[tuple[NDArray[np.uint8], packed_cache.Blob]]:
        blobs = [
            packed_cache.Blob(f"{node} {name}", 20 * node + 10 * i, 10, "")
            for i, name in enumerate(names)
        ]
        return [(np.zeros(10, np.uint8), blob) for blob in blobs]

    with file.open("rb") as stream:
        good = {node: work(node, ("first", "second")) for node in range(3)}
        packed_cache._read_placed(stream.fileno(), good)
        read_bytes = [part.tobytes() for node in range(3) for part, _ in good[node]]
        assert b"".join(read_bytes) == file.read_bytes()
        bad = good | {2: work(2, ("first", "bad"))}
        with pytest.raises(OSError, match="Input/output error"):
            packed_cache._read_placed(stream.fileno(), bad)
    assert os.sched_getaffinity(0) == mine


@pytest.mark.parametrize("fault", ["mapping", "reading", "short", "placed"])
def test_a_file_that_cannot_be_read_to_its_end_is_let_go(
    fault: str, model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, used: Used
) -> None:
    """Nothing of it stays mapped, the weights are those of the checkpoint, and it is written again."""
    if fault == "placed":
        placed_on_two_nodes(monkeypatch)
    expected = tokens(model)
    [name] = files(directory)
    calls = 0

    def fail_at(number: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if fault == "mapping":
            real_map = _C.ExpertWeights.map_file

            def map_file(self: object, fd: int, offsets: list[int]) -> None:
                real_map(self, fd, offsets)
                assert name in Path("/proc/self/maps").read_text()
                fail_at(2)

            patch.setattr(_C.ExpertWeights, "map_file", map_file)
        else:
            real_read = packed_cache.read_all

            def read_all(fd: int, target: memoryview, offset: int) -> None:
                nonlocal calls
                if fault != "short":
                    fail_at(9)
                elif (calls := calls + 1) == 9:
                    offset = (directory / name).stat().st_size - len(target) + 1
                real_read(fd, target, offset)

            patch.setattr(packed_cache, "read_all", read_all)
        used.mapped()
        with LLM(model, packed_cache="on", max_context=64) as llm:
            problem = "Input/output error" if fault != "short" else "bytes too early"
            assert any("is not used" in line and problem in line for line in used.lines)
            assert not used.mapped()
            assert name not in Path("/proc/self/maps").read_text()
            assert list(llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids) == expected
    assert tokens(model) == expected
    assert used.mapped()


@pytest.mark.parametrize("place", ["magic", "length", "header", "short", "long", "empty"])
def test_damaged_files_are_written_again(
    place: str, model: Path, directory: Path, used: Used
) -> None:
    expected = tokens(model)
    [name] = files(directory)
    file = directory / name
    size = file.stat().st_size
    at = {"magic": 3, "length": 17, "header": 200}.get(place)
    if at is not None:
        raw = bytearray(file.read_bytes())
        raw[at] ^= 255
        file.write_bytes(raw)
    else:
        os.truncate(file, {"short": size - 4096, "long": size + 1, "empty": 0}[place])
    used.mapped()
    assert tokens(model) == expected
    assert any("is not used" in line for line in used.lines)
    assert not used.mapped()
    assert tokens(model) == expected
    assert used.mapped()


def test_verify_finds_one_flipped_bit(model: Path, directory: Path, used: Used) -> None:
    expected = tokens(model)
    [name] = files(directory)
    file = directory / name
    for part in (0.3, 0.9):
        flip_bit(file, part)
        used.mapped()
        assert tokens(model, packed_cache="verify") == expected
        assert any("is damaged: its checksum differs" in line for line in used.lines)
        assert not used.mapped()


def test_checksum_sees_every_bit_and_position() -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (333,), dtype=torch.uint8, generator=generator).numpy()
    seen = {_C.checksum(data)}
    for byte in range(333):
        changed = data.copy()
        changed[byte] ^= 1 << byte % 8
        seen.add(_C.checksum(changed))
    for length in range(333):
        seen.add(_C.checksum(data[:length]))
    swapped = data.copy()
    swapped[:64], swapped[64:128] = data[64:128], data[:64]
    seen.add(_C.checksum(swapped))
    seen.add(_C.checksum(b"\0" * 64))
    seen.add(_C.checksum(b"\0" * 128))
    assert len(seen) == 1 + 333 + 333 + 3
    with pytest.raises(ValueError, match="not contiguous"):
        _C.checksum(data[::2])


def test_models_that_agree_in_all_but_their_weights(model: Path, tmp_path: Path) -> None:
    """Same names, sizes, times and configuration, as a reproducible image would have them."""
    answers = []
    for seed in (0, 1):
        path = tiny_checkpoint(tmp_path / str(seed) / "model", "deepseek_v3", seed=seed)
        os.utime(path / "model.safetensors", ns=(1, 1))
        answers.append((tokens(path), tokens(path, packed_cache="off")))
    assert answers[0][0] == answers[0][1] != answers[1][0] == answers[1][1]


def test_another_writer_is_not_repeated(tmp_path: Path) -> None:
    import fcntl

    pool = create_pool(1)
    weights = PackedMatrices(1, 40, 64, format="int8", pool=pool)
    file = CacheFile(tmp_path, "m", {"a": 1})
    with (tmp_path / f"{file.path.name}.7-7.tmp").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not file.write({"w": weights})
    assert not file.path.exists()
    pool.close()


def test_mapped_weights_may_still_be_written_to(tmp_path: Path) -> None:
    pool = create_pool(1)
    first = PackedMatrices(2, 40, 64, format="int8", pool=pool)
    first.set(0, torch.randn(40, 64))
    first.set(1, torch.randn(40, 64))
    file = CacheFile(tmp_path, "m", {"a": 1})
    assert file.write({"w": first})
    second = PackedMatrices(2, 40, 64, format="int8", pool=pool)
    assert file.load({"w": second})
    assert torch.equal(second.dequantize(0), first.dequantize(0))
    before = file.path.read_bytes()
    second.set(0, torch.zeros(40, 64))
    assert not second.dequantize(0).any()
    assert torch.equal(second.dequantize(1), first.dequantize(1))
    assert file.path.read_bytes() == before
    with pytest.raises(OSError, match="cannot map"):
        second.weights.map_file(-1, [0])
    with file.path.open("rb") as stream, pytest.raises(OSError, match="the file is too short"):
        second.weights.map_file(stream.fileno(), [file.path.stat().st_size // 4096 * 4096])
    with pytest.raises(ValueError, match="2 were given for 1 buffers"):
        second.weights.map_file(0, [0, 0])
    pool.close()


def test_no_room_on_the_disk(
    model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, used: Used
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = tokens(model, packed_cache="off")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert tokens(model) == expected
    assert files(directory) == []
    assert any("no room on the disk" in line for line in used.lines)
    monkeypatch.undo()
    # A quota or a disk that fills in the middle: writing itself fails.
    monkeypatch.setenv("MOEJET_CACHE", str(directory))
    monkeypatch.setattr(os, "pwrite", refuse)
    assert tokens(model) == expected
    assert files(directory) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(model: Path, directory: Path, used: Used) -> None:
    directory.mkdir(mode=0o500)
    tokens(model)
    assert any("are not cached" in line for line in used.lines)


def test_a_file_in_place_of_the_directory(model: Path, directory: Path, used: Used) -> None:
    directory.write_text("")
    tokens(model)
    assert any("are not cached" in line for line in used.lines)


def test_stopped_writers_leave_nothing(tmp_path: Path) -> None:
    pool = create_pool(1)
    weights = PackedMatrices(1, 40, 64, format="int8", pool=pool)
    stop = threading.Event()
    stop.set()
    assert not CacheFile(tmp_path, "m", {"a": 1}).write({"w": weights}, stop)
    assert files(tmp_path) == []
    pool.close()


def test_two_writers_at_once(tmp_path: Path) -> None:
    pool = create_pool(1)
    weights = PackedMatrices(1, 640, 640, format="fp32", pool=pool)
    weights.set(0, torch.randn(640, 640))
    file = CacheFile(tmp_path, "m", {"a": 1})
    threads = [threading.Thread(target=file.write, args=({"w": weights},)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path) == [file.path.name]
    assert file.load({"w": PackedMatrices(1, 640, 640, format="fp32", pool=pool)}, verify=True)
    pool.close()


_KILLED = textwrap.dedent(
    """
    import sys, time, threading, os
    from moejet import LLM
    delay = float(sys.argv[2])
    threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), 9)), daemon=True).start()
    while True:
        with LLM(sys.argv[1], packed_cache="on", max_context=64):
            pass
        for name in os.listdir(os.environ["MOEJET_CACHE"]):
            os.unlink(os.path.join(os.environ["MOEJET_CACHE"], name))
    """
)


def test_killed_at_random_points(model: Path, directory: Path, tmp_path: Path, used: Used) -> None:
    """MOEJET_KILL_ROUNDS sets the number of rounds."""
    expected = tokens(model, packed_cache="off")
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rounds = int(os.environ.get("MOEJET_KILL_ROUNDS", "3"))
    generator = torch.Generator().manual_seed(rounds)
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "from moejet import LLM"], env=environment, check=True)
    import_seconds = time.monotonic() - start
    for _ in range(rounds):
        delay = float(torch.rand(1, generator=generator)) * 1.0
        process = subprocess.Popen(
            [sys.executable, str(script), str(model), str(delay)],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        assert process.wait(timeout=60 + import_seconds) == -signal.SIGKILL
        assert tokens(model) == expected
        for name in files(directory):
            if name.endswith(packed_files.SUFFIX):
                fd = os.open(directory / name, os.O_RDONLY)
                packed_cache.verify_blobs(fd, packed_cache.read_header(fd))
                os.close(fd)


def test_leftovers_are_swept_unless_their_writer_lives(directory: Path) -> None:
    import fcntl

    directory.mkdir()
    dead, alive = directory / "a.packed.1-1.tmp", directory / "b.packed.2-2.tmp"
    for file in (dead, alive):
        file.write_bytes(b"x" * 5000)
        os.utime(file, (1, 1))
    with alive.open("rb+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert packed_files.abandoned_files(directory) == [dead]
        packed_files.sweep(directory)
    assert files(directory) == [alive.name]


def test_unknown_choice() -> None:
    with pytest.raises(
        ValueError, match="packed_cache='never' must be one of auto, on, off, verify"
    ):
        EngineConfig(model="x", packed_cache="never")
