"""moejet.hub.cache: what is missing, what is damaged, what nothing needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from moejet.hub import find_orphans, local_snapshot, pull, remove_orphans, verify_snapshot
from moejet.testing.checkpoints import tiny_checkpoint
from moejet.testing.hub import COMMIT, StandInHub


@pytest.fixture
def cache(hub: StandInHub, tmp_path: Path) -> Path:
    """A cache that holds org/model, whose hub has gone."""
    repo = tmp_path / "repo"
    repo.mkdir()
    hub.repos["org/model"] = tiny_checkpoint(repo, "moonlight", num_shards=2, num_hidden_layers=2)
    pull("org/model", None, tmp_path / "cache")
    hub.fail_with = 500
    return tmp_path / "cache"


def test_missing_files_are_named(cache: Path) -> None:
    path = local_snapshot("org/model", None, cache)
    for name in ("model-00002-of-00002.safetensors", "tokenizer.json", "config.json"):
        (path / name).resolve().unlink()  # the link stays, its content is gone
        with pytest.raises(ValueError, match=f"only partly in .*{name}.* missing"):
            local_snapshot("org/model", None, cache)
    with pytest.raises(ValueError, match="revision 'v2' is not in the local cache"):
        local_snapshot("org/model", "v2", cache)
    with pytest.raises(ValueError, match="not in the local cache"):
        local_snapshot("org/model", "../../../etc/passwd", cache)


def test_verify_finds_one_changed_byte(cache: Path) -> None:
    path = local_snapshot("org/model", None, cache)
    num_files = len(list(path.iterdir()))
    seen: list[int] = []
    found = verify_snapshot(path, seen.append)
    assert len(found.correct) == num_files
    assert not found.corrupt
    assert sum(seen) == sum(p.stat().st_size for p in path.iterdir())
    for name in ("model-00001-of-00002.safetensors", "tokenizer.json"):
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 4
        (path / name).write_bytes(data)
    (path / "own.txt").write_text("not from the hub")
    found = verify_snapshot(path, seen.append)
    assert sorted(found.corrupt) == ["model-00001-of-00002.safetensors", "tokenizer.json"]
    assert found.unnamed == ["own.txt"]
    assert len(found.correct) == num_files - 2
    assert not (path / "tokenizer.json").is_symlink()
    assert not verify_snapshot(path, seen.append).corrupt


def test_orphans(hub: StandInHub, cache: Path) -> None:
    assert find_orphans(cache) == []
    blobs = cache / "models--org--model/blobs"
    (blobs / ("a" * 64 + ".incomplete")).write_bytes(b"1234567")
    (blobs / ("b" * 64 + ".01234567.incomplete")).write_bytes(b"12")
    (blobs / ("c" * 40)).write_bytes(b"123")
    other = cache / "models--org--other/blobs"
    other.mkdir(parents=True)
    (other / ("a" * 64)).write_bytes(b"1")
    data_set = cache / "datasets--org--data/blobs"
    data_set.mkdir(parents=True)
    (data_set / ("a" * 64)).write_bytes(b"1")
    found = find_orphans(cache, "org/model")
    assert [(o.path.name[0], o.size, o.kind) for o in found] == [
        ("a", 7, "incomplete"),
        ("b", 2, "incomplete"),
        ("c", 3, "unreferenced"),
    ]
    lock = cache / ".locks/models--org--model" / ("b" * 64 + ".lock")
    with FileLock(lock):  # that one is being fetched
        found = find_orphans(cache)
    assert [o.path.name[0] for o in found] == ["a", "c", "a"]
    assert remove_orphans(found) == 11
    assert [o.path.name[0] for o in find_orphans(cache)] == ["b"]
    assert not verify_snapshot(local_snapshot("org/model", None, cache), lambda _: None).corrupt


def test_contents_of_a_replaced_revision_stay(hub: StandInHub, cache: Path) -> None:
    hub.fail_with = None
    hub.commit = "e" * 40
    (hub.repos["org/model"] / "generation_config.json").write_text('{"temperature": 0.25}')
    pull("org/model", None, cache)
    assert find_orphans(cache) == []
    snapshots = cache / "models--org--model/snapshots"
    for path in (snapshots / COMMIT).iterdir():
        path.unlink()
    assert len(find_orphans(cache)) == 1  # the former generation_config.json; the rest is shared
