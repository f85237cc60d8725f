"""A stand-in for a model hub on this machine: the part of its HTTP interface that downloads use, with faults on demand.

Serves directories as repositories. Files that a hub would keep in LFS (weights) answer with a redirect to a second
path, as the real one redirects to a content network.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
_PIECE = 64 * 2**10


class StandInHub:
    """The hub; faults are attributes that tests set, what happened is in `requests` and `sent`.

    repos: repository id -> directory; each has the branch "main" at `commit`.
    requests: "METHOD path" of every request, redirects included.
    sent: bytes of content sent, by file name.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.commit = COMMIT
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()
        self.tokens: set[str] = set()
        # Faults.
        self.gated: set[str] = set()
        self.fail_with: int | None = None  # every request
        self.fail_files: dict[str, list[int]] = {}  # file -> statuses of its next requests
        self.cut_after: dict[str, list[int]] = {}  # file -> bytes after which connections break
        self.stall_after: dict[str, int] = {}  # file -> bytes after which connections hang
        self.corrupt: set[str] = set()  # files of which a byte is wrong
        self.ignores_range = False
        self.released = threading.Event()  # ends stalls
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict[str, str]:
        """Variables that point another process to this hub."""
        switches = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return os.environ | switches

    def _answer(self, http: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(http.path).path).strip("/")
        self.requests.append(f"{http.command} {path}")
        token = http.headers.get("Authorization", "").removeprefix("Bearer ")
        if token:
            self.tokens.add(token)
        parts = path.split("/")
        is_api = parts[:2] == ["api", "models"]
        is_content = parts[0] == "content"
        skip = 2 if is_api else 1 if is_content else 0
        repo_id, rest = "/".join(parts[skip : skip + 2]), parts[skip + 2 :]
        root = self.repos.get(repo_id)
        if self.fail_with is not None:
            return _reply(http, self.fail_with, b"the hub is on fire")
        if root is None:
            return _reply(http, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo_id in self.gated and not is_api:
            return _reply(http, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        if not is_content and len(rest) > 1 and rest[1] not in ("main", self.commit):
            return _reply(http, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            return _reply(http, 200, json.dumps(self._info(repo_id, root)).encode())
        name = "/".join(rest if is_content else rest[2:])
        if not (root / name).is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}
            return _reply(http, 404, b"{}", headers)
        if self.fail_files.get(name):
            status = self.fail_files[name].pop(0)
            return _reply(http, status, b"not now", {"Retry-After": "0"})
        if name.endswith(_LFS_SUFFIXES) and not is_content:
            return self._redirect(http, repo_id, root, name)
        return self._send(http, root, name)

    def _info(self, repo_id: str, root: Path) -> dict[str, Any]:
        siblings = []
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name = str(path.relative_to(root))
            entry: dict[str, Any] = {"rfilename": name, "size": path.stat().st_size}
            entry["blobId"] = git_sha1(path.read_bytes())
            if name.endswith(_LFS_SUFFIXES):
                lfs = {"size": entry["size"], "sha256": sha256(path), "pointerSize": 134}
                entry["lfs"] = lfs
            siblings.append(entry)
        return {"id": repo_id, "sha": self.commit, "siblings": siblings}

    def _redirect(self, http: BaseHTTPRequestHandler, repo_id: str, root: Path, name: str) -> None:
        headers = {
            "X-Repo-Commit": self.commit,
            "X-Linked-Size": str((root / name).stat().st_size),
            "X-Linked-ETag": f'"{sha256(root / name)}"',
            "Location": f"{self.url}/content/{repo_id}/{quote(name)}",
        }
        _reply(http, 302, b"", headers)

    def _send(self, http: BaseHTTPRequestHandler, root: Path, name: str) -> None:
        data = (root / name).read_bytes()
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{git_sha1(data)}"'}
        if name in self.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, end = 0, len(data)
        wanted = http.headers.get("Range")
        is_part = bool(wanted) and not self.ignores_range
        if wanted and is_part:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(end, int(last) + 1) if last else end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        http.send_response(206 if is_part else 200)
        for key, value in {**headers, "Content-Length": str(end - start)}.items():
            http.send_header(key, value)
        http.end_headers()
        if http.command == "HEAD":
            return
        if self.cut_after.get(name):
            end = min(end, start + self.cut_after[name].pop(0))
        stall = self.stall_after.get(name)
        while start < end:
            if stall is not None and self.sent[name] >= stall and not self.released.is_set():
                self.released.wait(60)
                return
            piece = data[start : min(end, start + _PIECE)]
            try:
                http.wfile.write(piece)
            except OSError:  # the client went away
                return
            start += len(piece)
            self.sent[name] += len(piece)


def git_sha1(data: bytes) -> str:
    """Git's name for a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _reply(
    http: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    http.send_response(status)
    http.send_header("Content-Length", str(len(body)))
    http.send_header("Content-Type", "application/json")
    for key, value in (headers or {}).items():
        http.send_header(key, value)
    http.end_headers()
    if http.command != "HEAD":
        http.wfile.write(body)
