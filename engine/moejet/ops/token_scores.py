"""How sure the model was of a token: what `moejet.statistics` describes, from rows of logits that are read once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moejet.ops.native import check_dims
from moejet.ops.top_logits import top_logits
from moejet.statistics import TokenScores

_NUM_TOP = 20
_NUM_SHARED = 5
_CHUNK_ELEMENTS = 1 << 20  # of logits at a time: temporaries stay within a core's cache


def token_scores(logits: Tensor, token_ids: list[int]) -> list[TokenScores]:
    """The scores of the token chosen from each row. logits [B, V] fp32, finite or -inf."""
    check_dims("logits", logits, "B, V")
    if len(logits) != len(token_ids) or not logits.is_floating_point():
        raise ValueError(
            f"logits has shape {list(logits.shape)} and {logits.dtype}, expected float32 rows for "
            f"{len(token_ids)} tokens"
        )
    size = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    result: list[TokenScores] = []
    for begin in range(0, len(token_ids), size):
        result += _scores_of(logits[begin : begin + size], token_ids[begin : begin + size])
    return result


def _scores_of(logits: Tensor, token_ids: list[int]) -> list[TokenScores]:
    vocab_size = logits.shape[1]
    top, _, log_sums = top_logits(logits, min(_NUM_TOP, vocab_size))
    logprobs = logits - torch.tensor(log_sums, dtype=torch.float32).unsqueeze(1)
    probs = torch.exp(logprobs)
    counts = [vocab_size] * len(token_ids)
    if math.isinf(float(logits.amin())):
        # A token that cannot come (-inf) has no share in any mean.
        is_possible = torch.isfinite(logprobs)
        logprobs = logprobs.masked_fill(~is_possible, 0.0)
        counts = is_possible.sum(dim=1).tolist()
    entropies = (-torch.linalg.vecdot(probs, logprobs)).tolist()
    sums = logprobs.sum(dim=1).tolist()
    result = []
    for row, token_id in enumerate(token_ids):
        best = [value - log_sums[row] for value in top[row].tolist() if math.isfinite(value)]
        logprob = float(logits[row, token_id]) - log_sums[row]
        result.append(
            TokenScores(
                logprob=logprob,
                entropy=max(0.0, entropies[row]),
                gap=best[0] - best[1] if len(best) > 1 else 0.0,
                confidence=-sum(best) / len(best),
                self_certainty=-sums[row] / counts[row] - math.log(counts[row]),
                top5_share=math.exp(logprob - best[0])
                / sum(math.exp(value - best[0]) for value in best[:_NUM_SHARED]),
            )
        )
    return result
