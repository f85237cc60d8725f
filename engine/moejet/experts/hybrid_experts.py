"""The routed experts of one layer, some in RAM and computed by the CPU, some on the GPU; either may be none or all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moejet.experts.bridge import CpuBridge
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.expert_ring import ExpertRing
from moejet.experts.resident_experts import ResidentExperts
from moejet.weights.stored import StoredWeight

if TYPE_CHECKING:
    from moejet._C import ThreadPool


class HybridExperts:
    """cpu: those in RAM, by their ids among all; None if there are none · resident: those on the GPU, or None.

    `submit` and `collect` enqueue work on the device's stream. What is called between them runs there while the CPU
    computes its share. In a step that streams (`ExpertRing.step`), the GPU computes them all, and what is called
    between runs while experts in RAM are copied.

    uses [E] int32 on the device: how often each expert was asked for so far, modulo 2^32, but for steps that stream;
    None: nobody counts.
    """

    def __init__(self, cpu: CpuExperts | None, resident: ResidentExperts | None):
        assert cpu is not None or resident is not None
        self.cpu, self.resident = cpu, resident
        self._bridge: CpuBridge | None = None
        self._layer = -1
        self._ring: ExpertRing | None = None
        self._ring_layer = -1
        self._asked: tuple[Tensor, Tensor, Tensor] | None = None
        self._routed: Tensor | None = None
        self.uses: Tensor | None = None

    def require_cpu(self) -> CpuExperts:
        assert self.cpu is not None
        return self.cpu

    def require_resident(self) -> ResidentExperts:
        assert self.resident is not None
        return self.resident

    @property
    def pool(self) -> ThreadPool | None:
        return None if self.cpu is None else self.cpu.pool

    @property
    def in_ram(self) -> list[int]:
        """The ids of the experts that live there, ascending."""
        total = 0 if self.cpu is None else self.cpu.weights.num_experts
        there = {} if self.resident is None else self.resident.slots
        return [expert for expert in range(total) if expert not in there]

    def attach(self, bridge: CpuBridge, layer: int) -> None:
        """The way to the CPU; layer: the number of these experts there."""
        self._bridge, self._layer = bridge, layer

    def attach_ring(self, ring: ExpertRing, layer: int) -> None:
        """The ring that experts in RAM stream through; layer: the number of these experts there."""
        self._ring, self._ring_layer = ring, layer

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """x [T, D] · topk_ids [T, K] int32, -1 skips · topk_weights [T, K] fp32."""
        self._asked = None  # of a step that failed in between
        if self._ring is not None and self._ring.is_active:
            self._asked = (x, topk_ids, topk_weights)
            self._routed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            if self.resident is not None and self.resident.slots:
                self.resident.forward(*self._asked, into=self._routed, without_copies=True)
            return
        if self.cpu is not None:
            assert self._bridge is not None
            self._bridge.submit(
                self._layer,
                x,
                topk_ids,
                topk_weights,
                slot_of_expert=None if self.resident is None else self.resident.slot_of_expert,
                uses=self.uses,
            )
        if self.resident is not None:
            self._routed = self.resident.forward(x, topk_ids, topk_weights)

    def collect(self) -> Tensor:
        """The weighted sum of each token's experts [T, D] in x's dtype, a new tensor."""
        resident, self._routed = self._routed, None
        asked, self._asked = self._asked, None
        if asked is not None:
            assert self._ring is not None
            assert resident is not None
            self._ring.add(self._ring_layer, *asked, resident)
            return resident.to(asked[0].dtype)
        if self.cpu is None:
            assert resident is not None
            return resident
        assert self._bridge is not None
        routed = self._bridge.collect(self._layer)
        return routed if resident is None else routed.add_(resident)

    def set_projection(self, expert: int, projection: str, w: Tensor) -> None:
        """Sets one matrix, gate or up [I, D], down [D, I], where the expert lives."""
        if self.resident is not None and expert in self.resident.slots:
            self.resident.set_stored(expert, projection, StoredWeight.plain(w))
        else:
            assert self.cpu is not None
            self.cpu.set_projection(expert, projection, w)

    def set_stored(self, expert: int, projection: str, weight: StoredWeight) -> None:
        """The same of a quantised weight of a checkpoint."""
        if self.resident is not None and expert in self.resident.slots:
            self.resident.set_stored(expert, projection, weight)
        else:
            assert self.cpu is not None
            self.cpu.set_stored(expert, projection, weight)

    def fill_random(self, seed: int) -> None:
        """Random weights of plausible size, the same for the same seed and placement."""
        if self.resident is not None:
            self.resident.fill_random(seed)
        if self.cpu is not None:
            self.cpu.fill_random(seed, self.in_ram)

    def state(self, prefix: str) -> dict[str, Any]:
        """What holds the weights once they are loaded, by name."""
        own: dict[str, Any] = {} if self.cpu is None else {prefix: self.cpu}
        return own if self.resident is None else own | self.resident.state(f"{prefix}.resident")
