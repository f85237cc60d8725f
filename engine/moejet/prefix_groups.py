"""Which sequences of a batch begin with the same blocks of the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixGroups:
    """Sequences whose first blocks are the same, as siblings of one prompt are; their prefix is read once per group.

    starts [G + 1] and members [starts[G]] int32: members[starts[g]:starts[g + 1]] are indices of sequences ·
    shared_lens [G] int32: tokens in the blocks that they share, no more than any member's context less its query
    tokens · group_of [B] int32: each sequence's group, -1 without. All on the device; a sequence is in one group at
    most. max_members and max_shared (tokens) bound what the tensors may hold, which fixes the launch: a replayed
    graph may find other groups in them. A group that stands for nothing has no members.
    """

    starts: Tensor
    members: Tensor
    shared_lens: Tensor
    group_of: Tensor
    max_members: int
    max_shared: int

    @classmethod
    def of(
        cls, groups: list[tuple[list[int], int]], batch: int, device: torch.device | str = "cpu"
    ) -> PrefixGroups:
        """From (indices of member sequences, shared tokens) of each group."""
        starts, members, group_of = [0], [], [-1] * batch
        for group, (sequences, _) in enumerate(groups):
            members += sequences
            starts.append(len(members))
            for sequence in sequences:
                assert group_of[sequence] == -1, f"{groups=}"
                group_of[sequence] = group

        def on_device(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return cls(
            starts=on_device(starts),
            members=on_device(members),
            shared_lens=on_device([shared for _, shared in groups]),
            group_of=on_device(group_of),
            max_members=max((len(sequences) for sequences, _ in groups), default=1),
            max_shared=max((shared for _, shared in groups), default=1),
        )
