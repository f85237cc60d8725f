"""The latent cache's blocks: who owns which. Tensors live in the runner; this is bookkeeping only."""

from __future__ import annotations


class BlockPool:
    """A free list of `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int):
        assert min(num_blocks, block_size) > 0, f"{num_blocks=} {block_size=}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def extend(self, block_table: list[int], num_tokens: int) -> bool:
        """Grows `block_table` to hold `num_tokens`; returns False and changes nothing if the pool is too empty."""
        missing = self.num_blocks_for(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._is_free[block] = False
            block_table.append(block)
        return True

    def release(self, block_table: list[int]) -> None:
        """Gives every block of `block_table` back and empties it."""
        for block in block_table:
            assert not self._is_free[block], f"block {block} released twice"
            self._is_free[block] = True
            self._free.append(block)
        block_table.clear()

    def check_integrity(self, block_tables: list[list[int]]) -> None:
        """Asserts that the given tables and the free list hold every block exactly once."""
        seen = sorted([*self._free, *(b for table in block_tables for b in table)])
        assert seen == list(range(self.num_blocks)), f"blocks lost or shared: {seen=}"
