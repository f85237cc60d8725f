"""`reasoning_strategy` in requests, and what answers say of it.

| field | meaning |
|---|---|
| `reasoning_strategy` | "vote:16" or {"name": "vote", "n": 16, ...}: see `moejet.reasoning.specs` |
| `strategy_budget` | {"total_tokens", "thinking_tokens", "wall_s", "branches"}: see `moejet.reasoning.budget` |
| `return_candidates` | whether the answer lists what it was chosen from |

One choice is returned. Fields that a strategy cannot honour are refused. Without the field, an effort may stand for a
strategy (`ServerConfig.effort_strategies`), in requests that hold nothing against it.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from moejet.reasoning.effort import strategy_of
from moejet.reasoning.result import Candidate
from moejet.reasoning.spec_text import Spec
from moejet.server.errors import wrong
from moejet.server.generation import Plan, StrategyStep
from moejet.server.protocol.common import Context
from moejet.server.strategies import Outcome, SolveJob
from moejet.validation import near_miss, short

LIMITS = ("total_tokens", "thinking_tokens", "wall_s", "branches")
# Each candidate of these is written in one go, which a grammar can follow.
_STRUCTURED = ("single", "vote", "weighted", "borda", "best", "shortest", "mbr", "adaptive")
_MAX_SPEC_CHARS = 400


class StrategyFields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    reasoning_strategy: str | dict[str, Any] | None = None
    strategy_budget: dict[str, Any] | None = None
    return_candidates: bool | None = None


def with_strategy(
    plan: Plan,
    fields: StrategyFields,
    context: Context,
    *,
    effort: str | None = None,
    calls_tools: bool = False,
) -> Plan:
    """The plan of a conversation, to be answered by a strategy if the request, or its effort, asks for one.

    calls_tools: the answer may call tools. Raises ApiError naming what does not go with a strategy.
    """
    spec: str | dict[str, Any] | None = fields.reasoning_strategy
    conflict = next(_conflicts(plan, calls_tools), None)
    config = context.config
    if spec is None and config.strategies and config.effort_strategies and conflict is None:
        chosen = strategy_of(effort or "")
        spec = None if chosen == "single" else chosen
    if spec is None:
        _check_alone(fields)
        return plan
    if not config.strategies:
        raise wrong(
            f"reasoning_strategy={short(spec)} is not allowed on this server: leave it out",
            "reasoning_strategy",
        )
    if conflict is not None:
        name, what = conflict
        raise wrong(
            f"{what} does not go with reasoning_strategy={short(spec)}: leave one of the two out",
            name,
        )
    if len(json.dumps(spec)) > _MAX_SPEC_CHARS:
        raise wrong(
            f"reasoning_strategy={short(spec)} is too long: write a name and numbers, as in 'vote:16'",
            "reasoning_strategy",
        )
    try:
        read = Spec.read(spec)
    except ValueError as error:
        raise wrong(f"reasoning_strategy={short(spec)}: {error}", "reasoning_strategy") from None
    job = plan.jobs[0]
    solve = SolveJob(
        request_id=job.request_id,
        token_ids=job.token_ids,
        params=replace(job.params, seed=None),
        strategy=read.text,
        seed=secrets.randbits(62) if job.params.seed is None else job.params.seed,
        limits=_limits(fields.strategy_budget),
        max_samples=config.max_strategy_samples,
        compares="answers" if job.params.grammar is None else "texts",
        conversation=plan.conversation,
    )
    if job.params.grammar is not None and not set(read.names) <= set(_STRUCTURED):
        raise wrong(
            f"reasoning_strategy={short(spec)} does not go with an answer of a given form "
            f"(response_format, structured_outputs): choose one of {', '.join(_STRUCTURED)}",
            "reasoning_strategy",
        )
    return replace(plan, solve=solve, returns_candidates=bool(fields.return_candidates))


def _conflicts(plan: Plan, calls_tools: bool) -> Iterator[tuple[str, str]]:
    """Fields that branches cannot honour, and what was said there."""
    job = plan.jobs[0]
    params = job.params
    if params.n != 1:
        yield "n", f"n={params.n} (a strategy returns one choice; ask for return_candidates)"
    if params.logprobs is not None:
        yield "logprobs", "logprobs (candidates have none; ask for return_candidates)"
    if params.stop:
        yield "stop", f"stop={short(list(params.stop))} (candidates end by themselves)"
    if calls_tools:
        yield "tools", "tools that may be called (send tool_choice='none')"
    if job.priority:
        yield "priority", f"priority={job.priority} (branches have none)"
    if plan.wants_progress:
        yield "return_progress", "return_progress (send stream_options.include_progress)"


def _check_alone(fields: StrategyFields) -> None:
    for name in ("strategy_budget", "return_candidates"):
        if value := getattr(fields, name):
            raise wrong(
                f"{name}={short(value)} needs reasoning_strategy: name one, or leave it out", name
            )


def _limits(given: dict[str, Any] | None) -> dict[str, int | float]:
    found: dict[str, int | float] = {}
    for name, value in (given or {}).items():
        field = f"strategy_budget.{name[:80]}"
        if name not in LIMITS:
            hint = near_miss(name, LIMITS) or f"; known: {', '.join(LIMITS)}"
            raise wrong(f"{field} is unknown{hint}", field)
        if value is None:
            continue
        low = {"thinking_tokens": 0}.get(name, 1)
        if name == "wall_s":
            is_good = _is_number(value) and math.isfinite(value) and value > 0
            wanted = "a positive number of seconds"
        else:
            is_good = _is_number(value) and isinstance(value, int) and low <= value < 2**62
            wanted = f"an integer of at least {low}"
        if not is_good:
            raise wrong(f"{field}={short(value)} must be {wanted}", field)
        found[name] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def strategy_note(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """`reasoning_strategy` of an answer. confidence: None where the strategy cannot tell"""
    assert plan.solve is not None, "a strategy has answered"
    result = outcome.result
    votes = result.details.get("votes")
    return {
        "strategy": plan.solve.strategy,
        "answer": result.answer,
        "confidence": _number(result.confidence),
        "votes": votes if isinstance(votes, dict) else None,
        "num_candidates": len(result.candidates),
        "is_exhausted": result.is_exhausted,
    }


def candidate_list(plan: Plan, outcome: Outcome) -> list[dict[str, Any]]:
    """`reasoning_candidates` of a choice."""
    result = outcome.result
    found = [_candidate(candidate, plan.include_reasoning) for candidate in result.candidates]
    if result.candidate in result.candidates:
        found[result.candidates.index(result.candidate)]["is_chosen"] = True
    return found


def _candidate(candidate: Candidate, include_reasoning: bool) -> dict[str, Any]:
    return {
        "text": candidate.content,
        "reasoning": candidate.reasoning if include_reasoning else None,
        "answer": candidate.answer,
        "score": _number(candidate.scores.get("score", math.nan)),
        "logprob": _number(candidate.mean.logprob),
        "tokens": candidate.num_tokens,
        "finish_reason": candidate.finish_reason,
        "is_chosen": False,
    }


def step_note(plan: Plan, step: StrategyStep) -> dict[str, Any]:
    """What happened, for clients that asked for progress."""
    progress = step.progress
    note: dict[str, Any] = {
        "kind": progress.kind,
        "message": progress.message,
        "data": progress.data,
    }
    if (node := progress.node) is not None:
        note["node"] = {
            "number": node.number,
            "parent": node.parent,
            "text": node.text if plan.include_reasoning else "",
            "score": None if node.score is None else _number(node.score),
            "visits": node.visits,
            "state": node.state,
        }
    return {"progress": note}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
