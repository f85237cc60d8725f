"""What a layer hands to the CPU: its tokens, and which of their experts are not on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moejet.environment import use_reference

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class HandOver:
    """Host memory that the device writes and the CPU reads, in one piece.

    x [M, D] fp32, bf16 or fp16 · topk_ids [M, K] int32, -1: not for the CPU · topk_weights [M, K] fp32
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    @classmethod
    def allocate(
        cls, max_tokens: int, hidden_size: int, top_k: int, *, dtype: torch.dtype, pin_memory: bool
    ) -> HandOver:
        sizes = (
            max_tokens * hidden_size * dtype.itemsize,
            4 * max_tokens * top_k,
            4 * max_tokens * top_k,
        )
        room = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        memory = torch.empty(sum(room), dtype=torch.uint8, pin_memory=pin_memory)
        x, ids, weights = (
            part[:size] for part, size in zip(torch.split(memory, room), sizes, strict=True)
        )
        return cls(
            x.view(dtype).view(max_tokens, hidden_size),
            ids.view(torch.int32).view(max_tokens, top_k),
            weights.view(torch.float32).view(max_tokens, top_k),
        )

    def first(self, num_tokens: int) -> HandOver:
        """Of so many rows, in the same memory."""
        return HandOver(
            self.x[:num_tokens], self.topk_ids[:num_tokens], self.topk_weights[:num_tokens]
        )

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.topk_ids.nbytes + self.topk_weights.nbytes


def hand_over(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    target: HandOver,
    *,
    num_experts: int,
    slot_of_expert: Tensor | None = None,
    uses: Tensor | None = None,
) -> None:
    """Writes a layer's T tokens to the target's T rows, for the CPU, and counts which experts they asked for.

    x [T, D], rows may be apart · topk_ids [T, K] int32 or int64, -1 skips · topk_weights [T, K] fp32
    slot_of_expert [E] int32 on the device: ids of experts with a slot there become -1 for the CPU; None: there are none
    uses [E] int32 on the device: 1 is added for every id of an expert, wherever that lives; None: nobody counts
    Ids that are no experts pass as they are and are not counted.
    """
    arguments = (x, topk_ids, topk_weights, target.x, target.topk_ids, target.topk_weights)
    if x.is_cuda and not use_reference():
        from moejet.kernels.hand_over import hand_over as launch

        launch(*arguments, slot_of_expert, uses, num_experts=num_experts)
    else:
        hand_over_ref(*arguments, slot_of_expert, uses, num_experts=num_experts)


def hand_over_ref(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    to_x: Tensor,
    to_ids: Tensor,
    to_weights: Tensor,
    slot_of_expert: Tensor | None,
    uses: Tensor | None,
    *,
    num_experts: int,
) -> None:
    """Torch reference of `hand_over`."""
    exists = (topk_ids >= 0) & (topk_ids < num_experts)
    known = topk_ids.long().masked_fill(~exists, 0)
    if uses is not None:
        uses.scatter_add_(0, known.flatten(), exists.flatten().int())
    if slot_of_expert is not None:
        topk_ids = topk_ids.masked_fill(exists & (slot_of_expert[known] >= 0), -1)
    to_x.copy_(x.to(to_x.dtype), non_blocking=True)
    to_ids.copy_(topk_ids.to(to_ids.dtype), non_blocking=True)
    to_weights.copy_(topk_weights, non_blocking=True)
