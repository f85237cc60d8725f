"""The batch of one step: what the scheduler decided, as the tensors that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from moejet.request import Request


@dataclass(slots=True)
class Batch:
    """One step over B requests with T query tokens in total, requests one after another.

    token_ids [T] i64 · positions [T] i64 · slot_mapping [T] i64 (block * block_size + offset of each token's latent)
    query_lens, context_lens: per request, context including the query tokens
    block_tables [B, max_blocks] i64, -1 padded · logits_indices [L] i64: rows of T whose logits are wanted
    sampled: whose these rows are; the last row of a request, and all rows of one whose prompt is scored
    block_copies: (from, to) blocks of the cache, to be copied before anything is computed; emptied once that is done
    """

    requests: list[Request]
    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_lens: list[int]
    context_lens: list[int]
    block_tables: Tensor
    logits_indices: Tensor
    sampled: list[Request]
    block_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @classmethod
    def build(cls, requests: list[Request], query_lens: list[int], *, block_size: int) -> Batch:
        """Lays out the next `query_lens[i]` tokens of each request; a row is sampled when it is the request's last."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logits_indices: list[int] = []
        sampled: list[Request] = []
        context_lens: list[int] = []
        for request, query_len in zip(requests, query_lens, strict=True):
            start, end = request.num_computed_tokens, request.num_computed_tokens + query_len
            assert start < end <= len(request.token_ids), f"{start=} {query_len=}"
            assert len(request.block_table) * block_size >= end, f"{request.request_id=} {end=}"
            token_ids += request.token_ids[start:end]
            positions += range(start, end)
            table = request.block_table
            slots += [
                table[p // block_size] * block_size + p % block_size for p in range(start, end)
            ]
            context_lens.append(end)
            if request.scores is not None:
                logits_indices += range(len(token_ids) - query_len, len(token_ids))
                sampled += [request] * query_len
            elif end == len(request.token_ids):
                logits_indices.append(len(token_ids) - 1)
                sampled.append(request)
        width = max(len(r.block_table) for r in requests)
        tables = [r.block_table + [-1] * (width - len(r.block_table)) for r in requests]
        return cls(
            requests=requests,
            token_ids=int64_tensor(token_ids),
            positions=int64_tensor(positions),
            slot_mapping=int64_tensor(slots),
            query_lens=list(query_lens),
            context_lens=context_lens,
            block_tables=int64_tensor(tables),
            logits_indices=int64_tensor(logits_indices),
            sampled=sampled,
        )


def int64_tensor(values: Sequence[Any]) -> Tensor:
    """As torch.tensor, which takes several times as long for a few numbers, as there are in a step that decodes."""
    return from_numpy(np.array(values, dtype=np.int64))
