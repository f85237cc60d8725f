"""The local cache of hub files, in huggingface_hub's layout, so that other programs share it.

    models--org--name/
      blobs/HASH              contents; HASH: SHA-256 (files kept in LFS) or git's SHA-1 (small files)
      blobs/HASH.incomplete   the beginning of a content
      refs/REVISION           commit that a branch or tag had when it was fetched
      snapshots/COMMIT/PATH   link to the content
    .locks/models--org--name/HASH.lock

The layout is described at https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from moejet.hub.listing import INDEX, HubFile, quant_of, shards_of

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_CHUNK = 8 * 2**20


class Stopped(Exception):
    """Another file failed, or the user stopped the program."""


def cache_root(cache_dir: str | Path | None) -> Path:
    """`cache_dir`, or where huggingface_hub keeps its cache (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser().absolute()


@dataclass(frozen=True, slots=True)
class RepoCache:
    """One repository's part of the cache."""

    root: Path
    name: str

    @classmethod
    def of(cls, repo_id: str, cache_dir: str | Path | None = None) -> RepoCache:
        return cls(cache_root(cache_dir), "models--" + repo_id.replace("/", "--"))

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.blob

    def partial(self, file: HubFile) -> Path:
        return self.folder / "blobs" / f"{file.blob}.incomplete"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def has(self, file: HubFile, commit: str) -> bool:
        """Whether the content is here; its hash was checked when it got its name."""
        shown = self.snapshot(commit) / file.path  # itself the content where links do not work
        return file.size in (_size(self.blob(file)), _size(shown))

    def present_bytes(self, file: HubFile, commit: str) -> int:
        """Bytes of the content that need not be fetched again."""
        if self.has(file, commit):
            return file.size
        size = _size(self.partial(file))
        return size if size is not None and size <= file.size else 0

    def commit_of(self, revision: str | None) -> str | None:
        """The commit that a branch, tag or commit stands for here, or None if it was never fetched."""
        revision = revision or "main"
        if _COMMIT.fullmatch(revision):
            return revision
        ref = self.folder / "refs" / revision
        is_inside = (self.folder / "refs").resolve() in ref.resolve().parents
        return ref.read_text().strip() if is_inside and ref.is_file() else None

    def set_ref(self, revision: str | None, commit: str) -> None:
        """Remember the commit of a branch or tag."""
        revision = revision or "main"
        if revision == commit or self.commit_of(revision) == commit:
            return
        ref = self.folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        _replace_with(ref, lambda path: path.write_text(commit))

    def link(self, file: HubFile, commit: str) -> None:
        """Show a content under its path in a snapshot. Where links do not work, it is moved there."""
        blob, shown = self.blob(file), self.snapshot(commit) / file.path
        if shown.exists():
            return
        shown.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(blob, shown.parent)
        try:
            _replace_with(shown, lambda path: path.symlink_to(target))
        except OSError:
            os.replace(blob, shown)

    @contextmanager
    def lock(self, blob: str, stop: threading.Event) -> Iterator[None]:
        """Wait until no other program fetches this content; huggingface_hub takes the same lock.

        Raises Stopped if `stop` is set meanwhile. Where files cannot be locked there is no waiting; contents still get
        their names only after their hashes were checked.
        """
        path = self._lock_path(blob)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, mode=0o664)
        while not lock.is_locked:
            if stop.is_set():
                raise Stopped
            try:
                lock.acquire(timeout=0.5)
            except Timeout:
                continue
            except NotImplementedError:
                break
        try:
            yield
        finally:
            lock.release()

    def is_in_use(self, blob: str) -> bool:
        """Whether some program holds the lock of this content."""
        path = self._lock_path(blob)
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True

    def _lock_path(self, blob: str) -> Path:
        return self.root / ".locks" / self.name / f"{blob}.lock"


