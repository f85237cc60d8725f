"""How an MLA decode is cut up: tiles for the card, and splits of the context for its multiprocessors."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from moejet.kernels.card import Card

LEAST_TILES = 4  # of a split: less is not worth a program's start and end
_MAX_SPLITS = 256


class Tiles(NamedTuple):
    """How a launch is cut up: rows and keys per tile, and how many programs share a multiprocessor."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int


def choose_tiles(card: Card, rows: int, cache_dtype: torch.dtype) -> Tiles:
    """rows: (query token, head) pairs of one sequence.

    A tile of keys takes 1152 bytes per key with C + R = 576 in 16 bits, and so do the queries per row: both stay in
    shared memory. num_stages=3 keeps two tiles of keys there (three where wgmma reads them asynchronously), one in use
    and one on its way; with 2 Triton starts a copy only after the last use of the tile before, and nothing overlaps.
    Keys in bytes wait in registers, so that one stage does. Triton gives all warps to the keys of a tile if
    block_m < block_n, and to its rows otherwise, where 16 rows would keep one warp busy and the rest repeat its work.
    """
    fp8 = cache_dtype == torch.uint8
    stages = 1 if fp8 else 3
    if cache_dtype == torch.float32:  # no tensor cores: a check, not a way to serve
        return Tiles(16, 16, 4, 1, 1)
    if rows > 16 and card.shared_memory >= 200 << 10:
        # 64 rows take wgmma (SM90), their accumulators 128 registers in 8 warps. Fewer are bound by bandwidth and would
        # waste most of it; 32 at a time read a tile once. Above SM90 there is no wgmma, and Triton 3.6 keeps copies of
        # the tiles in the form that tcgen05 wants: 64 rows no longer fit.
        if rows > 32 and card.capability == 90:
            return Tiles(64, 32, 8, stages, 1)
        return Tiles(32, 64, 8 if fp8 else 4, stages, 1)
    # 18 KB of queries and two tiles of 36 KB are what 99 KB hold. With 32 rows there would be room for tiles of 16 keys
    # only, and see above.
    if card.shared_memory < 160 << 10:
        return Tiles(16, 32, 4, stages, 1)
    if fp8 or card.shared_memory >= 200 << 10:
        return Tiles(16, 32, 4, stages, 2)
    return Tiles(16, 32, 4, 4, 1)  # a third tile: there is no room for a second program


def choose_splits(programs: int, tokens: int, block_n: int, at_once: int) -> int:
    """Splits of contexts up to `tokens` for `programs` programs per split, `at_once` of which run at a time.

    The least of waves * (tiles per program + 4): starting, and writing a partial result for the merge, cost about as
    much as four tiles.
    """
    return _splits_of_tiles(programs, _cdiv(max(tokens, 1), block_n), at_once)


@lru_cache(maxsize=4096)  # contexts grow at every step
def _splits_of_tiles(programs: int, tiles: int, at_once: int) -> int:
    most = max(1, min(_MAX_SPLITS, tiles // LEAST_TILES))
    return min(
        range(1, most + 1),
        key=lambda n: _cdiv(programs * n, at_once) * (_cdiv(tiles, n) + 4),
    )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
