"""Contents from the hub into the cache: resumed where they stopped, hashed while they come.

huggingface_hub's `http_get` moves the bytes (redirects, tokens, reconnecting). Its own downloads start again from the
first byte after the process ended, so the file that it writes to is kept here, under the name that the library used
when it still resumed.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from moejet.hub.cache import RepoCache, Stopped, hash_file, new_digest
from moejet.hub.errors import CorruptFileError, is_passing
from moejet.hub.listing import HubFile, Listing
from moejet.hub.progress import Counter

logger = logging.getLogger(__name__)
T = TypeVar("T")

NUM_CONNECTIONS = 4
_NUM_RETRIES = 5
_CHUNK = 8 * 2**20
# The hub's limit for one plain request; larger files come through hf_xet, which does not resume.
LARGEST_PLAIN_BYTES = 50 * 10**9


class _Enough(Exception):
    """All that was wanted of a file is here."""


class _Sink(io.RawIOBase):
    """The file that `http_get` writes to: counts and hashes what goes in.

    limit: of its size; at the first write that reaches it _Enough is raised.
    """

    def __init__(
        self,
        raw: BinaryIO,
        file: HubFile,
        counter: Counter,
        stop: threading.Event,
        limit: int | None = None,
    ):
        self._raw = raw
        self._limit = limit
        self._file = file
        self._counter = counter
        self._stop = stop
        self._hash_what_is_there()

    def write(self, data: Any, /) -> int:
        """Write all of `data` and return its length."""
        if self._stop.is_set():
            raise Stopped
        view = memoryview(data)
        while view:
            view = view[self._raw.write(view) :]
        self._digest.update(data)
        self._counter.add(len(data))
        if self._limit is not None and self.tell() >= self._limit:
            raise _Enough
        return len(data)

    def tell(self) -> int:
        return self._raw.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._raw.seek(offset, whence)

    def truncate(self, size: int | None = None, /) -> int:
        before = os.fstat(self._raw.fileno()).st_size
        size = self._raw.truncate(size)
        self._counter.add(size - before)
        self._hash_what_is_there()
        return size

    def restart(self) -> None:
        self.seek(0)
        self.truncate()

    @property
    def is_correct(self) -> bool:
        return bool(self._digest.hexdigest() == self._file.blob)

    def _hash_what_is_there(self) -> None:
        self._digest = new_digest(self._file.blob, self._file.size)
        self._raw.seek(0)
        while chunk := self._raw.read(_CHUNK):
            self._digest.update(chunk)


class Fetcher:
    """Fetches files of one repository at one commit into its cache."""

    def __init__(self, listing: Listing, cache: RepoCache):
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self._listing = listing
        self._cache = cache
        self._headers = build_hf_headers(library_name="moejet")
        self._stop = threading.Event()

    def fetch(self, files: list[HubFile], counter: Counter) -> None:
        """Fetch what is not here, several files at a time, largest first.

        Returns when all are in the snapshot. At the first failure the other transfers are stopped and it is raised.
        """
        self._stop = threading.Event()
        todo = sorted(files, key=lambda file: file.size)
        errors: list[Exception] = []
        # Daemons: a connection that hangs must not keep a program alive that was told to stop.
        threads = [
            threading.Thread(target=self._work, args=(todo, counter, errors), daemon=True)
            for _ in range(min(NUM_CONNECTIONS, len(files)))
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not errors:
                threads[0].join(0.05)
                threads.sort(key=threading.Thread.is_alive, reverse=True)
        finally:
            self._stop.set()
        for thread in threads:
            thread.join(2)
        if errors:
            raise errors[0]

    def fetch_start(self, file: HubFile, num_bytes: int, counter: Counter) -> Path:
        """Something that begins with at least `num_bytes` of the file, or all of it; `fetch` goes on from there."""
        self._stop = threading.Event()
        num_bytes = min(num_bytes, file.size)
        if self._cache.has(file, self._listing.commit):
            self._cache.link(file, self._listing.commit)
            return self._cache.snapshot(self._listing.commit) / file.path
        partial = self._cache.partial(file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.lock(file.blob, self._stop):
            if self._cache.has(file, self._listing.commit):  # another program was faster
                return self.fetch_start(file, num_bytes, counter)
            if self._cache.present_bytes(file, self._listing.commit) < num_bytes:
                with _open_partial(partial, file) as raw:
                    sink = _Sink(raw, file, counter, self._stop, limit=num_bytes)
                    with suppress(_Enough):
                        self._transfer(file, sink, num_bytes)
        return partial

    def _work(self, todo: list[HubFile], counter: Counter, errors: list[Exception]) -> None:
        stop = self._stop
        try:
            while not stop.is_set():
                try:
                    file = todo.pop()
                except IndexError:
                    return
                self._fetch_one(file, counter)
        except Stopped:
            pass
        except Exception as error:
            errors.append(error)

    def _fetch_one(self, file: HubFile, counter: Counter) -> None:
        commit = self._listing.commit
        if self._cache.has(file, commit):
            self._cache.link(file, commit)
            return
        present = self._cache.present_bytes(file, commit)
        self._cache.blob(file).parent.mkdir(parents=True, exist_ok=True)
        if file.size > LARGEST_PLAIN_BYTES:
            self._fetch_large(file)
        with self._cache.lock(file.blob, self._stop):
            if self._cache.has(file, commit):  # another program was faster
                counter.add(file.size - present)
            else:
                self._fetch_plain(file, counter)
            self._cache.link(file, commit)
        counter.file_done(file)

    def _fetch_plain(self, file: HubFile, counter: Counter) -> None:
        partial = self._cache.partial(file)
        with _open_partial(partial, file) as raw:
            sink = _Sink(raw, file, counter, self._stop)
            was_resumed = sink.tell() > 0
            self._transfer(file, sink)
            if was_resumed and not sink.is_correct:
                # What an earlier run left may be what is wrong.
                sink.restart()
                self._transfer(file, sink)
            is_correct = sink.is_correct
            os.fsync(raw.fileno())
        if not is_correct:
            partial.unlink()
            raise self._corrupt(file)
        os.replace(partial, self._cache.blob(file))

    def _fetch_large(self, file: HubFile) -> None:
        """Leave the file to huggingface_hub and check it afterwards."""
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            self._listing.repo_id,
            file.path,
            revision=self._listing.commit,
            cache_dir=self._cache.root,
        )
        blob = os.path.realpath(path)
        if hash_file(blob, file.blob) != file.blob:
            os.unlink(blob)
            raise self._corrupt(file)
        self._cache.partial(file).unlink(missing_ok=True)  # of `fetch_start`

    def _transfer(self, file: HubFile, sink: _Sink, num_bytes: int | None = None) -> None:
        """Bring `sink` to its full length, or to `num_bytes`, through failures that may pass."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get

        url = hf_hub_url(self._listing.repo_id, file.path, revision=self._listing.commit)

        headers = dict(self._headers)
        if num_bytes is not None:
            headers["Range"] = f"bytes=0-{num_bytes - 1}"

        def attempt() -> None:
            if sink.tell() > file.size:
                sink.restart()
            http_get(
                url,
                sink,  # type: ignore[arg-type]  # it needs write, tell, seek and truncate
                resume_size=sink.tell(),
                headers=headers,
                expected_size=file.size if num_bytes is None else num_bytes,
                displayed_filename=file.path,
            )

        retried(attempt, sink.tell, self._stop)

    def _corrupt(self, file: HubFile) -> CorruptFileError:
        kind = "SHA-256" if file.sha256 else "git SHA-1"
        return CorruptFileError(
            f"model={self._listing.repo_id!r}: {file.path} arrived with another {kind} than the hub "
            f"names ({file.blob}); it was removed, run the command again"
        )


def _open_partial(partial: Path, file: HubFile) -> BinaryIO:
    """The beginning of a file, to go on with; emptied if it is longer than the whole."""
    raw = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    if os.fstat(raw.fileno()).st_size > file.size:
        raw.truncate(0)
    return raw


def retried(
    attempt: Callable[[], T],
    position: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> T:
    """Run `attempt` until it works, at most five more times without progress of `position`."""
    failures = 0
    while True:
        before = position()
        try:
            return attempt()
        except Exception as error:
            failures = 1 if position() > before else failures + 1
            if not is_passing(error) or failures > _NUM_RETRIES:
                raise
            if stop is not None and stop.is_set():
                raise Stopped from error
            seconds = min(2 ** (failures - 1), 8)
            logger.debug("%s: again in %d s", error, seconds)
            time.sleep(seconds)
