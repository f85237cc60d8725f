"""A batch that cannot be computed is computed in parts, until it is known which requests are to blame.

Nothing is recorded before a step's tokens are known, so any part of a batch can be computed again. Halving finds one
culprit among B requests in 2 log2(B) attempts, and 2 B attempts are the most there can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moejet.batch import Batch
from moejet.request import Request

T = TypeVar("T")


def compute_apart(
    batch: Batch, compute: Callable[[Batch], T], *, block_size: int
) -> tuple[list[T], dict[Request, Exception]]:
    """After compute(batch) has raised: the results of parts that can be computed, and who fails alone as well."""
    results: list[T] = []
    culprits: dict[Request, Exception] = {}
    waiting = [list(zip(batch.requests, batch.query_lens, strict=True))]
    while waiting:
        rows = waiting.pop()
        middle = len(rows) // 2
        for half in filter(None, (rows[:middle], rows[middle:])):
            requests, query_lens = zip(*half, strict=True)
            part = Batch.build(list(requests), list(query_lens), block_size=block_size)
            part.block_copies = batch.block_copies  # whichever part comes first makes them
            try:
                results.append(compute(part))
            except Exception as error:
                if len(half) == 1:
                    culprits[requests[0]] = error
                else:
                    waiting.append(half)
    return results, culprits
