"""Turns logits into tokens.

The uniform number behind each choice is a hash of (seed, position), so a request's tokens do not depend on its
neighbours in the batch, on the step it ran in, or on how often it was preempted. Log-probabilities are those of the
raw logits, before penalties, bias, temperature and cut-offs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moejet.batch import int64_tensor
from moejet.ops.sample import sample_tokens
from moejet.ops.sample_ref import BAD_LOGITS
from moejet.ops.token_scores import token_scores
from moejet.ops.top_logits import top_logits
from moejet.request import Request, SamplingParams, TokenLogprobs
from moejet.sample_state import PolicyFailure
from moejet.statistics import TokenScores

_MASK64 = (1 << 64) - 1


class BadLogitsError(FloatingPointError):
    """The model produced NaN or infinite logits for a request: its weights or its input are broken."""

    def __init__(self, request_id: str):
        super().__init__(
            f"the model produced NaN or infinite logits for {request_id}: check the checkpoint "
            "(MOEJET_REF=1 tells whether a kernel is at fault)"
        )


@dataclass(frozen=True, slots=True)
class SampledToken:
    """error: why there is no choice: `BadLogitsError`, or what the request's policy raised."""

    token_id: int
    logprobs: TokenLogprobs | None
    scores: TokenScores | None = None
    error: Exception | None = None


# For rows that are sampled after their logits were adjusted: the raw row is checked all the same.
_GREEDY = SamplingParams(temperature=0.0)


def sample(logits: Tensor, requests: list[Request]) -> list[SampledToken]:
    """Chooses the next token of each request.

    logits [B, V] any float dtype, row i belongs to requests[i]. A row that holds NaN or +inf, or nothing above -inf,
    gets a `BadLogitsError`.
    """
    logits = logits.float()
    uniforms = [uniform(r.seed, len(r.token_ids)) for r in requests]
    adjusted = [i for i, r in enumerate(requests) if _adjusts(r)]
    rules = [r.params for r in requests]
    for i in adjusted:
        rules[i] = _GREEDY
    tokens = sample_tokens(logits, rules, uniforms)
    errors: dict[int, Exception] = {
        i: BadLogitsError(requests[i].request_id)
        for i, token in enumerate(tokens)
        if token == BAD_LOGITS
    }
    for i in adjusted:
        if i in errors:
            continue
        row = adjust_logits(logits[i], requests[i])
        if (state := requests[i].sample_state) is not None:
            try:
                row = state.edit_logits(row)
            except PolicyFailure as failure:
                errors[i] = failure.error
                continue
        row = row.unsqueeze(0)
        tokens[i] = sample_tokens(row, [requests[i].params], [uniforms[i]])[0]
        if tokens[i] == BAD_LOGITS:  # logits near the limits of fp32, made infinite by a penalty
            errors[i] = BadLogitsError(requests[i].request_id)
    result: list[SampledToken] = []
    for i, (request, token) in enumerate(zip(requests, tokens, strict=True)):
        wanted = request.params.logprobs
        entry = None if wanted is None or i in errors else _describe(logits[i], token, wanted)
        result.append(SampledToken(token, entry, error=errors.get(i)))
    return _with_scores(logits, requests, result)


def samples_plainly(request: Request) -> bool:
    """Whether the next token depends on nothing but the raw logits, temperature and cut-offs, and only it is wanted."""
    state = request.sample_state
    return (
        not _adjusts(request)
        and request.params.logprobs is None
        and (state is None or state.statistics is None)
    )


def sampled_token(request: Request, token: int) -> SampledToken:
    """What a device has chosen for a request that `samples_plainly`."""
    error = BadLogitsError(request.request_id) if token == BAD_LOGITS else None
    return SampledToken(token, None, error=error)


def _with_scores(
    logits: Tensor, requests: list[Request], tokens: list[SampledToken]
) -> list[SampledToken]:
    wanted = [
        i
        for i, r in enumerate(requests)
        if r.sample_state is not None
        and r.sample_state.statistics is not None
        and tokens[i].error is None
    ]
    if not wanted:
        return tokens
    rows = logits if len(wanted) == len(requests) else logits[wanted]
    scores = token_scores(rows, [tokens[i].token_id for i in wanted])
    for i, entry in zip(wanted, scores, strict=True):
        tokens[i] = replace(tokens[i], scores=entry)
    return tokens


def _adjusts(request: Request) -> bool:
    params, state = request.params, request.sample_state
    return (
        params.has_penalties
        or bool(params.logit_bias)
        or (state is not None and state.needs_logits)
    )


def adjust_logits(row: Tensor, request: Request) -> Tensor:
    """Applies penalties and logit_bias to one row [V]; returns a new tensor.

    Repetition (arXiv 1909.05858) counts prompt and output, presence and frequency the output only, as in OpenAI's API.
    """
    params, row = request.params, row.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.unique(int64_tensor(request.token_ids))
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(int64_tensor(request.output_token_ids))
        ids = torch.nonzero(counts).squeeze(1)
        counts = counts[ids]
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token_id, bias in (params.logit_bias or {}).items():
        row[token_id] += bias
    return row


def _describe(row: Tensor, token_id: int, wanted: int) -> TokenLogprobs:
    values, ids, log_sums = top_logits(row.unsqueeze(0), wanted)
    logprobs = [value - log_sums[0] for value in values[0].tolist()]
    top = tuple(zip(ids[0].tolist(), logprobs, strict=True))
    return TokenLogprobs(token_id, float(row[token_id]) - log_sums[0], top)


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
