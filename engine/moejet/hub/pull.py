"""A hub id to a directory with checked files: from the hub, or from what is here already."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moejet.config import ModelConfig
from moejet.hub.cache import RepoCache, missing_files
from moejet.hub.errors import HubError, explain
from moejet.hub.listing import (
    HubFile,
    Listing,
    fetch_listing,
    is_gguf,
    small_files,
    split_quant,
    weight_files,
)
from moejet.hub.progress import Counter, Reporter
from moejet.hub.transfer import Fetcher, retried
from moejet.progress import gib
from moejet.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Pieces that huggingface_hub hands over: what is lost when the program is killed, per connection.
_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull left behind. path: the snapshot's directory · bytes_fetched: what came in this run.

    config: of the model; None for GGUF files chosen by patterns.
    """

    repo_id: str
    commit: str
    path: Path
    files: tuple[HubFile, ...]
    bytes_fetched: int
    config: ModelConfig | None

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


def pull(
    repo_id: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    *,
    include: Sequence[str] = (),
    quant: str | None = None,
    weights: bool = True,
    reporter: Reporter | None = None,
) -> PullResult:
    """Fetch a model; every file that arrives is compared with the hub's hash.

    config.json and the tokenizer come first (of GGUF files, which hold both, their first megabytes), and a model that
    moejet cannot run is refused before its weights.
    include: patterns of paths to fetch instead of the usual weights · quant: which of several GGUF quantisations ·
    weights: False fetches configuration and tokenizer only and reports the plan. `repo_id` may name the quantisation
    itself, "org/name:Q4_K_M".
    Raises ValueError, in one line with a remedy; HubError if network, hub or disk would not.
    """
    repo_id, named = split_quant(repo_id)
    if named is not None and quant not in (None, named):
        raise ValueError(f"quant={quant!r} contradicts model='{repo_id}:{named}': give one of them")
    choice = _Choice(tuple(include), named or quant, weights)
    try:
        with _library_settings():
            listing = retried(lambda: fetch_listing(repo_id, revision))
    except Exception as error:
        raise explain(error, repo_id, revision) from error
    return _pull(listing, revision, cache_dir, choice, reporter or Reporter())


