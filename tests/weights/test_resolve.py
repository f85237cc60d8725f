"""moejet.weights.resolve: aliases, directories, and hub ids against a local stand-in for the hub's HTTP API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from moejet.testing.checkpoints import tiny_checkpoint
from moejet.weights import TINY_REASONER, Checkpoint, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves directories as repositories at revision "main"; records the paths that were asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.fail_with: int | None = None
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, http: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = unquote(urlsplit(http.path).path).strip("/")
        self.requests.append(f"{http.command} {path}")
        parts = path.split("/")
        is_api = parts[:2] == ["api", "models"]
        repo_id = "/".join(parts[2:4] if is_api else parts[:2])
        rest = parts[4:] if is_api else parts[2:]
        root = self.repos.get(repo_id)
        if self.fail_with is not None:
            return reply(http, self.fail_with, b"the hub is on fire")
        if root is None:
            return reply(http, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo_id in self.gated:
            return reply(http, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return reply(http, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(p for p in root.rglob("*") if p.is_file())
        names = [str(p.relative_to(root)) for p in files]
        if is_api:
            entries = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": oid(p)}
                for n, p in zip(names, files, strict=True)
            ]
            info = {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            body: object = entries if rest[:1] == ["tree"] else info
            return reply(http, 200, json.dumps(body).encode())
        name = "/".join(rest[2:])
        if name not in names:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return reply(http, 404, b"{}", headers)
        data = (root / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(root / name)}"'}
        return reply(http, 200, data, headers, with_body=with_body)


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def reply(
    http: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    with_body: bool = True,
) -> None:
    http.send_response(status)
    http.send_header("Content-Length", str(len(body)))
    http.send_header("Content-Type", "application/json")
    for key, value in (headers or {}).items():
        http.send_header(key, value)
    http.end_headers()
    if with_body and http.command != "HEAD":
        http.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The library waits between its retries; what counts here is how it gives up.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    yield server
    server.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repo")
    return tiny_checkpoint(root, "moonlight", num_shards=2, num_hidden_layers=2)


def test_downloads_what_is_needed(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
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
    hub: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    hub.repos["org/model"] = checkpoint
    root = resolve_model("org/model", cache_dir=tmp_path)
    hub.fail_with = 503
    assert resolve_model("org/model", cache_dir=tmp_path) == root


def test_refuses_an_unsupported_model_before_its_weights(hub: Hub, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "config.json").write_text('{"model_type": "llama"}')
    (repo / "model.safetensors").write_bytes(b"x" * 100)
    hub.repos["org/llama"] = repo
    with pytest.raises(ValueError, match="model_type='llama' is not supported"):
        resolve_model("org/llama", cache_dir=tmp_path / "cache")
    assert not [r for r in hub.requests if "safetensors" in r]


def test_hub_errors_are_one_line_with_a_remedy(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
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


def test_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.close()
    with pytest.raises(ValueError, match="not in the local cache and the hub cannot be reached"):
        resolve_model("org/model", cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="not in the local cache and the hub cannot be reached"):
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
    hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
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
def test_bad_names(hub: Hub, model: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resolve_model(model)
    assert hub.requests == []


def test_unusable_local_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json; supported"):
        resolve_model(str(tmp_path))
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with pytest.raises(ValueError, match="GGUF file, which this version does not read yet"):
        resolve_model(str(gguf))
    with pytest.raises(ValueError, match="holds GGUF files"):
        resolve_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="is a file; give the directory"):
        resolve_model(str(file))


def test_embedded_model() -> None:
    root = resolve_model(TINY_REASONER)
    assert root.name == "tiny_reasoner"
    assert (root / "config.json").is_file()
    assert (root / "tokenizer.json").is_file()
