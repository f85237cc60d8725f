"""The disk below the latent cache: full blocks are written behind the engine's back and read when a request begins.

Nothing waits for the disk but a read that costs less than computing. The engine's thread only notes which blocks have
become full; another thread copies them out of the cache, checks that they were not given away meanwhile, and writes
them in batches. When it cannot keep up, blocks are not written.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moejet import __version__
from moejet.block_pool import BlockPool
from moejet.cache_blocks import Bytes, CacheBlocks
from moejet.config import EngineConfig
from moejet.environment import env_cache_dir, use_reference
from moejet.framed_file import fingerprint_of
from moejet.prefix_store import PrefixStore

if TYPE_CHECKING:
    from moejet.engine import Engine

logger = logging.getLogger(__name__)

_LAYOUT_VERSION = 1  # of blocks: raised when the same tokens give other bytes
_MAX_DELAY_S = 20.0  # that a full block waits for others to be written with
_PAUSE_S = 60.0  # after the disk has refused
_QUEUE_BLOCKS = 4096
_FIRST_READ_RATE = 5e8  # bytes/s, until it has been measured


class PrefixTier:
    """A store of blocks behind a pool and its cache. One thread calls it.

    min_tokens: contexts shorter than this are not written.
    """

    def __init__(self, store: PrefixStore, pool: BlockPool, cache: CacheBlocks, *, min_tokens: int):
        self.store = store
        self.min_tokens = min_tokens
        self._cache = cache
        self._bytes = cache.block_bytes
        self._read_rate = _FIRST_READ_RATE
        self._writer = _Writer(store, pool, cache)
        # The thread holds the cache, not this object: whoever forgets to close it loses neither blocks nor memory.
        self.close = weakref.finalize(self, self._writer.stop)

    @property
    def num_blocks(self) -> int:
        return self.store.num_blocks

    @property
    def num_evictions(self) -> int:
        return self.store.num_evictions

    def offer(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
        """Notes that these held blocks are full and should be on disk."""
        self._writer.offer(blocks, digests)

    def flush(self) -> None:
        """Waits until everything offered is on disk, or was dropped."""
        self._writer.flush()

    def count(self, digests: Sequence[bytes]) -> int:
        """How many blocks of a chain, from the first of `digests` on, could be read."""
        if not digests:
            return 0
        self.store.refresh()
        return self.store.count(digests)

    def read(self, digests: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Reads a chain into blocks of the cache that nobody else holds; returns how many came."""
        start = time.perf_counter()

        def take(i: int, data: Bytes) -> None:
            self._cache.write(blocks[i], data)

        done = self.store.read(digests, take)
        elapsed = time.perf_counter() - start
        if done:
            rate = done * self._bytes / max(elapsed, 1e-9)
            self._read_rate += 0.5 * (rate - self._read_rate)
        return done

    def read_seconds(self, num_blocks: int) -> float:
        """How long reading so many blocks will take."""
        return num_blocks * self._bytes / self._read_rate

    def expect_faster(self) -> None:
        """A read that was not worth it could not show that it would have been faster than the last ones."""
        self._read_rate *= 1.1


