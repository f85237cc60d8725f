"""A cache policy that thinks nothing of it: many swaps, at random."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from moejet.experts.cache_policy import Swap


class RandomSwaps:
    """In place of `CachePolicy`: before every step, a third of the slots get other experts."""

    def __init__(
        self,
        num_experts: int,
        slots: Sequence[int],
        *,
        fixed: Sequence[Collection[int]],
        seed: int = 0,
    ):
        self.is_cached: NDArray[np.bool_] = np.zeros((len(slots), num_experts), dtype=bool)
        self._random = random.Random(seed)
        self._fixed = fixed
        self._holders = {(n, slot): -1 for n, count in enumerate(slots) for slot in range(count)}
        self._under_way: set[tuple[int, int]] = set()

    def observe(self, uses: NDArray[np.integer], steps: int) -> None:
        assert (uses >= 0).all()

    def choose(self, most: int) -> list[Swap]:
        swaps = []
        places = [place for place in self._holders if place not in self._under_way]
        for layer, slot in self._random.sample(places, min(most, -(-len(places) // 3))):
            taken = {e for (n, _), e in self._holders.items() if n == layer} | {*self._fixed[layer]}
            others = [e for e in range(self.is_cached.shape[1]) if e not in taken]
            if not others:
                continue
            swap = Swap(layer, self._random.choice(others), slot, self._holders[layer, slot])
            if swap.evicted >= 0:
                self.is_cached[layer, swap.evicted] = False
            self._holders[layer, slot] = swap.expert
            self._under_way.add((layer, slot))
            swaps.append(swap)
        return swaps

    def finish(self, swap: Swap) -> None:
        self._under_way.remove((swap.layer, swap.slot))
        self.is_cached[swap.layer, swap.expert] = True

    def give_up(self, swap: Swap) -> None:
        self._under_way.remove((swap.layer, swap.slot))
        self._holders[swap.layer, swap.slot] = -1
