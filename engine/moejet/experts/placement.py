"""Which routed experts live on the GPU. Those do not take RAM.

Without knowledge of which experts are asked for most, all layers get as many: then a layer's CPU share is computed
beside its GPU share everywhere, and no layer waits for the CPU much longer than another. Which ones of a layer makes no
difference, so they are the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """resident: the experts of each MoE layer that live on the GPU, in the order of their slots."""

    num_experts: int
    resident: tuple[tuple[int, ...], ...]

    @property
    def num_resident(self) -> int:
        """Of all layers."""
        return sum(len(layer) for layer in self.resident)

    @classmethod
    def of_counts(cls, num_experts: int, counts: Sequence[int]) -> Placement:
        """The first so many experts of each layer."""
        return cls(num_experts, tuple(tuple(range(count)) for count in counts))


def counts_that_fit(
    expert_bytes: Sequence[int], num_experts: int, budget: int, most: int | None = None
) -> list[int]:
    """How many experts of each layer fit into `budget` bytes, one more of each layer in turn.

    expert_bytes: of one expert of each layer · most: experts of all layers, at most.
    """
    counts = [0] * len(expert_bytes)
    left = len(counts) * num_experts if most is None else most
    for _ in range(num_experts):
        for layer, size in enumerate(expert_bytes):
            if left == 0 or size > budget:
                continue
            counts[layer] += 1
            budget -= size
            left -= 1
    return counts