class _Writer:
    """The queue of blocks to be written, and the thread that empties it."""

    def __init__(self, store: PrefixStore, pool: BlockPool, cache: CacheBlocks):
        self._store, self._pool, self._cache = store, pool, cache
        self._queue: deque[tuple[bytes, int, int]] = deque()  # digest, block, its generation
        self._pending: set[bytes] = set()  # in the queue or in the batch
        self._used: deque[bytes] = deque(maxlen=_QUEUE_BLOCKS)
        self._batch: list[bytes] = []
        self._staging: Bytes | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._num_flushes = self._num_flushed = 0
        self._paused_until = 0.0
        self._has_warned = False
        self._thread = threading.Thread(target=self._run, name="moejet-prefix", daemon=True)
        self._thread.start()

    def offer(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
        with self._changed:
            if self._stopping:
                return
            for block, digest in zip(blocks, digests, strict=True):
                if digest in self._store:
                    self._used.append(digest)
                elif digest not in self._pending and len(self._queue) < _QUEUE_BLOCKS:
                    self._pending.add(digest)
                    self._queue.append((digest, block, self._pool.generation(block)))
            self._changed.notify_all()

    def flush(self) -> None:
        with self._changed:
            self._num_flushes += 1
            mine = self._num_flushes
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_flushed >= mine or self._stopping)

    def stop(self) -> None:
        """Writes what is left and ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # garbage is collected in any thread
            self._thread.join()

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            logger.exception("prefixes are not written any more")
        finally:
            with self._changed:
                self._stopping = True
                self._changed.notify_all()

    def _loop(self) -> None:
        deadline: float | None = None  # of what is in the batch
        while True:
            with self._changed:
                timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
                self._changed.wait_for(self._is_needed, timeout)
                stopping, flushes = self._stopping, self._num_flushes
            self._touch()
            has_flushed = flushes > self._num_flushed
            while self._queue:
                self._copy_out(*self._queue.popleft())
                if len(self._batch) == self._store.segment_blocks:
                    self._write()
            due = deadline is not None and time.monotonic() >= deadline
            if self._batch and (stopping or has_flushed or due):
                self._write()
            if not self._batch:
                deadline = None
            elif deadline is None:
                deadline = time.monotonic() + _MAX_DELAY_S
            with self._changed:
                self._num_flushed = max(self._num_flushed, flushes)
                self._changed.notify_all()
            if stopping:
                return

    def _is_needed(self) -> bool:
        return bool(
            self._queue or self._used or self._stopping or self._num_flushes > self._num_flushed
        )

    def _touch(self) -> None:
        used = [self._used.popleft() for _ in range(len(self._used))]
        if used:
            self._store.mark_used(used)

    def _copy_out(self, digest: bytes, block: int, generation: int) -> None:
        """Adds a block to the batch, unless it has been given away."""
        if self._staging is None:
            shape = (self._store.segment_blocks, self._cache.block_bytes)
            self._staging = np.empty(shape, np.uint8)
        self._cache.read(block, self._staging[len(self._batch)])
        # Contents change after the generation does, so a copy that ends before it changes is whole.
        if self._pool.generation(block) == generation:
            self._batch.append(digest)
        else:
            self._pending.discard(digest)

    def _write(self) -> None:
        """Writes the batch as one segment, without what another process has written meanwhile."""
        assert self._staging is not None
        try:
            if time.monotonic() >= self._paused_until:
                self._store.refresh()
                rows = [i for i, digest in enumerate(self._batch) if digest not in self._store]
                staging = self._staging
                self._store.write([self._batch[i] for i in rows], (staging[i] for i in rows))
        except OSError as error:
            self._paused_until = time.monotonic() + _PAUSE_S
            if not self._has_warned:
                self._has_warned = True
                reason = error.strerror or str(error)
                if error.errno == errno.ENOSPC:
                    reason = "no room on the disk"
                logger.warning("prefixes are not kept in %s: %s", self._store.root, reason)
        finally:
            self._pending.difference_update(self._batch)
            self._batch.clear()


def attach_prefixes(engine: Engine, weights: dict[str, Any]) -> None:
    """Gives an engine's blocks their fingerprint, and puts a store behind them if it is configured.

    weights: what decides about them (`packed_cache.weights_key`). Raises ValueError if the store cannot be.
    """
    config = engine.config
    engine.prefix_key = {
        "version": f"{__version__}, blocks {_LAYOUT_VERSION}",
        **weights,
        "arithmetic": config.arithmetic,
        "block_size": config.block_size,
        "cache_dtype": config.cache_dtype,
        "deterministic": config.deterministic,
        "isa": engine.runner.isa,
        "reference": use_reference(),
    }
    if not config.prefix_caching:
        return
    fingerprint = fingerprint_of(engine.prefix_key)
    engine.scheduler.root = bytes.fromhex(fingerprint)
    if not config.prefix_disk_gib:
        return
    root = prefix_directory(config)
    cache = CacheBlocks(engine.runner.latent_cache)
    store = PrefixStore(
        root,
        model=config.model,
        fingerprint=fingerprint,
        block_bytes=cache.block_bytes,
        max_bytes=int(config.prefix_disk_gib * 2**30),
    )
    tier = PrefixTier(store, engine.block_pool, cache, min_tokens=config.prefix_min_tokens)
    engine.scheduler.store = tier
    engine.at_close.callback(tier.close)


def prefix_directory(config: EngineConfig) -> Path:
    """prefix_dir, or prefix in the cache directory."""
    if config.prefix_dir is not None:
        return Path(config.prefix_dir).expanduser()
    directory = env_cache_dir()
    if directory is None:
        raise ValueError(
            f"prefix_disk_gib={config.prefix_disk_gib!r} needs a directory, and MOEJET_CACHE is off: "
            "set prefix_dir"
        )
    return directory / "prefix"
