"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.request import Request
from moejet.sampler import BadLogitsError


def set_scores(request: Request, logits: Tensor) -> None:
    """Notes the log-probabilities of the tokens that follow those being computed.

    logits [n, V] fp32, rows of the tokens from num_computed_tokens on. Raises `BadLogitsError`.
    """
    assert request.scores is not None, f"{request.request_id=}"
    start = request.num_computed_tokens
    targets = torch.tensor(request.token_ids[start + 1 : start + len(logits) + 1])
    rows = logits[: len(targets)]
    chosen = rows.gather(1, targets.unsqueeze(1)).squeeze(1) - torch.logsumexp(rows, dim=-1)
    if bool(torch.isnan(chosen).any()):
        raise BadLogitsError(request.request_id)
    # In place of what was noted before a preemption.
    request.scores[start:] = chosen.tolist()
