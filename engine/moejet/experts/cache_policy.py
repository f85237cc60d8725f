"""Which experts in RAM should have a copy on the GPU, and when a better one is worth its way over the bus.

Every layer has some slots. After each step the policy is told how often each expert was asked for, and names swaps.

lfu   An expert's score is its number of uses, those of `half_life` steps ago counting half (least frequently used, with
      ageing). If it goes on like that, the score is also how often the expert will be used before it is forgotten, so
      the difference of two scores is what a swap saves, in uses. Scores are noisy: of counts a and b so weighted, the
      difference has a standard deviation of about sqrt((a + b) / 2), and two of those are subtracted.
lru   The score is the step of the last use.

A swap costs `price` uses: a use that the CPU computes reads the expert's bytes once from RAM, a fetch reads them,
writes them to pinned memory, and has them read again by the GPU. Swaps that save less are not made; of the others,
those that save most for their bytes come first, over all layers, as far as the bytes of a step go. Equal ones go by
layer, expert and slot, so the same uses always lead to the same swaps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moejet.validation import require_choice

PolicyKind = Literal["lfu", "lru"]
_FREE = -1
_DEVIATIONS = 2.0


@dataclass(frozen=True, slots=True)
class Swap:
    """An expert of a layer goes into a slot, from which another is evicted, or which was free (-1)."""

    layer: int
    expert: int
    slot: int
    evicted: int


class CachePolicy:
    """Of L layers with E experts each. Knows what is in the slots: what it has named and what `finish` confirmed."""

    def __init__(
        self,
        num_experts: int,
        slots: Sequence[int],
        expert_bytes: Sequence[int],
        *,
        fixed: Sequence[Collection[int]] = (),
        kind: PolicyKind = "lfu",
        half_life: float = 128.0,
        price: float = 4.0,
        bytes_per_step: int = 256 << 20,
    ):
        """slots, expert_bytes: of each layer · fixed: experts of each layer that need no slot, none by default

        bytes_per_step: of fetches, at most; larger experts wait until enough steps have passed.
        """
        require_choice("kind", kind, ("lfu", "lru"))
        for name, value in (("half_life", half_life), ("bytes_per_step", bytes_per_step)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be above 0")
        layers = len(slots)
        self.kind, self.price, self.half_life = kind, price, half_life
        self.scores: NDArray[np.float64] = np.zeros((layers, num_experts))
        if kind == "lru":
            self.scores.fill(-math.inf)
        self.is_cached: NDArray[np.bool_] = np.zeros((layers, num_experts), dtype=bool)
        self._bytes: NDArray[np.float64] = np.array(expert_bytes, dtype=np.float64).reshape(layers)
        self._bytes_per_step = bytes_per_step
        self._credit = 0.0
        self._step = 0
        # Candidates are experts neither fixed nor in a slot nor on the way to one.
        self._is_candidate: NDArray[np.bool_] = np.ones((layers, num_experts), dtype=bool)
        for layer, experts in enumerate(fixed):
            self._is_candidate[layer, list(experts)] = False
        self._holders = np.full((layers, max(slots, default=0)), _FREE)
        self._is_settled = np.arange(self._holders.shape[1])[None, :] < np.array(slots)[:, None]

    def observe(self, uses: NDArray[np.integer], steps: int = 1) -> None:
        """uses [L, E] of the last `steps` steps; a step counts once for an expert, whatever its number of tokens.

        A batch reads an expert's bytes once, so that is what a hit saves.
        """
        self._step += steps
        if self.kind == "lru":
            self.scores[uses > 0] = self._step
        else:
            self.scores *= 2.0 ** (-steps / self.half_life)
            self.scores += np.minimum(uses, steps)
        most = max(float(self._bytes_per_step), float(self._bytes.max(initial=0.0)))
        self._credit = min(self._credit + steps * self._bytes_per_step, most)

    def choose(self, most: int = 1 << 30) -> list[Swap]:
        """At most so many swaps to begin now: evicted experts are gone, the others on their way until `finish`."""
        if self._holders.shape[1] == 0:
            return []
        swaps: list[Swap] = []
        layers = np.arange(len(self._bytes))
        gains, experts, slots = self._best(layers)
        while len(swaps) < most:
            layer = int(np.argmax(gains / self._bytes))
            if gains[layer] < self.price or self._bytes[layer] > self._credit:
                return swaps
            expert, slot = int(experts[layer]), int(slots[layer])
            evicted = int(self._holders[layer, slot])
            swaps.append(Swap(layer, expert, slot, evicted))
            self._credit -= self._bytes[layer]
            self._is_candidate[layer, expert] = False
            self._is_settled[layer, slot] = False
            self._holders[layer, slot] = expert
            if evicted != _FREE:
                self.is_cached[layer, evicted] = False
                self._is_candidate[layer, evicted] = True
            part = self._best(layers[layer : layer + 1])
            gains[layer], experts[layer], slots[layer] = (values[0] for values in part)
        return swaps

    def finish(self, swap: Swap) -> None:
        """The expert is in its slot."""
        assert self._holders[swap.layer, swap.slot] == swap.expert, swap
        self._is_settled[swap.layer, swap.slot] = True
        self.is_cached[swap.layer, swap.expert] = True

    def give_up(self, swap: Swap) -> None:
        """The expert could not be fetched; its slot is free."""
        assert self._holders[swap.layer, swap.slot] == swap.expert, swap
        self._holders[swap.layer, swap.slot] = _FREE
        self._is_settled[swap.layer, swap.slot] = True
        self._is_candidate[swap.layer, swap.expert] = True

    def _best(
        self, layers: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]]:
        """(gain in uses or steps, expert, slot) of the best swap of each of these layers; -infinity: there is none."""
        scores = self.scores[layers]
        candidates = np.where(self._is_candidate[layers], scores, -math.inf)
        experts = candidates.argmax(1)
        best = np.take_along_axis(candidates, experts[:, None], 1)[:, 0]
        holders = self._holders[layers]
        held = np.take_along_axis(scores, np.maximum(holders, 0), 1)
        held[holders == _FREE] = -math.inf
        held[~self._is_settled[layers]] = math.inf
        slots = held.argmin(1)
        worst = np.take_along_axis(held, slots[:, None], 1)[:, 0]
        is_free = worst == -math.inf
        is_possible = (best > -math.inf) & (worst < math.inf)
        best, worst = np.where(is_possible, best, 0.0), np.where(is_possible & ~is_free, worst, 0.0)
        if self.kind == "lru":
            gains = np.where(is_free, self.price, best - worst)
        else:
            noise = _DEVIATIONS * np.sqrt((best + worst) / 2)
            gains = best - worst - np.where(is_free, 0.0, noise)
        return np.where(is_possible, gains, -math.inf), experts, slots