def local_snapshot(
    repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The directory of a model ("org/name", "org/name:QUANT") that is in the cache, without the network.

    Raises ValueError, which names the files that are missing.
    """
    repo_id, quant = split_quant(repo_id)
    cache = RepoCache.of(repo_id, cache_dir)
    at = f" at revision {revision!r}" if revision else ""
    remedy = "go online and run `moejet pull`, or give a local directory"
    commit = cache.commit_of(revision)
    if commit is None or not cache.snapshot(commit).is_dir():
        raise ValueError(
            f"model={repo_id!r}{at} is not in the local cache ({cache.root}), and the hub cannot be "
            f"reached or is switched off (--offline, HF_HUB_OFFLINE); {remedy}"
        )
    path = cache.snapshot(commit)
    missing = missing_files(path, quant)
    if missing:
        names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" * (len(missing) > 4))
        raise ValueError(
            f"model={repo_id!r}{at} is only partly in {path}: {names} missing; {remedy}"
        )
    return path


def pull_or_local(
    repo_id: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """The directory of a model, "org/name" or "org/name:QUANT".

    As the hub has it now, or what is here if the hub cannot be asked.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    if is_offline():
        return local_snapshot(repo_id, revision, cache_dir)
    here: Path | None
    model = repo_id
    repo_id, quant = split_quant(model)
    try:
        here = local_snapshot(model, revision, cache_dir)
    except ValueError:
        here = None
    if here is not None and here.name == revision:  # a commit does not change
        return here
    try:
        with _library_settings():
            if here is None:
                listing = retried(lambda: fetch_listing(repo_id, revision))
            else:
                listing = fetch_listing(repo_id, revision)
    except Exception as error:
        if here is None or isinstance(error, RevisionNotFoundError):
            raise explain(error, repo_id, revision) from error
        logger.warning("%s: the hub does not answer; using what was fetched before", repo_id)
        return here
    if here is not None and here.name == listing.commit:
        return here
    choice = _Choice(quant=quant)
    return _pull(listing, revision, cache_dir, choice, reporter or Reporter()).path


def is_offline() -> bool:
    """HF_HUB_OFFLINE: only what is here counts."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which files of a repository to fetch; see `pull`."""

    include: tuple[str, ...] = ()
    quant: str | None = None
    weights: bool = True


def _pull(
    listing: Listing,
    revision: str | None,
    cache_dir: str | Path | None,
    choice: _Choice,
    reporter: Reporter,
) -> PullResult:
    cache = RepoCache.of(listing.repo_id, cache_dir)
    try:
        with _library_settings():
            return _fetch_all(listing, cache, revision, choice, reporter)
    except Exception as error:
        raise explain(error, listing.repo_id, revision) from error
    finally:
        reporter.close()


def _fetch_all(
    listing: Listing,
    cache: RepoCache,
    revision: str | None,
    choice: _Choice,
    reporter: Reporter,
) -> PullResult:
    commit = listing.commit
    path = cache.snapshot(commit)
    fetcher = Fetcher(listing, cache)
    small = small_files(listing)
    silent = Counter(Reporter(), 0, 0)
    config = _fetch_small(listing, small, cache, fetcher, silent)
    if cache.commit_of(revision) is None:
        cache.set_ref(revision, commit)  # so that offline use can say what is missing
    chosen = weight_files(listing, path, choice.include, choice.quant)
    if config is None and not choice.include:
        config = _fetch_headers(listing, chosen, fetcher, silent)
    fetched = silent.transferred
    files = [*small, *chosen]
    total = sum(file.size for file in files)
    present = sum(cache.present_bytes(file, commit) for file in files)
    reporter.plan(files, total, present - fetched)
    if choice.weights:
        _check_space(listing.repo_id, cache, total - present)
        counter = Counter(reporter, total, present)
        fetcher.fetch(files, counter)
        fetched += counter.transferred
        cache.set_ref(revision, commit)
    return PullResult(listing.repo_id, commit, path, tuple(files), fetched, config)


def _fetch_headers(
    listing: Listing, files: list[HubFile], fetcher: Fetcher, counter: Counter
) -> ModelConfig:
    """The beginnings of GGUF files; refuses what moejet cannot run."""
    from moejet.hub.gguf import fetch_config

    try:
        return fetch_config(fetcher, files, counter)
    except HubError:
        raise
    except ValueError as error:
        raise ValueError(f"model={listing.repo_id!r}: {error}") from error


def _fetch_small(
    listing: Listing, small: list[HubFile], cache: RepoCache, fetcher: Fetcher, counter: Counter
) -> ModelConfig | None:
    """Configuration, then tokenizer; refuses what moejet cannot run. None: the weights hold both."""
    path = cache.snapshot(listing.commit)
    if is_gguf(listing):  # these hold their own configuration and tokenizer
        fetcher.fetch(small, counter)
        return None
    file = listing.find("config.json")
    if file is None:
        raise ValueError(
            f"model={listing.repo_id!r} holds no config.json: it is not a transformers checkpoint"
        )
    fetcher.fetch([file], counter)
    config = ModelConfig.from_hf(path / "config.json")
    fetcher.fetch(small, counter)
    Tokenizer.from_path(path)
    return config


def _check_space(repo_id: str, cache: RepoCache, needed: int) -> None:
    place = cache.folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise HubError(
            f"model={repo_id!r} needs {gib(needed)} more on {place}, where {gib(free)} are free: free "
            "some space, or give another --cache-dir (HF_HUB_CACHE)"
        )


@contextmanager
def _library_settings() -> Iterator[None]:
    """No log lines and bars of huggingface_hub; small pieces."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        disable_progress_bars,
        enable_progress_bars,
    )

    bars = "huggingface_hub.http_get"
    # Its retries are logged line by line; what matters of them ends up in our one-line error.
    hub_logger = logging.getLogger("huggingface_hub")
    level, piece = hub_logger.level, constants.DOWNLOAD_CHUNK_SIZE
    hub_logger.setLevel(logging.ERROR)
    constants.DOWNLOAD_CHUNK_SIZE = _PIECE_BYTES
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars(bars)
    try:
        yield
    finally:
        if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            enable_progress_bars(bars)
        constants.DOWNLOAD_CHUNK_SIZE = piece
        hub_logger.setLevel(level)
