"""The routed experts of one layer that live on the GPU, in slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moejet.ops.gpu_experts import gpu_experts
from moejet.ops.gpu_matrices import gpu_format, quantise_into
from moejet.weights.gpu_weights import GpuWeights
from moejet.weights.stored import StoredWeight


def resident_bytes(hidden_size: int, intermediate_size: int, format: str, down_format: str) -> int:
    """Of one expert on the GPU."""
    gate_up, down = expert_slots(1, hidden_size, intermediate_size, format, down_format, "meta")
    return gate_up.nbytes + down.nbytes


class ResidentExperts:
    """S experts of inner size I over hidden size D; which ones is data on the device.

    slot_of_expert [E] int32 on the device, -1: not here · gate_up (S, 2, I, D) · down (S, D, I) · slots: those of the
    experts that stay · slots from first_free on are for copies of others, see `expert_cache`.
    """

    def __init__(
        self,
        experts: Sequence[int],
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        format: str,
        down_format: str,
        device: torch.device,
        num_free: int = 0,
    ):
        """experts: those of the first slots, in order · num_free: slots behind these

        Formats as for `CpuExperts`, see `gpu_format`.
        """
        self.slots = {expert: slot for slot, expert in enumerate(experts)}
        table = torch.full((num_experts,), -1, dtype=torch.int32)
        table[list(experts)] = torch.arange(len(experts), dtype=torch.int32)
        self.slot_of_expert = self._own_slots = table.to(device)
        self.first_free, self.num_free = len(experts), num_free
        self.gate_up, self.down = expert_slots(
            len(experts) + num_free, hidden_size, intermediate_size, format, down_format, device
        )

    @property
    def nbytes(self) -> int:
        """Of all slots."""
        return self.gate_up.nbytes + self.down.nbytes

    def set_stored(self, expert: int, projection: str, weight: StoredWeight) -> None:
        """Sets one matrix of an expert that has a slot: gate or up [I, D], down [D, I]."""
        slot = self.slots[expert]
        if projection == "down":
            quantise_into(self.down[slot], weight)
        else:
            quantise_into(self.gate_up[slot][("gate", "up").index(projection)], weight)

    def fill_random(self, seed: int) -> None:
        """Random weights of plausible size, the same for the same seed."""
        generator = torch.Generator(self.slot_of_expert.device).manual_seed(seed)
        for slot in range(len(self.slots)):
            self.gate_up[slot].fill_random(generator)
            self.down[slot].fill_random(generator)

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        into: Tensor | None = None,
        without_copies: bool = False,
    ) -> Tensor:
        """The weighted sum of each token's resident experts, in x's dtype, or added to `into` [T, D] fp32.

        without_copies: only of those that live here.
        """
        table = self._own_slots if without_copies else self.slot_of_expert
        return gpu_experts(x, topk_ids, topk_weights, table, self.gate_up, self.down, into=into)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """What holds the weights once they are loaded, by name."""
        named = {"gate_up": self.gate_up, "down": self.down}
        own = {f"{prefix}.{name}.codes": weights.codes for name, weights in named.items()}
        return own | {
            f"{prefix}.{name}.scales": weights.scales
            for name, weights in named.items()
            if weights.scales is not None
        }


def expert_slots(
    num: int,
    hidden_size: int,
    intermediate_size: int,
    format: str,
    down_format: str,
    device: torch.device | str,
) -> tuple[GpuWeights, GpuWeights]:
    """Memory for `num` experts: (gate_up, down), in the GPU's formats for those of `CpuExperts`."""
    inner = (intermediate_size, hidden_size)
    gate_up = gpu_format(format, rows=inner[0], cols=inner[1])
    down = gpu_format(down_format, rows=inner[1], cols=inner[0])
    return (
        GpuWeights.empty(gate_up, (num, 2, *inner), device),
        GpuWeights.empty(down, (num, *inner[::-1]), device),
    )
