"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moejet.ops.top_logits import top_logits
from moejet.request import Request
from moejet.sampler import BadLogitsError


def set_scores(request: Request, logits: Tensor) -> None:
    """Notes the log-probabilities of the tokens that follow those being computed, and of their alternatives.

    logits [n, V] fp32, rows of the tokens from num_computed_tokens on. Raises `BadLogitsError`.
    """
    assert request.scores is not None, f"{request.request_id=}"
    start = request.num_computed_tokens
    targets = torch.tensor(request.token_ids[start + 1 : start + len(logits) + 1])
    rows = logits[: len(targets)]
    chosen = rows.gather(1, targets.unsqueeze(1)).squeeze(1)
    # In place of what was noted before a preemption.
    if request.num_top and len(rows):
        values, ids, log_sums = top_logits(rows, request.num_top)
        request.top[start:] = [
            tuple((i, value - log_sum) for i, value in zip(row_ids, row_values, strict=True))
            for row_ids, row_values, log_sum in zip(
                ids.tolist(), values.tolist(), log_sums, strict=True
            )
        ]
        scores = [value - log_sum for value, log_sum in zip(chosen.tolist(), log_sums, strict=True)]
    else:
        scores = (chosen - torch.logsumexp(rows, dim=-1)).tolist()
    if any(math.isnan(score) for score in scores):
        raise BadLogitsError(request.request_id)
    request.scores[start:] = scores
