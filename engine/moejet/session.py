"""A conversation's latents in one file, so that its next turn computes only what is new.

The file (`block_file`) holds all full blocks of the conversation, its tokens and messages, and what decided about the
latents. The tokens after the last full block, fewer than block_size, are computed again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejet.block_file import BlockHeader, Bytes, read_block, read_header, write_blocks
from moejet.block_pool import extend_hashes
from moejet.cache_blocks import CacheBlocks
from moejet.engine import Engine
from moejet.framed_file import fingerprint_of
from moejet.validation import short


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation whose latents are in the cache; messages: None if it was given as token ids."""

    token_ids: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...] | None
    num_cached_tokens: int


def save(
    engine: Engine,
    path: Path,
    token_ids: Sequence[int],
    messages: Sequence[Mapping[str, Any]] | None,
) -> Session:
    """Writes the latents of tokens that have been computed. Raises ValueError if the disk refuses."""
    blocks = []
    for digest in _hashes(engine, token_ids):
        block = engine.block_pool.find(digest)
        if block is None:
            break
        blocks.append(block)
    cache = CacheBlocks(engine.runner.latent_cache)
    try:
        write_blocks(
            path,
            _copies(cache, blocks),
            _hashes(engine, token_ids)[: len(blocks)],
            fingerprint=fingerprint_of(engine.prefix_key),
            block_bytes=cache.block_bytes,
            info={
                "key": engine.prefix_key,
                "token_ids": list(token_ids),
                "messages": None if messages is None else [dict(m) for m in messages],
            },
        )
    except OSError as error:
        reason = "no room on the disk" if error.errno == errno.ENOSPC else error.strerror
        raise ValueError(
            f"path={short(str(path))}: the session cannot be saved there, {reason}; choose another place"
        ) from error
    return _session(token_ids, messages, len(blocks) * engine.config.block_size)


def load(engine: Engine, path: Path) -> Session:
    """Reads a saved session into the cache. Raises ValueError, naming why, if it does not fit this engine."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(
            f"path={short(str(path))}: the session cannot be read, {error.strerror}; check the path"
        ) from error
    try:
        header = read_header(fd)
        _check_key(engine, header)
        token_ids, messages = header.info["token_ids"], header.info["messages"]
        vocab = engine.model_config.vocab_size
        if not all(isinstance(t, int) and 0 <= t < vocab for t in token_ids):
            raise ValueError("it holds tokens that the model does not know")
        hashes = _hashes(engine, token_ids)[: len(header.digests)]
        if tuple(hashes) != header.digests:
            raise ValueError("its tokens are not those of its blocks")
        _fill(engine, fd, header)
    except KeyError as error:
        raise ValueError(
            f"the session {path} cannot be used: it lacks {error}; save it again"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"the session {path} cannot be used: {error}") from error
    finally:
        os.close(fd)
    return _session(token_ids, messages, len(hashes) * engine.config.block_size)


def _fill(engine: Engine, fd: int, header: BlockHeader) -> None:
    """Blocks into the pool, idle and ready to be found; those that are there already are not read."""
    pool, cache = engine.block_pool, CacheBlocks(engine.runner.latent_cache)
    if header.block_bytes != cache.block_bytes:
        raise ValueError(f"its blocks have {header.block_bytes} bytes, not {cache.block_bytes}")
    data = np.empty(header.block_bytes, np.uint8)
    # Held until all are there, so that none evicts another.
    table: list[int] = []
    try:
        for index, digest in enumerate(header.digests):
            found = pool.find(digest)
            if found is not None:
                pool.share([found])
                table.append(found)
                continue
            if not pool.extend(table, (len(table) + 1) * pool.block_size):
                raise ValueError(
                    f"its {len(header.digests) * pool.block_size} tokens do not fit into the cache: "
                    "raise cache_tokens or let running requests finish"
                )
            read_block(fd, header, index, data)
            cache.write(table[-1], data)
            pool.register(table[-1], digest)
    finally:
        pool.release(table)


def _check_key(engine: Engine, header: BlockHeader) -> None:
    saved, mine = dict(header.info["key"]), engine.prefix_key
    if fingerprint_of(saved) != header.fingerprint:
        raise ValueError("its header contradicts itself")
    if header.fingerprint == fingerprint_of(mine):
        return
    differing = []
    for name in sorted(saved.keys() | mine.keys()):
        if _plain(saved.get(name)) != _plain(mine.get(name)):
            differing += _differences(name, saved.get(name), mine.get(name))
    raise ValueError(f"it was saved with another {'; '.join(differing)}")


def _differences(name: str, saved: Any, mine: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = [k for k in sorted(saved.keys() | mine.keys()) if saved.get(k) != mine.get(k)]
        return [f"{name}.{k} ({saved.get(k)}, here {mine.get(k)})" for k in keys]
    if name == "sources":
        return ["checkpoint (its weight files differ in name, size or time)"]
    return [f"{name} ({saved}, here {mine})"]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _hashes(engine: Engine, token_ids: Sequence[int]) -> list[bytes]:
    root = engine.scheduler.root
    if root is None:
        raise ValueError("sessions need prefix_caching=True")
    return extend_hashes([], root, token_ids, engine.config.block_size)


def _copies(cache: CacheBlocks, blocks: Sequence[int]) -> Iterator[Bytes]:
    """The blocks one after another, in the same memory."""
    data = np.empty(cache.block_bytes, np.uint8)
    for block in blocks:
        cache.read(block, data)
        yield data


def _session(
    token_ids: Sequence[int], messages: Sequence[Mapping[str, Any]] | None, num_cached: int
) -> Session:
    return Session(tuple(token_ids), None if messages is None else tuple(messages), num_cached)
