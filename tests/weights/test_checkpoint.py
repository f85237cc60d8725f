"""moejet.weights.checkpoint: what is read, and that every kind of damage is named before any tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moejet.testing import damage
from moejet.testing.checkpoints import tiny_checkpoint, write_safetensors
from moejet.weights.checkpoint import INDEX_NAME, Checkpoint, read_header


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "moonlight", num_hidden_layers=2)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "moonlight", num_hidden_layers=2, num_shards=3)


def refusal(root: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (callers check the text)
        Checkpoint.open(root)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_the_library_reads(tmp_path: Path, num_shards: int, dtype: torch.dtype) -> None:
    root = tiny_checkpoint(
        tmp_path, "deepseek_v3", dtype=dtype, num_shards=num_shards, num_hidden_layers=2
    )
    expected = {k: v for f in root.glob("*.safetensors") for k, v in load_file(f).items()}
    checkpoint = Checkpoint.open(root)
    assert set(checkpoint.tensors) == set(expected)
    assert len(checkpoint.files) == num_shards
    assert checkpoint.num_bytes == sum(v.nbytes for v in expected.values())
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    order = [(info.file.name, info.offset) for info in checkpoint]
    assert order == sorted(order)
    assert "model.norm.weight" in checkpoint


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor(2.0), "b": torch.zeros(0, 4), "c": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    with pytest.raises(ValueError, match="tensor d is not in checkpoint"):
        checkpoint.read("d")


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    num_tensors = len(Checkpoint.open(sharded))
    assert num_tensors > 50
    name = damage.drop_shard(sharded, 2)
    assert f"missing 1 shard: {name}" in refusal(sharded)


def test_missing_shards(sharded: Path) -> None:
    first, last = damage.drop_shard(sharded, 1), damage.drop_shard(sharded, 3)
    text = refusal(sharded)
    assert f"missing 2 shards: {first}, {last}" in text
    assert "download it again" in text


def test_truncated_file(single: Path) -> None:
    file = single / "model.safetensors"
    size = file.stat().st_size
    damage.truncate(file, 100)
    assert f"model.safetensors is truncated: expected {size} bytes, found {size - 100}" in refusal(
        single
    )
    damage.truncate(file, size - 100 - 50)
    assert "is truncated: expected at least" in refusal(single)
    damage.truncate(file, 45)
    assert "is truncated: 5 bytes, not even a header" in refusal(single)
    damage.truncate(file, 5)
    assert "is truncated: 0 bytes" in refusal(single)


def test_all_problems_at_once(sharded: Path) -> None:
    missing = damage.drop_shard(sharded, 1)
    damage.truncate(sharded / "model-00002-of-00003.safetensors", 8)
    damage.corrupt_header(sharded / "model-00003-of-00003.safetensors")
    text = refusal(sharded)
    assert f"missing 1 shard: {missing}" in text
    assert "model-00002-of-00003.safetensors is truncated" in text
    assert "model-00003-of-00003.safetensors has a corrupt header" in text
    # Tensors of broken shards are not reported a second time.
    assert "lacks" not in text


def first_entry(header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return next((k, v) for k, v in header.items() if k != "__metadata__")


def unknown_dtype(header: dict[str, Any]) -> None:
    first_entry(header)[1]["dtype"] = "F12"


def negative_size(header: dict[str, Any]) -> None:
    first_entry(header)[1]["shape"] = [-1, 4]


def huge_size(header: dict[str, Any]) -> None:
    first_entry(header)[1]["shape"] = [2**61, 2**61]


def wrong_size(header: dict[str, Any]) -> None:
    first_entry(header)[1]["shape"] = [3]


def no_offsets(header: dict[str, Any]) -> None:
    del first_entry(header)[1]["data_offsets"]


def overlap(header: dict[str, Any]) -> None:
    entries = [v for k, v in header.items() if k != "__metadata__"]
    same = next(v for v in entries[1:] if v["shape"] == entries[-1]["shape"])
    same["data_offsets"] = entries[-1]["data_offsets"]


def not_an_object(header: dict[str, Any]) -> None:
    header[first_entry(header)[0]] = 5


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (unknown_dtype, "has the unknown dtype 'F12'"),
        (negative_size, r"has shape \[-1, 4\]"),
        (huge_size, "needs .* bytes but has"),
        (wrong_size, "needs .* bytes but has"),
        (no_offsets, "data_offsets"),
        (overlap, "leaves a gap|overlaps"),
        (not_an_object, "is not an object"),
    ],
)
def test_bad_headers(single: Path, edit: Callable[[dict[str, Any]], None], reason: str) -> None:
    damage.edit_header(single / "model.safetensors", edit)
    with pytest.raises(ValueError, match=rf"model\.safetensors has a corrupt header: .*({reason})"):
        Checkpoint.open(single)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (struct.pack("<Q", 2**62) + b"{}", "claims 4611686018427387904 bytes"),
        (struct.pack("<Q", 500) + b"{}", "expected at least 508 bytes, found 10"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 2) + b"{}x", "1 bytes after the last tensor"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "corrupt header"),
        (struct.pack("<Q", 40000) + b"[" * 40000, "corrupt header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    ],
)
def test_bad_files(tmp_path: Path, blob: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(blob)
    assert reason in refusal(tmp_path)


def test_duplicate_name_in_one_header(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ValueError, match="'a' is there twice"):
        read_header(file)


def test_duplicate_name_in_two_shards(tmp_path: Path) -> None:
    write_safetensors(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, num_shards=2)
    save_file(
        {"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    assert (
        "tensor a is in both model-00001-of-00002.safetensors and model-00002-of-00002.safetensors"
        in refusal(tmp_path)
    )


def test_index_that_does_not_fit(sharded: Path) -> None:
    def edit(index: dict[str, Any]) -> None:
        index["weight_map"]["model.extra.weight"] = "model-00002-of-00003.safetensors"

    damage.edit_json(sharded / INDEX_NAME, edit)
    assert (
        "model-00002-of-00003.safetensors lacks 1 tensor that the index places there: "
        "model.extra.weight" in refusal(sharded)
    )


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", 5])
def test_index_that_points_elsewhere(sharded: Path, file: Any) -> None:
    damage.edit_json(sharded / INDEX_NAME, lambda index: index["weight_map"].update(x=file))
    assert "shards must lie in the checkpoint directory" in refusal(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 5}', "\xff"])
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / INDEX_NAME).write_text(text, encoding="latin-1")
    assert "is not a safetensors index" in refusal(sharded)


def test_other_formats_are_named(tmp_path: Path) -> None:
    assert "holds no weights; supported: model.safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickled PyTorch weights only" in refusal(tmp_path)
    assert "convert it to safetensors" in refusal(tmp_path)
    (tmp_path / "model-Q4_K_M.gguf").touch()
    assert "holds GGUF files: give the one to load" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "nothing")


def test_reading_a_file_that_shrank(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    last = list(checkpoint)[-1]
    damage.truncate(single / "model.safetensors", 10)
    with pytest.raises(ValueError, match="file ends 10 bytes early"):
        checkpoint.read(last.name)


def test_unsupported_dtype_is_listed_but_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors["a"].dtype == "F8_E4M3"
    with pytest.raises(ValueError, match="has dtype F8_E4M3; supported: F32, F16, BF16"):
        checkpoint.read("a")


def test_index_is_written_as_published(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == Checkpoint.open(sharded).num_bytes
