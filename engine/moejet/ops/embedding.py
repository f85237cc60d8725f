"""Token embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference


def embedding(token_ids: Tensor, weight: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """weight[token_ids]; -1 stands for padding and gives zeros.

    token_ids [T] int32 or int64 · weight [V, D] any float dtype. Returns [T, D] in out_dtype.
    """
    if weight.is_cuda and not use_reference():
        from moejet.kernels.embedding import embedding as launch

        return launch(token_ids, weight, out_dtype=out_dtype)
    return embedding_ref(token_ids, weight, out_dtype=out_dtype)


def embedding_ref(token_ids: Tensor, weight: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """Torch reference of `embedding`."""
    rows = weight[token_ids.long().clamp(min=0)].to(out_dtype)
    return rows.masked_fill(token_ids[:, None] < 0, 0.0)
