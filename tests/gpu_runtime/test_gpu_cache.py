"""Packed weights of a model on a (simulated) GPU on disk: the same bytes come back to where they belong, or nothing."""

import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.cli.main import main
from moejet.weights import packed_cache, packed_state
from moejet.weights.device_copies import DeviceCopies
from moejet.weights.packed_cache import CacheFile

PROMPT = list(range(10, 30))
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
OPTIONS = {"device": "simulated", "packed_cache": "on", "max_context": 64}
PLACEMENTS = {"none": 0, "some": 11, "all": 10**6}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOEJET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def on_a_device(monkeypatch):
    """Tensors that are not the CPU's packed weights count as if they were on another device, in small pieces."""
    for module in (packed_state, packed_cache):
        monkeypatch.setattr(module, "is_elsewhere", lambda tensor: True)
    monkeypatch.setattr(
        packed_state, "DeviceCopies", lambda device: DeviceCopies(device, piece_bytes=1000)
    )


@pytest.fixture
def lines(caplog):
    """What the load has said since the last look."""
    caplog.set_level(logging.INFO, logger="moejet")

    def take() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return take


def _tokens(model, **options) -> list[int]:
    with LLM(model, **{**OPTIONS, **options}) as llm:
        return list(llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids)


def _is_mapped(said: list[str]) -> bool:
    return any(line.startswith("mapped packed weights") for line in said)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


@pytest.mark.parametrize(
    ("placement", "formats"),
    [("none", ("int4_g32", "int8")), ("some", ("fp8", "fp8")), ("all", ("bf16", "bf16"))],
)
def test_second_start(placement, formats, checkpoint, directory, lines):
    path = checkpoint("deepseek_v3")
    options = {"expert_format": formats[0], "dense_format": formats[1]}
    options["gpu_experts"] = PLACEMENTS[placement]
    expected = _tokens(path, **options, packed_cache="off")
    assert _files(directory) == []
    assert _tokens(path, **options) == expected
    assert not _is_mapped(lines())
    assert len(_files(directory)) == 1
    for mode in ("on", "verify"):
        assert _tokens(path, **options, packed_cache=mode) == expected
        assert _is_mapped(lines())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_by_copies_from_and_to_a_device(placement, checkpoint, directory, lines, on_a_device):
    path, count = checkpoint("deepseek_v3"), PLACEMENTS[placement]
    expected = _tokens(path, gpu_experts=count, packed_cache="off")
    assert _tokens(path, gpu_experts=count) == expected
    assert not _is_mapped(lines())
    for mode in ("on", "verify"):
        assert _tokens(path, gpu_experts=count, packed_cache=mode) == expected
        assert _is_mapped(lines())


def test_files_are_the_same_whatever_way_they_are_written(
    checkpoint, directory, monkeypatch, request
):
    path = checkpoint("deepseek_v3")
    _tokens(path, gpu_experts=11)
    [file] = _files(directory)
    fd = os.open(file, os.O_RDONLY)
    header = packed_cache.read_header(fd)
    here = file.read_bytes()
    os.close(fd)
    file.unlink()
    request.getfixturevalue("on_a_device")
    _tokens(path, gpu_experts=11)
    there = file.read_bytes()
    for blob in header.blobs:
        part = slice(blob.offset, blob.offset + blob.nbytes)
        assert here[part] == there[part], blob.name
    fd = os.open(file, os.O_RDONLY)
    assert packed_cache.read_header(fd).blobs == header.blobs
    os.close(fd)


def test_placements_devices_and_formats_have_files_of_their_own(checkpoint, directory, lines):
    path = checkpoint("deepseek_v3")
    _tokens(path, device="cpu")
    [on_cpu] = _files(directory)
    _tokens(path, gpu_experts=3)
    [first] = {*_files(directory)} - {on_cpu}
    lines()
    # Another placement is not taken for it, and replaces it: free memory would else fill the disk.
    _tokens(path, gpu_experts=4)
    assert not _is_mapped(lines())
    [second] = {*_files(directory)} - {on_cpu}
    assert second != first
    _tokens(path, gpu_experts=4, dense_format="bf16")
    assert not _is_mapped(lines())
    assert len(_files(directory)) == 3
    for options in ({"device": "cpu"}, {"gpu_experts": 4}):
        lines()
        _tokens(path, **options)
        assert _is_mapped(lines()), options


def test_another_layout_of_the_gpu_is_not_used(checkpoint, directory, lines, monkeypatch):
    path = checkpoint("deepseek_v3")
    _tokens(path, gpu_experts=4)
    lines()
    monkeypatch.setattr("moejet.loading.GPU_LAYOUT_VERSION", 10**6)
    _tokens(path, gpu_experts=4)
    assert not _is_mapped(lines())


@pytest.mark.parametrize("way", ["here", "there"])
def test_one_flipped_bit_of_the_gpus_weights_is_found(way, checkpoint, directory, lines, request):
    if way == "there":
        request.getfixturevalue("on_a_device")
    path = checkpoint("deepseek_v3")
    expected = _tokens(path, gpu_experts=9)
    [file] = _files(directory)
    with file.open("rb+") as stream:
        blobs = packed_cache.read_header(stream.fileno()).blobs
        [blob] = [b for b in blobs if b.name.endswith("layers.2.mlp.experts.resident.down.codes")]
        stream.seek(blob.offset + blob.nbytes // 2)
        [byte] = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 4]))
    lines()
    assert _tokens(path, gpu_experts=9, packed_cache="verify") == expected
    said = lines()
    assert any("resident.down.codes is damaged" in line for line in said)
    assert not _is_mapped(said)
    assert _tokens(path, gpu_experts=9, packed_cache="verify") == expected
    assert _is_mapped(lines())


