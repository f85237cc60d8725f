"""moejet.hub against a hub on this machine: whole, interrupted, damaged and refused downloads."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest

from moejet.hub import HubError, Reporter, local_snapshot, pull
from moejet.hub import gguf as gguf_module
from moejet.hub import transfer as transfer_module
from moejet.hub.listing import HubFile, quantisations
from moejet.hub.progress import TransferProgress
from moejet.resolve import resolve_config, resolve_model
from moejet.testing.checkpoints import tiny_checkpoint
from moejet.testing.gguf_files import write_gguf
from moejet.testing.hub import COMMIT, StandInHub, git_sha1, sha256
from moejet.weights.gguf_model import GgufCheckpoint

SHARD = "model-00001-of-00002.safetensors"
BIG = "extra.bin"
real_sleep = time.sleep


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    return tiny_checkpoint(root, "moonlight", num_shards=2, num_hidden_layers=2)


@pytest.fixture
def repo(hub: StandInHub, published: Path, tmp_path: Path) -> Path:
    """A repository that the test may change, served as org/model."""
    root = tmp_path / "repo"
    shutil.copytree(published, root)
    hub.repos["org/model"] = root
    return root


def fetch(tmp_path: Path, **options: object) -> Path:
    return pull("org/model", None, tmp_path / "cache", **options).path  # type: ignore[arg-type]


def same_files(left: Path, right: Path) -> bool:
    names = {str(p.relative_to(right)) for p in right.rglob("*") if p.is_file()}
    assert {str(p.relative_to(left)) for p in left.rglob("*")} == names
    return all((left / n).read_bytes() == (right / n).read_bytes() for n in names)


def partials(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


def test_a_whole_download(
    hub: StandInHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    total = sum(p.stat().st_size for p in repo.iterdir())
    result = pull("org/model", cache_dir=tmp_path / "cache")
    assert same_files(result.path, repo)
    assert result.commit == COMMIT == result.path.name
    assert result.num_bytes == total == result.bytes_fetched == sum(hub.sent.values())
    assert hub.tokens == {"hf_secret"}
    assert partials(tmp_path) == []
    # huggingface_hub finds everything where it would have put it itself.
    from huggingface_hub import snapshot_download

    hub.fail_with = 500
    assert snapshot_download("org/model", cache_dir=tmp_path / "cache") == str(result.path)
    hub.fail_with = None
    again = pull("org/model", "main", tmp_path / "cache")
    assert again.bytes_fetched == 0
    assert sum(hub.sent.values()) == total


def test_what_huggingface_hub_fetched_is_used(hub: StandInHub, repo: Path, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/model", SHARD, cache_dir=tmp_path / "cache")
    sent = hub.sent[SHARD]
    assert same_files(fetch(tmp_path), repo)
    assert hub.sent[SHARD] == sent == (repo / SHARD).stat().st_size


def test_connections_that_break(hub: StandInHub, repo: Path, tmp_path: Path) -> None:
    (repo / BIG).write_bytes(os.urandom(5 * 2**20 + 7))
    hub.cut_after = {BIG: [2**21, 0, 2**20, 0]}
    assert same_files(fetch(tmp_path, include=["*.safetensors", BIG]), repo)
    # A broken connection costs less than a piece of one MiB that was not handed over yet.
    assert hub.sent[BIG] < 5 * 2**20 + 7 + 2 * 2**20


def test_a_connection_that_always_breaks(hub: StandInHub, repo: Path, tmp_path: Path) -> None:
    hub.cut_after = {SHARD: [0] * 100}
    with pytest.raises(HubError, match=r"hub cannot be reached.*run the command again"):
        fetch(tmp_path)
    hub.cut_after = {}
    assert same_files(fetch(tmp_path), repo)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_errors_that_pass(hub: StandInHub, repo: Path, tmp_path: Path, status: int) -> None:
    hub.fail_files = {SHARD: [status] * 3, "config.json": [status]}
    assert same_files(fetch(tmp_path), repo)


@pytest.mark.parametrize(
    ("status", "message"), [(429, "too many requests.*HF_TOKEN"), (503, "the hub answers 503")]
)
def test_errors_that_stay(
    hub: StandInHub, repo: Path, tmp_path: Path, status: int, message: str
) -> None:
    hub.fail_files = {SHARD: [status] * 100}
    with pytest.raises(HubError, match=message) as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert "org/model" in str(caught.value)
    with pytest.raises(ValueError, match=f"only partly .*{SHARD} missing"):
        local_snapshot("org/model", None, tmp_path / "cache")


@pytest.mark.parametrize("name", [SHARD, "generation_config.json"])
def test_wrong_bytes(hub: StandInHub, repo: Path, tmp_path: Path, name: str) -> None:
    (repo / "generation_config.json").write_text('{"temperature": 0.5}')
    hub.corrupt = {name}
    kind = "SHA-256" if name == SHARD else "git SHA-1"
    with pytest.raises(HubError, match=f"{name} arrived with another {kind}"):
        fetch(tmp_path)
    cache = tmp_path / "cache/models--org--model"
    assert not (cache / "snapshots" / COMMIT / name).exists()
    blob = sha256(repo / name) if name == SHARD else git_sha1((repo / name).read_bytes())
    assert not list((cache / "blobs").glob(f"{blob}*"))
    hub.corrupt = set()
    assert same_files(fetch(tmp_path), repo)


def test_a_wrong_beginning_is_fetched_again(hub: StandInHub, repo: Path, tmp_path: Path) -> None:
    file = next(f for f in pull("org/model", None, tmp_path / "other").files if f.path == SHARD)
    blobs = tmp_path / "cache/models--org--model/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{file.blob}.incomplete").write_bytes(b"x" * 1000)
    assert same_files(fetch(tmp_path), repo)
    # Longer than the file: of no use at all.
    (blobs / file.blob).unlink()
    (blobs / f"{file.blob}.incomplete").write_bytes(b"x" * (file.size + 1))
    assert same_files(fetch(tmp_path), repo)
    # A content of the wrong length under the right name, as a crashed machine may leave it.
    (blobs / file.blob).write_bytes(b"")
    assert same_files(fetch(tmp_path), repo)


def test_a_hub_that_sends_everything_again(hub: StandInHub, repo: Path, tmp_path: Path) -> None:
    (repo / BIG).write_bytes(os.urandom(3 * 2**20))
    hub.ignores_range = True
    hub.cut_after = {BIG: [2 * 2**20 + 5]}
    seen: list[TransferProgress] = []

    class Recorder(Reporter):
        def progress(self, progress: TransferProgress) -> None:
            seen.append(progress)

    assert same_files(fetch(tmp_path, include=["*"], reporter=Recorder()), repo)
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert max(p.bytes_done for p in seen) == seen[-1].bytes_total


def start_pull(hub: StandInHub, cache: Path) -> subprocess.Popen[bytes]:
    words = ["pull", "org/model", "--include", "*.safetensors", "--include", BIG]
    return subprocess.Popen(
        [sys.executable, "-m", "moejet", *words, "--cache-dir", str(cache)],
        env=hub.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_partial(cache: Path, size: int, process: subprocess.Popen[bytes]) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in partials(cache):
            if path.exists() and path.stat().st_size >= size:
                return path
        assert process.poll() is None, process.communicate()
        real_sleep(0.02)
    raise AssertionError("the download did not get that far")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on(
    hub: StandInHub, repo: Path, tmp_path: Path, how: signal.Signals
) -> None:
    (repo / BIG).write_bytes(os.urandom(8 * 2**20 + 3))
    cache = tmp_path / "cache"
    hub.stall_after = {BIG: 5 * 2**20 + 2**19}
    process = start_pull(hub, cache)
    partial = wait_for_partial(cache, 5 * 2**20, process)
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    assert b"Traceback" not in err
    here = partial.stat().st_size
    assert here >= 5 * 2**20
    hub.released.set()
    hub.sent.clear()
    hub.requests.clear()
    process = start_pull(hub, cache)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"of it here already" in err
    assert same_files(Path(out.decode().strip()), repo)
    assert hub.sent[BIG] == 8 * 2**20 + 3 - here
    assert partials(cache) == []


def test_two_programs_at_once(hub: StandInHub, repo: Path, tmp_path: Path) -> None:
    (repo / BIG).write_bytes(os.urandom(3 * 2**20))
    total = sum(p.stat().st_size for p in repo.iterdir())
    processes = [start_pull(hub, tmp_path / "cache") for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert same_files(Path(out.decode().strip()), repo)
    assert sum(hub.sent.values()) == total


def test_no_space(
    hub: StandInHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HubError, match=r"needs .* MiB more on .*, where 4.9 KiB are free"):
        fetch(tmp_path)
    assert not hub.sent[SHARD]
    monkeypatch.undo()


def test_a_disk_that_fills_up(
    hub: StandInHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer_module._Sink, "write", write)
    with pytest.raises(HubError, match=r"No space left on device\); free some space"):
        fetch(tmp_path)


def test_a_repository_whose_upload_is_incomplete(
    hub: StandInHub, repo: Path, tmp_path: Path
) -> None:
    (repo / SHARD).unlink()
    with pytest.raises(ValueError, match=f"names {SHARD}, which the repository does not hold"):
        fetch(tmp_path)


def test_file_names_that_lead_elsewhere(
    hub: StandInHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = hub._info
    for name in ("../../evil.json", "/etc/evil.json", "a\\evil.json"):
        entry = {"rfilename": name, "size": 1, "blobId": "0" * 40}
        monkeypatch.setattr(hub, "_info", lambda *a, e=entry: {**info(*a), "siblings": [e]})
        with pytest.raises(HubError, match="refused the file name"):
            fetch(tmp_path)


def test_only_the_shards_of_the_index(hub: StandInHub, repo: Path, tmp_path: Path) -> None:
    (repo / "consolidated.safetensors").write_bytes(b"x" * 100)
    path = fetch(tmp_path)
    assert not (path / "consolidated.safetensors").exists()
    assert (fetch(tmp_path, include=["cons*"]) / "consolidated.safetensors").exists()
    with pytest.raises(ValueError, match=r"include='nothing\*' matches no file"):
        fetch(tmp_path, include=["nothing*"])
    with pytest.raises(ValueError, match="goes with a repository of GGUF files"):
        fetch(tmp_path, quant="Q4_K_M")


def test_a_new_commit(hub: StandInHub, repo: Path, tmp_path: Path) -> None:
    old = fetch(tmp_path)
    hub.commit = "f" * 40
    (repo / "generation_config.json").write_text('{"temperature": 0.1}')
    hub.sent.clear()
    hub.fail_with = 503
    assert resolve_model("org/model", None, tmp_path / "cache") == old
    hub.fail_with = None
    new = resolve_model("org/model", None, tmp_path / "cache")
    assert new.name == "f" * 40
    assert set(hub.sent) == {"generation_config.json"}
    assert local_snapshot("org/model", COMMIT, tmp_path / "cache") == old
    hub.requests.clear()
    assert resolve_model("org/model", COMMIT, tmp_path / "cache") == old
    assert hub.requests == []


def test_a_filesystem_without_links(
    hub: StandInHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(self: Path, target: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_link)
    path = fetch(tmp_path)
    assert same_files(path, repo)
    sent = sum(hub.sent.values())
    assert pull("org/model", None, tmp_path / "cache").bytes_fetched == 0
    assert sum(hub.sent.values()) == sent


def test_files_beyond_the_plain_limit_come_through_huggingface_hub(
    hub: StandInHub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = min(p.stat().st_size for p in repo.glob("*.safetensors")) - 1
    monkeypatch.setattr(transfer_module, "LARGEST_PLAIN_BYTES", limit)
    assert same_files(fetch(tmp_path), repo)
    shutil.rmtree(tmp_path / "cache")
    hub.corrupt = {SHARD}
    with pytest.raises(HubError, match=f"{SHARD} arrived with another SHA-256"):
        fetch(tmp_path)
    hub.corrupt = set()
    assert same_files(fetch(tmp_path), repo)


GGUF = {
    "m-Q4_K_M.gguf": 300,
    "m-UD-IQ2_XXS.gguf": 100,
    "Q8_0/m-Q8_0-00001-of-00002.gguf": 400,
    "Q8_0/m-Q8_0-00002-of-00002.gguf": 350,
    "BF16/m-00001-of-00001.gguf": 900,
    "mmproj-F16.gguf": 50,
    "m.gguf": 2000,
}


def test_names_of_quantisations() -> None:
    groups = quantisations(HubFile(name, size, "0" * 40, None) for name, size in GGUF.items())
    assert list(groups) == ["UD-IQ2_XXS", "Q4_K_M", "Q8_0", "BF16", "m"]
    assert [f.path for f in groups["Q8_0"]] == [n for n in GGUF if n.startswith("Q8_0/")]


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory, published: Path) -> Path:
    """A repository of two quantisations, one of them in shards, and files that are no models of ours."""
    root = tmp_path_factory.mktemp("gguf")
    (root / "Q8_0").mkdir()
    write_gguf(published, root / "Q8_0/m-Q8_0.gguf", "Q8_0", shard_tensors=20)
    write_gguf(published, root / "m-Q4_0.gguf", "Q4_0")
    write_gguf(published, root / "m-MXFP4.gguf", "MXFP4")
    llama = {"general.architecture": ("llama", gguf.GGUFValueType.STRING)}
    write_gguf(published, root / "m-F32.gguf", "F32", edit=lambda m: m.update(llama))
    (root / "mmproj-F16.gguf").write_bytes(b"x" * 50)
    (root / "m-Q6_K.gguf").write_bytes(b"GGUF" + b"\xff" * 100_000)
    return root


@pytest.fixture
def gguf_repo(hub: StandInHub, gguf_files: Path) -> Path:
    hub.repos["org/model"] = gguf_files
    return gguf_files


def test_gguf_repositories(hub: StandInHub, gguf_repo: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"several quantisations: Q6_K \(97.7 KiB\), .*as in org/model:Q6_K"
    ):
        fetch(tmp_path)
    with pytest.raises(ValueError, match=r"no quant='Q5_0'; it has Q6_K .*, MXFP4 .*, F32"):
        fetch(tmp_path, quant="Q5_0")
    path = fetch(tmp_path, quant="q8_0")
    names = {str(p.relative_to(path)) for p in path.rglob("*.gguf")}
    assert names == {f"Q8_0/{p.name}" for p in (gguf_repo / "Q8_0").iterdir()}
    assert len(names) == 2
    assert all((path / n).read_bytes() == (gguf_repo / n).read_bytes() for n in names)
    assert all(hub.sent[n] == (gguf_repo / n).stat().st_size for n in names)
    cache = tmp_path / "cache"
    for name in ("org/model", "org/model:Q8_0", "org/model:q8_0"):
        assert local_snapshot(name, None, cache) == path
    with pytest.raises(ValueError, match="Q4_0 GGUF file missing"):
        local_snapshot("org/model:Q4_0", None, cache)
    next(path.rglob("*-00002-of-*.gguf")).unlink()
    with pytest.raises(ValueError, match=r"m-Q8_0-00002-of-0000\d\.gguf missing"):
        local_snapshot("org/model", None, cache)


def test_a_quantisation_in_the_name_of_a_model(
    hub: StandInHub, gguf_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="no quant='Q5_K_M'; it has"):
        resolve_model("org/model:Q5_K_M", cache_dir=cache)
    four = resolve_model("org/model:q4_0", cache_dir=cache)
    assert four.name == "m-Q4_0.gguf"
    assert resolve_model("org/model", cache_dir=cache) == four  # the only one that is here
    eight = resolve_model("org/model:Q8_0", cache_dir=cache)
    assert eight.name.startswith("m-Q8_0-00001-of-")
    assert four.is_file()
    with pytest.raises(ValueError, match="one of org/model:Q4_0, org/model:Q8_0"):
        resolve_model("org/model", cache_dir=cache)
    sent = sum(hub.sent.values())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/model:Q8_0", cache_dir=cache) == eight
    with pytest.raises(ValueError, match="MXFP4 GGUF file missing"):
        resolve_model("org/model:MXFP4", cache_dir=cache)
    assert sum(hub.sent.values()) == sent
    with pytest.raises(ValueError, match=r"quant='Q4_0' contradicts model='org/model:Q8_0'"):
        pull("org/model:Q8_0", cache_dir=cache, quant="Q4_0")


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("F32", "m-F32.gguf cannot be loaded: .*'llama'"),
        ("MXFP4", r"m-MXFP4\.gguf cannot be loaded: .*MXFP4"),
        ("Q6_K", r"model='org/model': m-Q6_K\.gguf has a corrupt GGUF header: version 4294967295"),
    ],
)
def test_gguf_models_are_refused_before_their_weights(
    quant: str,
    message: str,
    hub: StandInHub,
    gguf_repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_module, "_FIRST_BYTES", 4096)
    with pytest.raises(ValueError, match=message) as caught:
        fetch(tmp_path, quant=quant)
    assert "moejet-" not in str(caught.value)
    [(name, sent)] = hub.sent.items()
    assert sent < 0.5 * (gguf_repo / name).stat().st_size


@pytest.mark.parametrize("ignores_range", [False, True])
def test_the_beginning_of_a_gguf_file_is_fetched_once(
    ignores_range: bool,
    hub: StandInHub,
    gguf_repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Headers of unknown length come piece by piece; the download goes on behind them."""
    monkeypatch.setattr(gguf_module, "_FIRST_BYTES", 1000)
    hub.ignores_range = ignores_range
    seen = pull("org/model:Q4_0", cache_dir=tmp_path / "cache", weights=False)
    assert seen.config is not None
    assert seen.config.quantization == "gguf"
    size = (gguf_repo / "m-Q4_0.gguf").stat().st_size
    if not ignores_range:
        [partial] = partials(tmp_path)
        assert partial.stat().st_size == hub.sent["m-Q4_0.gguf"] < 0.5 * size
    path = fetch(tmp_path, quant="Q4_0")
    assert (path / "m-Q4_0.gguf").read_bytes() == (gguf_repo / "m-Q4_0.gguf").read_bytes()
    assert ignores_range or hub.sent["m-Q4_0.gguf"] == size
    assert partials(tmp_path) == []


def test_the_configuration_of_a_gguf_model_on_the_hub(
    hub: StandInHub, gguf_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = resolve_config("org/model:Q4_0")
    assert config == GgufCheckpoint.open(gguf_repo / "m-Q4_0.gguf").config
    with pytest.raises(ValueError, match="several quantisations"):
        resolve_config("org/model")
