"""What a sampled token becomes: the tokens that its policies make of it, appended one by one under the stop rules.

A sampled token usually is one token. A policy may put others in its place or behind it; all of them are appended now,
and those without a latent are computed together with the next step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from moejet.output import OutputAssembler
from moejet.request import FinishReason, Request, TokenLogprobs
from moejet.sample_state import PolicyFailure
from moejet.sampler import SampledToken


@dataclass(slots=True)
class Gained:
    """What one step added to a sample, and whether that ended it."""

    token_ids: list[int] = field(default_factory=list)
    reasoning: str = ""
    content: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def add(self, pieces: tuple[str, str]) -> None:
        self.reasoning += pieces[0]
        self.content += pieces[1]


def commit_token(request: Request, assembler: OutputAssembler, token: SampledToken) -> Gained:
    """Appends what comes of a sampled token, until something ends the sample.

    Raises `PolicyFailure` if a policy raised or asked for the impossible; the request is then to be aborted.
    """
    gained = Gained()
    if token.error is not None:
        raise PolicyFailure(token.error)
    state = request.sample_state
    if state is None:
        _append(request, assembler, gained, token.token_id, token)
        return gained
    ids, stop = state.decide(token.token_id, token.scores)
    is_sampled = bool(ids) and ids[0] == token.token_id
    pending = deque(ids)
    while pending and gained.finish_reason is None:
        token_id, was_thinking = pending.popleft(), state.is_thinking
        _append(request, assembler, gained, token_id, token if is_sampled else None)
        if is_sampled and state.statistics is not None and token.scores is not None:
            state.statistics.add(token.scores)
        is_sampled = False
        if gained.finish_reason is None:
            more, ending = state.appended(
                token_id, was_thinking=was_thinking, num_pending=len(pending)
            )
            pending += more
            if ending is not None:
                _end(request, assembler, gained, "stop", ending.reason)
        else:
            state.track(was_thinking)  # a branch may go on
    if stop is not None and gained.finish_reason is None:
        _end(request, assembler, gained, "stop", stop.reason)
    return gained


def _append(
    request: Request,
    assembler: OutputAssembler,
    gained: Gained,
    token_id: int,
    sampled: SampledToken | None,
) -> None:
    """Appends one token and applies the stop rules; `sampled` is None for an injected one."""
    request.token_ids.append(token_id)
    gained.token_ids.append(token_id)
    if request.params.logprobs is not None:
        entry = sampled.logprobs if sampled is not None else None
        entry = entry or TokenLogprobs(token_id, 0.0, is_injected=True)
        request.logprobs.append(entry)
        request.cumulative_logprob += entry.logprob
    is_eos = token_id in request.eos_token_ids
    if is_eos or token_id in request.params.stop_token_ids:
        _end(request, assembler, gained, "stop", None if is_eos else token_id)
        return
    gained.add(assembler.push(token_id))
    if assembler.stopped_by is not None:
        gained.finish("stop", assembler.stopped_by)
    elif len(request.token_ids) >= request.max_total_tokens:
        _end(request, assembler, gained, "length")


def _end(
    request: Request,
    assembler: OutputAssembler,
    gained: Gained,
    reason: FinishReason,
    stop_reason: str | int | None = None,
) -> None:
    """Ends the sample; what its text had held back may turn out to hold a stop string, which then ended it."""
    if not request.is_branch:  # whose text goes on
        gained.add(assembler.flush())
    if assembler.stopped_by is not None:
        reason, stop_reason = "stop", assembler.stopped_by
    gained.finish(reason, stop_reason)
