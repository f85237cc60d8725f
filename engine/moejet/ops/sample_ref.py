"""Choosing tokens from logits in plain torch: reference of `moejet.ops.sample` and `device_sampling`."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.request import SamplingParams

# In place of a token: the row holds NaN or +inf, or nothing above -inf.
BAD_LOGITS = -1


def sample_tokens_ref(
    logits: Tensor, params: list[SamplingParams], uniforms: list[float]
) -> list[int]:
    """Torch reference of `sample_tokens`, in float64."""
    result: list[int] = []
    for row, param, u in zip(logits, params, uniforms, strict=True):
        if bool((torch.isnan(row) | torch.isposinf(row)).any()) or bool(torch.isneginf(row).all()):
            result.append(BAD_LOGITS)
        elif param.temperature == 0.0:
            result.append(int(torch.nonzero(row == row.max())[0]))
        else:
            result.append(choose_token(row, param, u))
    return result


def choose_token(row: Tensor, params: SamplingParams, u: float) -> int:
    # Shifted first: a tiny temperature would send the quotients to infinity.
    wide = row.double()
    probs = torch.softmax((wide - wide.max()) / params.temperature, dim=-1)
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        return _inverse_transform(probs, u)
    k = min(params.top_k or probs.numel(), probs.numel())
    values, ids = _sorted_head(probs, k, params.top_p if params.top_k == 0 else 1.0)
    if params.top_p < 1.0:
        values = values / values.sum() if params.top_k else values
        before = torch.cumsum(values, dim=0) - values
        values = values[before < params.top_p]
    if params.min_p > 0.0:
        values = values[values >= params.min_p * values[0]]
    return int(ids[_inverse_transform(values / values.sum(), u)])


def _sorted_head(probs: Tensor, k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The k largest probabilities in descending order, ties by token id; fewer where they already hold top_p."""
    head = min(k, 1024)
    while head < k:
        values, ids = _topk_stable(probs, head)
        if top_p < 1.0 and float(values.sum()) >= top_p:
            return values, ids
        head *= 8
    return _topk_stable(probs, k)


def _topk_stable(probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    smallest = torch.topk(probs, min(k, probs.numel())).values[-1]
    above = torch.nonzero(probs > smallest)[:, 0]
    equal = torch.nonzero(probs == smallest)[: k - above.numel(), 0]  # torch.topk would take any
    ids = torch.cat((above, equal))
    ids = ids[torch.argsort(probs[ids], descending=True, stable=True)]
    return probs[ids], ids


def _inverse_transform(probs: Tensor, u: float) -> int:
    cumulative = torch.cumsum(probs, dim=0)
    index = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    if index < probs.numel() and float(probs[index]) > 0.0:
        return index
    return int(torch.nonzero(probs)[-1])
