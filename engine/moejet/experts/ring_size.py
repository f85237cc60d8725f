"""How much memory streaming takes, before anything is there: for the plan, and for the ring itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moejet.experts.resident_experts import resident_bytes
from moejet.weights.packed_layout import PackedLayout

# Of one copy over PCIe: long enough to run at full rate, and a chunk's launches take a fraction of its time.
CHUNK_BYTES = 64 << 20
# Chunks on the device that are copied or wait for their turn: as many may cross PCIe while the GPU does other things.
DEPTH = 4
# Pinned ones on the host, if experts cannot be copied from where they are.
HOST_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class RingSize:
    """experts: of a layer that stream together · chunk: their packed bytes, at most · slots: their bytes unpacked."""

    experts: int
    chunk: int
    slots: int

    @classmethod
    def of(
        cls,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        formats: Sequence[tuple[str, str]],
    ) -> RingSize:
        """formats: (gate and up, down) of every layer; those that are different on the GPU have slots of their own."""
        shape = (hidden_size, intermediate_size)
        kinds = set(formats)
        largest = max(PackedLayout(*shape, *kind).expert_bytes for kind in kinds)
        experts = max(1, min(num_experts, round(CHUNK_BYTES / largest)))
        slots = sum(resident_bytes(*shape, *kind) for kind in kinds)
        return cls(experts, experts * largest, experts * slots)

    @property
    def device_bytes(self) -> int:
        """On the GPU."""
        return DEPTH * self.chunk + self.slots

    @property
    def host_bytes(self) -> int:
        """Pinned, at most."""
        return HOST_BUFFERS * self.chunk