def test_a_file_that_ends_in_the_middle_of_reading(
    checkpoint, directory, lines, monkeypatch, on_a_device
):
    """The half-filled model is thrown away before the new one takes memory; what is used is the checkpoint's."""
    path = checkpoint("deepseek_v3")
    expected = _tokens(path, gpu_experts=9)
    real, calls = DeviceCopies.read, []

    def fail_at_fifth(self, fd, target, offset):
        calls.append(offset)
        if len(calls) == 5:
            raise ValueError("it ends 7 bytes too early")
        real(self, fd, target, offset)

    lines()
    with monkeypatch.context() as patch:
        patch.setattr(DeviceCopies, "read", fail_at_fifth)
        assert _tokens(path, gpu_experts=9) == expected
    said = lines()
    assert any("is not used" in line and "bytes too early" in line for line in said)
    assert not _is_mapped(said)
    assert _tokens(path, gpu_experts=9) == expected
    assert _is_mapped(lines())


def test_experts_that_live_on_the_gpu_are_holes_of_the_file(tmp_path, lines):
    """Four of eight are never filled in RAM."""
    from moejet.experts.cpu_experts import CpuExperts, create_pool

    pool = create_pool(1)

    def experts() -> CpuExperts:
        return CpuExperts(8, 1024, 1024, format="bf16", pool=pool, isa="avx2")

    first = experts()
    first.fill_random(1, [4, 5, 6, 7])
    unused = first.nbytes // 2
    file = CacheFile(tmp_path, "m", {"a": 1}, unused_bytes=unused)
    assert file.write({"experts": first})
    stat = file.path.stat()
    assert stat.st_size > first.nbytes
    assert stat.st_blocks * 512 < 0.6 * first.nbytes
    packed_cache._read_ahead(file.path)
    second = experts()
    assert file.load({"experts": second}, verify=True)
    for expert in (4, 7):
        for ours, theirs in zip(second.dequantize(expert), first.dequantize(expert), strict=True):
            assert torch.equal(ours, theirs)
    pool.close()


def test_holes_need_no_room_on_the_disk(tmp_path, monkeypatch, lines):
    class Disk:
        f_bavail, f_frsize = 1, 3 << 30

    class Large:
        """Packed weights of 4 GiB of zeros in one byte."""

        weights = property(lambda self: self)

        def buffers(self):
            return [np.broadcast_to(np.zeros(1, np.uint8), (4 << 30,))]

    monkeypatch.setattr(os, "fstatvfs", lambda fd: Disk)
    assert not CacheFile(tmp_path, "m", {"a": 1}).write({"t": Large()})
    assert any("no room on the disk" in line for line in lines())
    stop = threading.Event()
    stop.set()  # it would begin
    file = CacheFile(tmp_path, "m", {"a": 1}, unused_bytes=3 << 30)
    assert not file.write({"t": Large()}, stop)
    assert lines() == []


def test_list_counts_what_files_take_of_the_disk(checkpoint, directory, capsys):
    _tokens(checkpoint("deepseek_v3"), gpu_experts=4)
    assert main(["cache", "list"]) == 0
    assert "1 files" in capsys.readouterr().out


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1000, 1001, 5000, 5003])
def test_copies_in_pieces(num_bytes, tmp_path):
    file = tmp_path / "bytes"
    values = np.random.default_rng(num_bytes).integers(0, 256, num_bytes + 9, dtype=np.uint8)
    file.write_bytes(values.tobytes())
    copies = DeviceCopies(torch.device("cpu"), piece_bytes=1000)
    with file.open("rb") as stream:
        target = torch.zeros(num_bytes, dtype=torch.uint8)
        copies.read(stream.fileno(), target, 9)
        assert target.numpy().tobytes() == values[9:].tobytes()
        assert b"".join(bytes(piece) for piece in copies.pieces(target)) == values[9:].tobytes()
        with pytest.raises(ValueError, match="bytes too early"):
            copies.read(stream.fileno(), torch.zeros(20, dtype=torch.uint8), num_bytes)


@pytest.mark.gpu
def test_copies_of_a_gpu(tmp_path):
    values = torch.randint(0, 1 << 15, (70_001,), dtype=torch.int16)
    file = tmp_path / "bytes"
    file.write_bytes(values.numpy().tobytes())
    copies = DeviceCopies(torch.device("cuda"), piece_bytes=4096)
    target = torch.zeros(70_001, dtype=torch.int16, device="cuda")
    with file.open("rb") as stream:
        copies.read(stream.fileno(), target, 0)
    assert torch.equal(target.cpu(), values)
    assert b"".join(bytes(p) for p in copies.pieces(target)) == values.numpy().tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_second_start_on_a_gpu(placement, checkpoint, directory, lines):
    path = checkpoint("deepseek_v3", qk_rope_head_dim=16)
    options = {"device": "cuda", "vram_gib": 4, "gpu_experts": PLACEMENTS[placement]}
    expected = _tokens(path, **options, packed_cache="off")
    assert _tokens(path, **options) == expected
    lines()
    assert _tokens(path, **options, packed_cache="verify") == expected
    assert _is_mapped(lines())