def missing_files(snapshot: Path, quant: str | None = None) -> list[str]:
    """What a snapshot lacks to be loaded: configuration, tokenizer, weights that an index names.

    quant: only of this quantisation.
    """
    parts = [str(p.relative_to(snapshot)) for p in snapshot.rglob("*.gguf") if p.is_file()]
    if quant is not None:
        parts = [part for part in parts if quant_of(part) == quant.upper()]
        if not parts:
            return [f"{quant.upper()} GGUF file"]
    if parts:
        return [name for part in parts for name in _siblings(part) if name not in parts]
    missing = [] if (snapshot / "config.json").is_file() else ["config.json"]
    if not any((snapshot / n).is_file() for n in ("tokenizer.json", "tiktoken.model")):
        missing.append("tokenizer.json")
    index = snapshot / INDEX
    if index.is_file():
        missing += [name for name in shards_of(index) if not (snapshot / name).is_file()]
    elif not any(p.is_file() for p in snapshot.glob("*.safetensors")):
        missing.append("model.safetensors")
    return missing


def _siblings(part: str) -> list[str]:
    match = _PART.fullmatch(part)
    if match is None:
        return []
    total = match[2]
    return [f"{match[1]}-{i + 1:05}-of-{total}.gguf" for i in range(int(total))]


def new_digest(blob: str, size: int) -> Any:
    """A running hash of the kind whose hex digest names the content `blob` of `size` bytes."""
    if len(blob) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


@dataclass(slots=True)
class Verification:
    """Paths in a snapshot, by the outcome of comparing content and hash."""

    correct: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


def verify_snapshot(snapshot: Path, on_bytes: Callable[[int], None]) -> Verification:
    """Read every file and compare it with the hash that names its content; corrupt ones are removed.

    Files that are no links into `blobs` have no name to compare with: `unnamed`.
    """
    result = Verification()
    for path in sorted(snapshot.rglob("*")):
        if not path.is_file():
            continue
        name, blob = str(path.relative_to(snapshot)), path.resolve()
        if not path.is_symlink() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            result.unnamed.append(name)
        elif hash_file(blob, blob.name, on_bytes) == blob.name:
            result.correct.append(name)
        else:
            path.unlink()
            blob.unlink()
            result.corrupt.append(name)
    return result


def hash_file(path: str | Path, blob: str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Hash of a file, of the kind that names the content `blob`."""
    digest = new_digest(blob, os.path.getsize(path))
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            on_bytes(len(chunk))
    return str(digest.hexdigest())


@dataclass(frozen=True, slots=True)
class Orphan:
    """A file in the cache that nothing needs."""

    path: Path
    size: int
    kind: Literal["incomplete", "unreferenced"]


def find_orphans(cache_dir: str | Path | None = None, repo_id: str | None = None) -> list[Orphan]:
    """Beginnings of downloads, and contents that no snapshot shows; not what is being fetched now.

    Looks at one repository, or at all models of the cache.
    """
    root = cache_root(cache_dir)
    names = (
        [RepoCache.of(repo_id, cache_dir).name]
        if repo_id
        else sorted(p.name for p in root.glob("models--*"))
    )
    return [orphan for name in names for orphan in _orphans_of(RepoCache(root, name))]


def _orphans_of(repo: RepoCache) -> Iterator[Orphan]:
    # Contents first: a download that ends meanwhile may then only be missing from the orphans.
    blobs = sorted(p for p in (repo.folder / "blobs").glob("*") if p.is_file() or p.is_symlink())
    shown = {
        os.path.abspath(path.parent / os.readlink(path))
        for path in (repo.folder / "snapshots").rglob("*")
        if path.is_symlink()
    }
    for blob in blobs:
        is_partial = blob.name.endswith(".incomplete")
        if not is_partial and os.path.abspath(blob) in shown:
            continue
        # Newer versions of huggingface_hub put a random part between the hash and the suffix.
        if not repo.is_in_use(blob.name.partition(".")[0]):
            kind: Literal["incomplete", "unreferenced"]
            kind = "incomplete" if is_partial else "unreferenced"
            yield Orphan(blob, blob.lstat().st_size, kind)


def remove_orphans(orphans: list[Orphan]) -> int:
    """Remove them; returns the bytes set free."""
    freed = 0
    for orphan in orphans:
        orphan.path.unlink(missing_ok=True)
        freed += orphan.size
    return freed


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _replace_with(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file or link beside `path` and move it there in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    make(temporary)
    os.replace(temporary, path)
