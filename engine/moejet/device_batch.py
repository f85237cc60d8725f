"""A batch as tensors on a device.

Requests of one new token each are a decode batch. It is padded to one of a few sizes, in memory that stays, so that a
captured graph can be replayed over it. Other batches come in the size that they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moejet.batch import Batch
from moejet.ops.device_sampling import SamplingTensors
from moejet.ops.mla_prefill import PrefillPlan, plan_prefill
from moejet.request import SamplingParams
from moejet.staging import Staging

# New tokens of a request up to which attention is absorbed, if all requests have as many; and then of the batch.
MAX_ABSORBED_QUERIES, MAX_ABSORBED_TOKENS = 8, 128


@dataclass(frozen=True, slots=True)
class Attending:
    """Requests of a batch whose attention is computed in one form.

    rows [t] i64: their tokens among those of the batch, None for all · block_tables [b, W] i32, -1 padded
    context_lens_tensor [b] i32 · max_context: the longest context that it may hold, also when a graph is replayed
    query_lens, context_lens: the same for the host; in a decode batch the latter are those of nobody
    prefill: chunks of keys to be expanded; None: absorbed attention, query_lens are all the same
    """

    rows: Tensor | None
    block_tables: Tensor
    context_lens_tensor: Tensor
    max_context: int
    query_lens: list[int]
    context_lens: list[int]
    prefill: PrefillPlan | None = None


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """T tokens.

    embeddings [T, D]: rows of the embedding, which stays in RAM · positions [T] i32 · slot_mapping [T] i64: block *
    block_size + offset of each token's latent, -1 for padding · padding [T] bool: which rows are padding, None if it is
    known that none are · logits_indices [L] i64: rows whose logits are wanted, None for all
    """

    embeddings: Tensor
    positions: Tensor
    slot_mapping: Tensor
    attending: tuple[Attending, ...]
    padding: Tensor | None
    logits_indices: Tensor | None

    @classmethod
    def of(
        cls,
        batch: Batch,
        embedding: Tensor,
        device: torch.device,
        *,
        max_context: int,
        max_key_chunk: int,
    ) -> DeviceBatch:
        """Any batch. embedding [V, D] on the CPU; max_key_chunk: see `ops.mla_prefill`."""
        lens = batch.query_lens
        if _is_absorbed(lens):
            groups = [list(range(len(lens)))]
        else:
            absorbed = [i for i, query_len in enumerate(lens) if query_len == 1]
            expanded = [i for i, query_len in enumerate(lens) if query_len != 1]
            groups = [group for group in (absorbed, expanded) if group]
        tensors = {
            "embeddings": embedding[batch.token_ids],
            "positions": batch.positions.int(),
            "slots": batch.slot_mapping,
            "logits": batch.logits_indices,
        }
        first_rows = [sum(lens[:i]) for i in range(len(lens))]
        for number, group in enumerate(groups):
            tensors[f"tables{number}"] = batch.block_tables[group].int()
            tensors[f"contexts{number}"] = torch.tensor(
                [batch.context_lens[i] for i in group], dtype=torch.int32
            )
            rows = [row for i in group for row in range(first_rows[i], first_rows[i] + lens[i])]
            tensors[f"rows{number}"] = torch.tensor(rows)
        there = Staging.of(tensors, device).device
        attending = []
        for number, group in enumerate(groups):
            query_lens = [lens[i] for i in group]
            context_lens = [batch.context_lens[i] for i in group]
            plan = None
            if not _is_absorbed(query_lens):
                plan = plan_prefill(
                    query_lens, context_lens, max_key_chunk=max_key_chunk, device=device
                )
            attending.append(
                Attending(
                    rows=there[f"rows{number}"] if len(groups) > 1 else None,
                    block_tables=there[f"tables{number}"],
                    context_lens_tensor=there[f"contexts{number}"],
                    max_context=max_context,
                    query_lens=query_lens,
                    context_lens=context_lens,
                    prefill=plan,
                )
            )
        return cls(
            embeddings=there["embeddings"],
            positions=there["positions"],
            slot_mapping=there["slots"],
            attending=tuple(attending),
            padding=None,
            logits_indices=there["logits"],
        )


def _is_absorbed(query_lens: list[int]) -> bool:
    first = query_lens[0]
    if any(query_len != first for query_len in query_lens):
        return False
    few = first <= MAX_ABSORBED_QUERIES and first * len(query_lens) <= MAX_ABSORBED_TOKENS
    return first == 1 or few


class PaddedBatch:
    """A decode batch of up to `size` requests in memory that stays; rows that no request has are padding.

    batch: reads that memory, and has logits of all rows · staging: also holds the columns of `ops.device_sampling`,
    temperature, top_k, top_p, min_p and uniforms, greedy where nothing was set.
    """

    def __init__(
        self,
        size: int,
        embedding: Tensor,
        device: torch.device,
        *,
        max_context: int,
        max_blocks: int,
    ):
        self.size = size
        self.staging = Staging(
            {
                "embeddings": ((size, embedding.shape[1]), embedding.dtype),
                "positions": ((size,), torch.int32),
                "slots": ((size,), torch.int64),
                "tables": ((size, max_blocks), torch.int32),
                "contexts": ((size,), torch.int32),
                "temperature": ((size,), torch.float32),
                "top_k": ((size,), torch.int32),
                "top_p": ((size,), torch.float64),
                "min_p": ((size,), torch.float64),
                "uniforms": ((size,), torch.float64),
            },
            device,
        )
        self.staging.host["top_p"].fill_(1.0)  # of rows that never had a request
        self._embedding = embedding
        there = self.staging.device
        self._slots = there["slots"]
        self._attending = Attending(
            rows=None,
            block_tables=there["tables"],
            context_lens_tensor=there["contexts"],
            max_context=max_context,
            query_lens=[1] * size,
            context_lens=[],
        )

    def batch(self) -> DeviceBatch:
        """As it is now; to be called where a graph is captured, because the mask of padding is computed."""
        there = self.staging.device
        return DeviceBatch(
            embeddings=there["embeddings"],
            positions=there["positions"],
            slot_mapping=self._slots,
            attending=(self._attending,),
            padding=self._slots < 0,
            logits_indices=None,
        )

    def fill(self, batch: Batch) -> None:
        """Sets everything but the sampling's columns on the host; `staging.upload` moves it."""
        count, here = batch.num_tokens, self.staging.host
        assert count <= self.size, f"{count=} {self.size=}"
        torch.index_select(self._embedding, 0, batch.token_ids, out=here["embeddings"][:count])
        here["embeddings"][count:] = 0
        for name, values, padding in (
            ("positions", batch.positions, 0),
            ("slots", batch.slot_mapping, -1),
            ("contexts", torch.tensor(batch.context_lens), 0),
        ):
            here[name][:count] = values
            here[name][count:] = padding
        width = batch.block_tables.shape[1]
        here["tables"].fill_(-1)
        here["tables"][:count, :width] = batch.block_tables

    def fill_choice(
        self, rows: Sequence[int], params: Sequence[SamplingParams], uniforms: Sequence[float]
    ) -> None:
        """Sets how these rows choose, on the host; the others become greedy."""
        here = self.staging.host
        here["temperature"].zero_()
        at = list(rows)
        for name, values in (
            ("temperature", [p.temperature for p in params]),
            ("top_k", [min(p.top_k, 2**31 - 1) for p in params]),
            ("top_p", [p.top_p for p in params]),
            ("min_p", [p.min_p for p in params]),
            ("uniforms", list(uniforms)),
        ):
            here[name][at] = torch.tensor(values, dtype=here[name].dtype)

    def sampling(self, *, is_random: bool, has_cut_offs: bool) -> SamplingTensors:
        """The sampling's columns on the device; see `SamplingTensors` for the flags."""
        there = self.staging.device
        return SamplingTensors(
            there["temperature"],
            there["top_k"],
            there["top_p"],
            there["min_p"],
            there["uniforms"],
            is_random=is_random,
            has_cut_offs=has_cut_offs,
        )


def padded_sizes(max_num_requests: int) -> tuple[int, ...]:
    """1, 2, 4 and multiples of 8, up to the first that holds so many."""
    most = -(-max_num_requests // 8) * 8
    sizes = (1, 2, 4, *range(8, most + 1, 8))
    last = next(size for size in sizes if size >= max_num_requests)
    return tuple(size for size in sizes if size <= last)
