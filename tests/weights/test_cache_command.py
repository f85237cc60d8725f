"""`moejet cache`, and which files of packed weights it takes for useless."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from moejet import _C
from moejet.cli.main import main
from moejet.testing.packed_weights import Used, files, flip_bit, tokens
from moejet.weights import packed_cache
from moejet.weights.packed_cache import CacheFile

pytestmark = pytest.mark.usefixtures("directory")


def test_cache_command(
    model: Path, directory: Path, capsys: pytest.CaptureFixture[str], used: Used
) -> None:
    assert main(["cache"]) == 0
    assert "0 files, 0.00 GiB" in capsys.readouterr().out
    tokens(model)
    tokens(model, expert_format="int8")
    assert main(["cache", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {e["format"] for e in entries} == {"int4_g32", "int8"}
    assert all(e["model"] == str(model) and not e["problem"] for e in entries)
    assert main(["cache", "verify"]) == 0
    assert capsys.readouterr().out.count(": sound") == 2
    assert main(["cache", "prune"]) == 0
    assert "freed 0.00 GiB" in capsys.readouterr().out
    assert len(files(directory)) == 2
    file = Path(entries[0]["file"])
    flip_bit(file, 0.6)
    assert main(["cache", "verify"]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert files(directory) == [Path(entries[1]["file"]).name]
    assert main(["cache", "prune", "--all", "--dry-run"]) == 0
    assert len(files(directory)) == 1
    assert main(["cache", "prune", "--keep", "0"]) == 0
    assert files(directory) == []
    assert main(["cache", "prune", "--keep", "-1"]) == 2


def sources(capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["cache", "list", "--json"]) == 0
    return [e["source"] for e in json.loads(capsys.readouterr().out)]


def test_files_whose_source_is_gone_or_changed(
    model: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [tmp_path / name for name in ("first", "second", "third")]
    for i, copy in enumerate(copies):
        subprocess.run(["cp", "-a", str(model), str(copy)], check=True)
        os.utime(copy / "model.safetensors", (i + 1, i + 1))
        tokens(copy)
    for i, name in enumerate(files(directory)):
        os.utime(directory / name, (1e9 + i, 1e9 + i))  # first, second, third
    assert sources(capsys) == ["", "", ""]
    os.utime(copies[1] / "model.safetensors", (9, 9))
    subprocess.run(["rm", "-r", str(copies[2])], check=True)
    assert sources(capsys) == ["", "changed", "gone"]
    assert main(["cache"]) == 0
    printed = capsys.readouterr().out
    assert "source changed" in printed
    assert "source gone or changed: 2 files" in printed
    # Whoever puts the source back finds the file again.
    assert main(["cache", "prune"]) == 0
    assert len(files(directory)) == 3
    os.utime(copies[1] / "model.safetensors", (2, 2))
    assert sources(capsys) == ["", "", "gone"]
    # A limit takes those without a source first, then the least recently used.
    size = sum((directory / name).stat().st_size for name in files(directory)) / 2**30
    assert main(["cache", "prune", "--keep", str(0.7 * size)]) == 0
    assert [name[:5] for name in files(directory)] == ["first", "secon"]
    (copies[0] / "model.safetensors").unlink()
    assert main(["cache", "prune", "--gone", "--dry-run"]) == 0
    assert main(["cache", "prune", "--gone"]) == 0
    assert [name[:5] for name in files(directory)] == ["secon"]


def test_a_source_on_a_disk_that_is_not_mounted_is_not_gone(
    model: Path,
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "disk" / "models" / "m"
    copy.parent.mkdir(parents=True)
    subprocess.run(["cp", "-a", str(model), str(copy)], check=True)
    mounted, real = True, os.path.ismount

    def is_mount(path: str | Path) -> bool:
        return mounted if Path(path) == (tmp_path / "disk").resolve() else real(path)

    monkeypatch.setattr(os.path, "ismount", is_mount)
    tokens(copy)
    subprocess.run(["rm", "-r", str(copy.parent)], check=True)
    assert sources(capsys) == ["gone"]
    mounted = False
    assert sources(capsys) == ["not mounted"]
    assert main(["cache", "prune", "--gone"]) == 0
    assert len(files(directory)) == 1
    mounted = True
    assert main(["cache", "prune", "--gone"]) == 0
    assert files(directory) == []


def test_files_of_versions_that_did_not_note_their_source(
    model: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = packed_cache.CacheFile._header

    def header(self: CacheFile, blobs: list[packed_cache.Blob], file_bytes: int) -> bytes:
        raw = json.loads(real(self, blobs, file_bytes))
        del raw["root"], raw["mount"]
        return json.dumps(raw).encode()

    monkeypatch.setattr(packed_cache.CacheFile, "_header", header)
    tokens(model)
    assert sources(capsys) == [""]


def test_prune_removes_files_of_other_layouts(
    model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, used: Used
) -> None:
    tokens(model)
    monkeypatch.setattr(_C, "PACK_LAYOUT_VERSION", 999)
    tokens(model)
    assert not used.mapped()
    assert len(files(directory)) == 2
    assert main(["cache", "prune"]) == 0
    assert len(files(directory)) == 1
    assert tokens(model)
    assert used.mapped()
