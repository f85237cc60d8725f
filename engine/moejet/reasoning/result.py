"""What strategies yield while they run and return in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moejet.request import FinishReason
from moejet.statistics import TokenScores


@dataclass(frozen=True, slots=True)
class ScoredStep:
    """A line of the thinking and what the model's step head says of it, between 0 and 1."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to answer, as selectors and scorers see it. The reference answer is not here, so none can look at it.

    text: everything generated, tags included · reasoning: None where the model did not think · answer: extracted from
    the content, None if there is none · finish_reason: "length" means that it was cut off · mean: of the tokens that
    the model chose, see `moejet.statistics` · logprob: their sum · scores: what scorers said, by their names · steps:
    those that a step head scored; () without one · parent: the number of the tree's node that it ended in, -1 without a
    tree · num_tokens: generated for it since the prompt, those that it shares with others included
    """

    text: str
    reasoning: str | None
    content: str
    answer: str | None
    num_tokens: int
    num_thinking_tokens: int = 0
    finish_reason: FinishReason = "stop"
    stop_reason: str | int | None = None
    logprob: float = 0.0
    mean: TokenScores = field(default_factory=TokenScores)
    scores: dict[str, float] = field(default_factory=dict)
    steps: tuple[ScoredStep, ...] = ()
    parent: int = -1


@dataclass(slots=True)
class Usage:
    """What a run has cost, all its branches and models together.

    prompt_tokens: of the first prompt · generated_tokens: sampled and injected ones, also of branches that were given
    up · injected_tokens: of these, what policies put in · appended_tokens: texts that the strategy put in, computed
    like a prompt · branches: that generated anything · steps: engine steps while it ran · expert_loads, expert_bytes:
    routed experts that those steps read for all layers; of a step that also served others, the share of this run's
    branches · step_share: steps, counted by such shares · expected_loads: as expert_loads, had every token of those
    steps chosen its experts at random (`moejet.reasoning.cost`) · model_evaluations: calls of scorers that run a model,
    and of programs
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    thinking_tokens: int = 0
    injected_tokens: int = 0
    appended_tokens: int = 0
    branches: int = 0
    steps: int = 0
    expert_loads: float = 0.0
    expert_bytes: float = 0.0
    step_share: float = 0.0
    expected_loads: float = 0.0
    model_evaluations: int = 0
    seconds: float = 0.0

    def distinct_experts(self, num_moe_layers: int) -> float:
        """Routed experts that one layer read per step, on average."""
        return self.expert_loads / max(1, self.steps * num_moe_layers)


@dataclass(frozen=True, slots=True)
class Node:
    """One step of a search. parent: -1 for the root · state: what became of it."""

    number: int
    parent: int
    text: str
    score: float | None = None
    visits: int = 0
    state: Literal["open", "kept", "pruned", "finished", "chosen"] = "open"


@dataclass(frozen=True, slots=True)
class Progress:
    """Yielded while a strategy runs: what happened, in a sentence, and its numbers.

    kind: "candidate" (one is complete) · "vote" · "step" (of a search) · "stop" (no more are needed) · "note"
    """

    kind: Literal["candidate", "vote", "step", "stop", "note"]
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    node: Node | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The answer of a strategy.

    candidate: the one that was chosen, whose text, reasoning, content and answer stand here as well · confidence: share
    of the vote, or what the strategy says it is, between 0 and 1; NaN if it cannot tell · candidates: all that were
    looked at · nodes: of a search · is_exhausted: the budget ended it before it was done
    """

    candidate: Candidate
    candidates: tuple[Candidate, ...]
    confidence: float = math.nan
    nodes: tuple[Node, ...] = ()
    usage: Usage = field(default_factory=Usage)
    is_exhausted: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.candidate.text

    @property
    def reasoning(self) -> str | None:
        return self.candidate.reasoning

    @property
    def content(self) -> str:
        return self.candidate.content

    @property
    def answer(self) -> str | None:
        return self.candidate.answer

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinities are None."""
        value: dict[str, Any] = json_value(asdict(self))
        return value


def json_value(value: Any) -> Any:
    """The value with lists for tuples and None for the numbers that JSON lacks, at every depth."""
    if isinstance(value, dict):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Background:
    """Work that would hold up the engine, to be done on another thread: a program to run, an equality to prove."""

    function: Callable[[], Any]
