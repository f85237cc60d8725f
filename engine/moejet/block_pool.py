"""The latent cache's blocks: who owns which, and which can be found again by their tokens. Bookkeeping only.

A block is held by any number of tables (reference counts). A full block may carry a hash of all tokens up to its end;
when its last holder lets go, it keeps its contents until its room is needed, least recently used first, and until then
a request whose tokens have the same hash takes it instead of computing it again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

DIGEST_BYTES = 16


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int):
        assert min(num_blocks, block_size) > 0, f"{num_blocks=} {block_size=}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        # Blocks that nobody holds but that can be found, the least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._generations = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be had: unused ones, and idle ones that would be evicted."""
        return len(self._unused) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their hash."""
        return len(self._by_hash)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def extend(self, block_table: list[int], num_tokens: int) -> bool:
        """Grows `block_table` to hold `num_tokens`; returns False and changes nothing if the pool is too empty."""
        missing = self.num_blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block_table.append(self._take())
        return True

    def share(self, blocks: Sequence[int]) -> None:
        """Adds one holder to each block: of another table, or idle ones that were found."""
        for block in blocks:
            if self._references[block] == 0:
                assert block in self._idle, f"block {block} holds nothing that could be shared"
                del self._idle[block]
            self._references[block] += 1

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def replace_shared(self, block_table: list[int], index: int) -> tuple[int, int] | None:
        """A block of the table's own in place of a shared one: (old, new), whose contents are to be copied.

        None if the pool is too empty.
        """
        old = block_table[index]
        assert self.is_shared(old), f"{old=} has one holder"
        if self.num_free == 0:
            return None
        new = self._take()
        self._references[old] -= 1
        block_table[index] = new
        return old, new

    def release(self, block_table: list[int]) -> None:
        """Takes one holder from every block of `block_table` and empties it."""
        # The end of a context is less likely to be asked for again than its beginning: it goes first.
        for block in reversed(block_table):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if self._hash_of[block] is None:
                self._unused.append(block)
            else:
                self._idle[block] = None
        block_table.clear()

    def find(self, digest: bytes) -> int | None:
        """The block with these contents."""
        return self._by_hash.get(digest)

    def register(self, block: int, digest: bytes) -> bool:
        """Lets a held, full block be found; False if another one has the same contents already, or it has a hash."""
        assert self._references[block] > 0, f"block {block} is not held"
        if self._hash_of[block] is not None or digest in self._by_hash:
            return False
        self._by_hash[digest] = block
        self._hash_of[block] = digest
        return True

    def generation(self, block: int) -> int:
        """Changes before a block gets other contents. Any thread may ask."""
        return self._generations[block]

    def check_integrity(self, block_tables: Sequence[Sequence[int]]) -> None:
        """Asserts that the tables hold exactly the references counted, and that no block is lost or found wrongly."""
        held = [0] * self.num_blocks
        for table in block_tables:
            for block in table:
                held[block] += 1
        assert held == self._references, f"references differ: {held=} {self._references=}"
        free = sorted([*self._unused, *self._idle])
        assert free == [b for b in range(self.num_blocks) if held[b] == 0], f"blocks lost: {free=}"
        for block, digest in enumerate(self._hash_of):
            assert digest is None or self._by_hash.get(digest) == block, f"{block=} hash differs"
        found = sum(digest is not None for digest in self._hash_of)
        assert found == len(self._by_hash), f"{found=} {len(self._by_hash)=}"
        assert all(self._hash_of[b] is None for b in self._unused), "an unused block has a hash"

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None, f"{block=} is idle without a hash"
            self.num_evictions += 1
            del self._by_hash[digest]
            self._hash_of[block] = None
        self._references[block] = 1
        self._generations[block] += 1
        return block


class BlockStore(Protocol):
    """Where full blocks outlive the pool, such as `PrefixTier`."""

    @property
    def min_tokens(self) -> int:
        """Contexts shorter than this are not offered."""

    @property
    def num_blocks(self) -> int:
        """That could be read now."""

    @property
    def num_evictions(self) -> int:
        """Blocks that had to make room for others."""

    def offer(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
        """Notes that these blocks are full."""

    def count(self, digests: Sequence[bytes]) -> int:
        """How many of these, from the first on, could be read."""

    def read(self, digests: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Fills blocks from the first on; returns how many."""

    def read_seconds(self, num_blocks: int) -> float:
        """How long that will take."""

    def expect_faster(self) -> None:
        """Makes a read more likely that was not worth it."""


def salted(root: bytes, salt: str | None) -> bytes:
    """Where the chains of hashes of those begin who share a salt; None: of those without one."""
    if salt is None:
        return root
    data = salt.encode("utf-8", "surrogatepass")
    # The salt comes first and has a length, so that no other root and salt give the same bytes.
    prefix = len(data).to_bytes(8, "little") + data
    return hashlib.blake2b(prefix + root, digest_size=DIGEST_BYTES, person=b"cache salt").digest()


def extend_hashes(
    hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int
) -> list[bytes]:
    """Appends the hashes of full blocks that `hashes` lacks: a chain, each one covers all tokens before it."""
    for begin in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else root
        tokens = array("q", token_ids[begin : begin + block_size]).tobytes()
        hashes.append(hashlib.blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest())
    return hashes
