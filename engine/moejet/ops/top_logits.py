"""The largest logits of a row and its log-sum-exp, from which log-probabilities follow without a softmax of the row."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.extension import load_extension
from moejet.ops.native import check_dims, cpu_isa, runs_native

_MAX_NATIVE_K = 1024


def top_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor, list[float]]:
    """The k largest of each row, descending, the smaller id first among equals; k is cut to V, 0 gives empty rows.

    logits [B, V] fp32, finite or -inf, not all -inf. Returns values [B, k] fp32, ids [B, k] int32, and
    log(sum(exp(row))) per row: a token's log-probability is its logit minus that.
    """
    check_dims("logits", logits, "B, V")
    num_rows, vocab_size = logits.shape
    k = min(k, vocab_size)
    if logits.is_cuda and not use_reference():
        values, ids, sums = top_logits_on_device(logits, k)
        return values, ids, sums.tolist()
    if k > _MAX_NATIVE_K or not runs_native(logits):
        return top_logits_ref(logits, k)
    ids = torch.empty(num_rows, k, dtype=torch.int32)
    values = torch.empty(num_rows, k, dtype=torch.float32)
    log_sums: list[float] = load_extension().top_logits(logits, ids, values, isa=cpu_isa())
    return values, ids, log_sums


def top_logits_on_device(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`top_logits` without waiting for the device: the log-sum-exp is a tensor [B] fp32. logits of any float dtype."""
    k = min(k, logits.shape[1])
    if logits.is_cuda and not use_reference():
        from moejet.kernels.top_logits import MAX_K, top_logits

        if k <= MAX_K:
            return top_logits(logits, k)
    values, ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k].int(), torch.logsumexp(logits.float(), dim=-1)


def top_logits_ref(logits: Tensor, k: int) -> tuple[Tensor, Tensor, list[float]]:
    """Torch reference of `top_logits`, sums in float64."""
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    log_sums: list[float] = torch.logsumexp(logits.double(), dim=-1).tolist()
    return values[:, :k], ids[:, :k].int(), log_sums
