"""The disk behind a pool of blocks without a model: what is written, dropped, swept and counted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moejet import block_file, framed_file, prefix_tier
from moejet.block_pool import BlockPool
from moejet.cache_blocks import CacheBlocks
from moejet.prefix_store import PrefixStore, segments
from moejet.prefix_tier import PrefixTier


def _tier(tmp_path: Path, num_blocks: int = 8) -> tuple[PrefixTier, BlockPool, np.ndarray]:
    pool = BlockPool(num_blocks, 4)
    cache = np.zeros((3, num_blocks, 100), np.uint8)
    store = PrefixStore(
        tmp_path / "p", model="m", fingerprint="f" * 20, block_bytes=300, max_bytes=1 << 24
    )
    return PrefixTier(store, pool, CacheBlocks(torch.from_numpy(cache)), min_tokens=1), pool, cache


def test_blocks_given_away_meanwhile_are_not_written(tmp_path: Path) -> None:
    tier, pool, cache = _tier(tmp_path)
    table: list[int] = []
    pool.extend(table, 8)
    cache[:, table[0]], cache[:, table[1]] = 1, 2
    blocks = list(table)
    with tier._writer._changed:  # the thread waits meanwhile
        tier.offer(blocks, [b"a" * 16, b"b" * 16])
        pool.release(table)
        pool.extend(table, 4)
        given_away = blocks.index(table[0])
        cache[:, table[0]] = 9
    tier.flush()
    kept = b"ba"[given_away : given_away + 1] * 16
    assert [d in tier.store for d in (b"a" * 16, b"b" * 16)] == [given_away == 1, given_away == 0]
    pool.extend(table, 8)
    assert tier.read([kept, b"c" * 16], table) == 1
    assert (cache[:, table[0]] == 2 - given_away).all()
    tier.close()


def test_a_full_queue_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tier, "_QUEUE_BLOCKS", 3)
    tier, pool, _ = _tier(tmp_path)
    table: list[int] = []
    pool.extend(table, 32)
    digests = [bytes([i]) * 16 for i in range(8)]
    with tier._writer._changed:
        tier.offer(table, digests)
    tier.flush()
    assert [d in tier.store for d in digests] == [True] * 3 + [False] * 5
    # They may be offered again.
    tier.offer(table[3:5], digests[3:5])
    tier.flush()
    assert tier.count(digests) == 5
    tier.close()
    tier.offer(table, digests)  # after the end: nothing
    tier.flush()


def test_segments_are_swept_unless_their_writer_lives(tmp_path: Path) -> None:
    tier, pool, _ = _tier(tmp_path)
    tier.store.directory.mkdir(parents=True)
    dead = tier.store.directory / "x.blocks.1-1.tmp"
    dead.write_bytes(b"x" * 100)
    os.utime(dead, (1, 1))
    foreign = tier.store.directory / "y.blocks"
    block_file.write_blocks(
        foreign, [np.zeros(7, np.uint8)], [b"a" * 16], fingerprint="?", block_bytes=7, info={}
    )
    table: list[int] = []
    pool.extend(table, 4)
    tier.offer(table, [b"b" * 16])
    tier.close()
    assert not dead.exists()
    assert not foreign.exists()
    assert tier.store.num_blocks == 1


def test_an_index_of_many_segments_reads_their_headers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "p" / f"m-{'f' * 20}"
    directory.mkdir(parents=True)
    block = np.zeros(300, np.uint8)
    for i in range(300):
        digests = [i.to_bytes(8, "little") + j.to_bytes(8, "little") for j in range(64)]
        block_file.write_blocks(
            directory / f"{i}.blocks",
            [block] * 64,
            digests,
            fingerprint="f" * 20,
            block_bytes=300,
            info={},
        )
    reads: list[int] = []
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    tier, _, _ = _tier(tmp_path)
    assert len(reads) == 300
    assert sum(reads) <= 300 * framed_file._FIRST_READ_BYTES
    assert tier.store.num_blocks == 300 * 64
    tier.close()


def test_blocks_that_make_room_on_disk_are_counted(tmp_path: Path) -> None:
    size = 1000
    store = PrefixStore(
        tmp_path / "p", model="m", fingerprint="f" * 20, block_bytes=size, max_bytes=150 << 10
    )

    def write(name: str) -> None:
        digests = [f"{name}{i}".encode().ljust(16) for i in range(3)]
        store.write(digests, [np.zeros(size, np.uint8)] * 3)
        time.sleep(0.01)  # the oldest goes first

    write("a")
    write("b")
    # Each write leaves 64 KiB for the segment's header, so the third finds room for one other.
    assert (store.num_blocks, store.num_evictions) == (6, 0)
    sizes = [path.stat().st_size for path, _, _ in segments(tmp_path / "p")]
    store.max_bytes = sizes[1] + 3 * size + (64 << 10)
    write("c")
    assert (store.num_blocks, store.num_evictions) == (6, 3)
    assert b"a0".ljust(16) not in store
