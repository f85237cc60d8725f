"""moejet.resolve: aliases, directories, and hub ids against a local stand-in for the hub's HTTP API."""

from __future__ import annotations

from pathlib import Path

import pytest

from moejet.resolve import TINY_REASONER, resolve_model
from moejet.testing.checkpoints import tiny_checkpoint
from moejet.testing.hub import StandInHub
from moejet.weights.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repo")
    return tiny_checkpoint(root, "moonlight", num_shards=2, num_hidden_layers=2)


def test_downloads_what_is_needed(hub: StandInHub, checkpoint: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "original").mkdir(parents=True)
    for file in checkpoint.iterdir():
        (repo / file.name).write_bytes(file.read_bytes())
    for unwanted in ("pytorch_model.bin", "original/model.safetensors", "figure.png"):
        (repo / unwanted).write_bytes(b"unwanted")
    (repo / "chat_template.jinja").write_text("{{ messages }}")
    hub.repos["org/model"] = repo
    root = resolve_model("org/model", cache_dir=tmp_path / "cache")
    got = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert got == {p.name for p in checkpoint.iterdir()} | {"chat_template.jinja"}
    assert len(Checkpoint.open(root)) > 0
    # The second time nothing is fetched again.
    hub.requests.clear()
    assert resolve_model("org/model", "main", tmp_path / "cache") == root
    assert not [r for r in hub.requests if r.startswith("GET") and "/resolve/" in r]


def test_works_from_the_cache_when_the_hub_is_away(
    hub: StandInHub, checkpoint: Path, tmp_path: Path
) -> None:
    hub.repos["org/model"] = checkpoint
    root = resolve_model("org/model", cache_dir=tmp_path)
    hub.fail_with = 503
    assert resolve_model("org/model", cache_dir=tmp_path) == root


def test_refuses_an_unsupported_model_before_its_weights(hub: StandInHub, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "config.json").write_text('{"model_type": "llama"}')
    (repo / "model.safetensors").write_bytes(b"x" * 100)
    hub.repos["org/llama"] = repo
    with pytest.raises(ValueError, match="model_type='llama' is not supported"):
        resolve_model("org/llama", cache_dir=tmp_path / "cache")
    assert not [r for r in hub.requests if "safetensors" in r]


def test_hub_errors_are_one_line_with_a_remedy(
    hub: StandInHub, checkpoint: Path, tmp_path: Path
) -> None:
    def message(model: str, revision: str | None = None) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is checked below)
            resolve_model(model, revision, tmp_path / "cache")
        text = str(caught.value)
        assert "\n" not in text
        assert repr(model) in text
        return text

    hub.repos["org/model"] = checkpoint
    assert "neither a directory here nor a public hub repository" in message("org/nothing")
    assert "no revision 'v9'" in message("org/model", "v9")
    hub.gated.add("org/model")
    assert "gated: accept its terms" in message("org/model")
    empty = tmp_path / "empty"
    empty.mkdir()
    hub.repos["org/empty"] = empty
    assert "holds no config.json" in message("org/empty")
    hub.fail_with = 500
    assert "org/other" in message("org/other")


def test_no_network(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.close()
    with pytest.raises(
        ValueError, match="not complete in the local cache and the hub cannot be reached"
    ):
        resolve_model("org/model", cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"not in the local cache .* switched off"):
        resolve_model("org/model", cache_dir=tmp_path)


def test_local_directory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(checkpoint)) == checkpoint
    monkeypatch.chdir(checkpoint.parent)
    assert resolve_model(checkpoint.name) == checkpoint
    assert resolve_model(f"./{checkpoint.name}/") == checkpoint
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert resolve_model(f"~/{checkpoint.name}") == checkpoint


@pytest.mark.parametrize("model", ["./x", "/no/such/dir", "../x", "~/x", "a/b/c", "x.gguf", "a/b/"])
def test_a_missing_path_is_no_hub_id(
    hub: StandInHub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such file or directory"):
        resolve_model(model)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("tiny-resoner", "did you mean 'tiny-reasoner'"),
        ("gpt2", "neither an alias"),
        ("a b/c", "neither an alias"),
        ("", "must be an alias"),
        ("-x/y", "neither an alias"),
    ],
)
def test_bad_names(hub: StandInHub, model: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resolve_model(model)
    assert hub.requests == []


def test_unusable_local_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json; supported"):
        resolve_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match=r"is a file; give a \.gguf file or the directory"):
        resolve_model(str(file))


def test_gguf_files_and_directories_of_one(tmp_path: Path) -> None:
    """Only names count here; the files are read when they are loaded."""
    single = tmp_path / "model-Q4_K_M.gguf"
    single.touch()
    (tmp_path / "mmproj-F16.gguf").touch()
    assert resolve_model(str(single)) == resolve_model(str(tmp_path)) == single
    shards = [tmp_path / f"other-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for shard in shards:
        shard.touch()
    assert resolve_model(str(shards[1])) == shards[0]
    with pytest.raises(ValueError, match=r"2 GGUF models; give one of model.*other-00001-of-00003"):
        resolve_model(str(tmp_path))
    single.unlink()
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == shards[0]
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    (tmp_path / "model.safetensors").unlink()
    shards[2].unlink()
    for path in (tmp_path, shards[0]):
        with pytest.raises(ValueError, match="lacks 1 of its 3 shards: other-00003-of-00003"):
            resolve_model(str(path))


def test_a_link_keeps_the_name_of_its_shard(tmp_path: Path) -> None:
    """As in the hub's cache, where the files themselves are named by their hashes."""
    for number in (1, 2):
        (tmp_path / f"blob{number}").touch()
        (tmp_path / f"m-0000{number}-of-00002.gguf").symlink_to(tmp_path / f"blob{number}")
    assert resolve_model(str(tmp_path)).name == "m-00001-of-00002.gguf"


def test_embedded_model() -> None:
    root = resolve_model(TINY_REASONER)
    assert root.name == "tiny_reasoner"
    assert (root / "config.json").is_file()
    assert (root / "tokenizer.json").is_file()
