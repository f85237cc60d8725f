"""What passes between the server and an engine that runs strategies (`moejet.reasoning`); loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import msgspec

from moejet.reasoning.result import Progress, Result
from moejet.reasoning.spec_text import Spec
from moejet.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Conversation:
    """Of what a prompt was made, so that a strategy can go on with it: messages, and variables of the chat template."""

    messages: list[dict[str, Any]]
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SolveJob:
    """One request to be answered by a strategy.

    strategy: its specification (`moejet.reasoning.spec_text`) · limits: fields of `moejet.reasoning.budget.Budget`
    max_samples: that the specification may ask for · compares: answers by what they say, or answers as they stand
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    strategy: str
    seed: int
    limits: dict[str, int | float] = field(default_factory=dict)
    max_samples: int = 64
    compares: Literal["answers", "texts"] = "answers"
    conversation: Conversation | None = None

    @property
    def name(self) -> str:
        """Of the strategy, without its options."""
        return Spec.read(self.strategy).name


@dataclass(frozen=True, slots=True)
class Outcome:
    """A strategy's result. distinct_experts: that one layer read per step, on average."""

    result: Result
    distinct_experts: float

    @property
    def abandoned_tokens(self) -> int:
        """Generated ones that are part of no candidate; where candidates share tokens it may be more."""
        kept = sum(candidate.num_tokens for candidate in self.result.candidates)
        return max(0, self.result.usage.generated_tokens - kept)


class StrategyRun(Protocol):
    """A running strategy. Closing or dropping it ends it within one step."""

    async def get(self) -> Progress | Outcome:
        """What comes next; the outcome is the last. Raises what ended the run."""

    def close(self) -> None: ...


def engine_usage(outcome: Outcome) -> dict[str, Any]:
    """`usage.engine`: what all branches together have cost."""
    usage = outcome.result.usage
    return {
        "branches": usage.branches,
        "steps": usage.steps,
        "expert_loads": usage.expert_loads,
        "distinct_experts_mean": outcome.distinct_experts,
        "expert_bytes": usage.expert_bytes,
        "appended_tokens": usage.appended_tokens,
        "model_evaluations": usage.model_evaluations,
    }


def plain(event: Progress | Result) -> Any:
    """The same with nothing in it but what JSON knows, so that it is the same in every process."""
    if isinstance(event, Progress):
        return replace(event, data=_builtins(event.data))
    return replace(event, details=_builtins(event.details))


def _builtins(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(value, enc_hook=repr))
    return found
