"""Choosing tokens from logits: temperature, top_k, top_p and min_p, then inverse transform sampling.

With u in [0, 1), the chosen token is the first whose cumulative probability exceeds u: in order of token id without
cut-offs, else in order of descending probability, the smaller id first among equals. top_p is taken of what top_k
left, min_p relative to the largest probability. temperature=0 takes the largest logit, the smallest id among equals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.config import use_reference
from moejet.extension import load_extension
from moejet.ops.native import cpu_isa, runs_native
from moejet.request import SamplingParams

# In place of a token: the row holds NaN or +inf, or nothing above -inf.
BAD_LOGITS = -1
_UNDECIDED = -2  # C++ considers so many tokens at most and leaves the rest to torch


def sample_tokens(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    """One token id, or BAD_LOGITS, per row of logits [B, V] fp32. Each row has its params and its u.

    Waits for the device, where the logits are on one; `moejet.ops.device_sampling` does not.
    """
    if params and logits.is_cuda and not use_reference():
        from moejet.ops.device_sampling import SamplingTensors, sample_on_device

        rows = SamplingTensors.of(params, uniforms, device=logits.device, adjust=False)
        chosen: list[int] = sample_on_device(logits, rows)[0].tolist()
        return chosen
    if not params or not runs_native(logits):
        return sample_tokens_ref(logits, params, uniforms)
    tokens: list[int] = load_extension().sample(
        logits,
        [p.temperature for p in params],
        [min(p.top_k, logits.shape[1]) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        uniforms,
        isa=cpu_isa(),
    )
    for i, token in enumerate(tokens):
        if token == _UNDECIDED:
            tokens[i] = _choose(logits[i], params[i], uniforms[i])
    return tokens


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
            result.append(_choose(row, param, u))
    return result


def _choose(row: Tensor, params: SamplingParams, u: float) -> int:
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
