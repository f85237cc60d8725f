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
    """resident: the experts of each MoE layer that live on the GPU, in the order of their slots.

    cached: slots of each layer for copies of experts that live in RAM.
    """

    num_experts: int
    resident: tuple[tuple[int, ...], ...]
    cached: tuple[int, ...]

    @property
    def num_resident(self) -> int:
        """Of all layers."""
        return sum(len(layer) for layer in self.resident)

    @classmethod
    def of_counts(
        cls, num_experts: int, counts: Sequence[int], cached: Sequence[int] | None = None
    ) -> Placement:
        """The first so many experts of each layer, and so many slots for copies (None: none)."""
        resident = tuple(tuple(range(count)) for count in counts)
        return cls(num_experts, resident, (0,) * len(counts) if cached is None else tuple(cached))

    @property
    def num_cached(self) -> int:
        """Of all layers."""
        return sum(self.cached)


def counts_that_fit(
    expert_bytes: Sequence[int],
    num_experts: int | Sequence[int],
    budget: int,
    most: int | None = None,
) -> list[int]:
    """How many experts of each layer fit into `budget` bytes, one more of each layer in turn.

    expert_bytes: of one expert of each layer · num_experts: of a layer, or of each · most: of all layers, at most.
    """
    counts = [0] * len(expert_bytes)
    limits = [num_experts] * len(counts) if isinstance(num_experts, int) else num_experts
    left = sum(limits) if most is None else most
    for _ in range(max(limits, default=0)):
        for layer, size in enumerate(expert_bytes):
            if left == 0 or size > budget or counts[layer] == limits[layer]:
                continue
            counts[layer] += 1
            budget -= size
            left -= 1
    return counts
