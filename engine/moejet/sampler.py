"""Turns logits into tokens.

The uniform number behind each choice is a hash of (seed, position), so a request's tokens do not depend on its
neighbours in the batch, on the step it ran in, or on how often it was preempted. Log-probabilities are those of the
raw logits, before penalties, bias, temperature and cut-offs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moejet.request import Request, SamplingParams, TokenLogprobs

_MASK64 = (1 << 64) - 1


class BadLogitsError(FloatingPointError):
    """The model produced NaN or infinite logits for `request_ids`: its weights or its input are broken."""

    def __init__(self, request_ids: list[str]):
        super().__init__(
            f"the model produced NaN or infinite logits for {', '.join(request_ids)}: check the "
            "checkpoint (MOEJET_REF=1 tells whether a kernel is at fault)"
        )
        self.request_ids = request_ids


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, requests: list[Request]) -> list[SampledToken]:
    """Chooses the next token of each request.

    logits [B, V] any float dtype, row i belongs to requests[i]. Raises `BadLogitsError` if a row holds NaN or +inf.
    """
    logits = logits.float()
    broken = (torch.isnan(logits) | torch.isposinf(logits)).any(dim=-1)
    if bool(broken.any()):
        raise BadLogitsError([requests[i].request_id for i in torch.nonzero(broken)[:, 0].tolist()])
    wants_logprobs = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
    logprobs = {i: torch.log_softmax(logits[i], dim=-1) for i in wants_logprobs}
    greedy = torch.argmax(logits, dim=-1).tolist()
    result: list[SampledToken] = []
    for i, request in enumerate(requests):
        params = request.params
        row = logits[i]
        plain = not params.has_penalties and not params.logit_bias
        if not plain:
            row = adjust_logits(row, request)
        if params.temperature == 0.0:
            token_id = greedy[i] if plain else int(torch.argmax(row))
        else:
            u = uniform(request.seed, len(request.token_ids))
            token_id = choose(row, params, u)
        entry = _describe(logprobs[i], token_id, params) if i in logprobs else None
        result.append(SampledToken(token_id, entry))
    return result


def adjust_logits(row: Tensor, request: Request) -> Tensor:
    """Applies penalties and logit_bias to one row [V]; returns a new tensor.

    Repetition (arXiv 1909.05858) counts prompt and output, presence and frequency the output only, as in OpenAI's API.
    """
    params, row = request.params, row.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(request.token_ids)), dtype=torch.int64)
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if request.output_token_ids and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(torch.tensor(request.output_token_ids))
        ids = torch.nonzero(counts).squeeze(1)
        counts = counts[ids]
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token_id, bias in (params.logit_bias or {}).items():
        row[token_id] += bias
    return row


def choose(row: Tensor, params: SamplingParams, u: float) -> int:
    """Draws one token from the cut-off, tempered distribution of row [V] by inverse transform with u in [0, 1)."""
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
    values, ids = torch.topk(probs, min(k, probs.numel()))
    by_id = torch.argsort(ids)
    order = by_id[torch.argsort(values[by_id], descending=True, stable=True)]
    return values[order], ids[order]


def _inverse_transform(probs: Tensor, u: float) -> int:
    cumulative = torch.cumsum(probs, dim=0)
    index = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    if index < probs.numel() and float(probs[index]) > 0.0:
        return index
    return int(torch.nonzero(probs)[-1])


def _describe(logprobs: Tensor, token_id: int, params: SamplingParams) -> TokenLogprobs:
    top: tuple[tuple[int, float], ...] = ()
    if params.logprobs:
        values, ids = torch.topk(logprobs, min(params.logprobs, logprobs.numel()))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs[token_id]), top)


def uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1) from (seed, position): two rounds of the SplitMix64 finaliser."""
    return (_mix64(_mix64(seed & _MASK64) ^ (position & _MASK64)) >> 11) / (1 << 53)


def derive_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request; sample 0 keeps the request's own."""
    return seed if index == 0 else _mix64(_mix64(seed & _MASK64) + index)


def _mix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
