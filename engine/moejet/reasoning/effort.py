"""How hard a model shall think: levels, and the tokens of thinking that each allows.

Longer thinking is not always better (arXiv 2507.14419, 2506.04210), so a level only sets a limit; several samples and a
vote are a strategy of their own, which `strategy_of` proposes for the higher levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejet.request import SamplingParams

# None: no limit but the context. Models that were taught efforts get theirs from the chat template instead.
EFFORT_BUDGETS: Mapping[str, int | None] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": 32768,
    "max": None,
    "ultra": None,
}
EFFORTS = tuple(EFFORT_BUDGETS)
# Of models whose thoughts are of another length, by the name under which they are loaded.
_OWN_BUDGETS: Mapping[str, Mapping[str, int | None]] = {
    "tiny-reasoner": {
        "none": 0,
        "minimal": 16,
        "low": 48,
        "medium": 96,
        "high": 192,
        "xhigh": 384,
        "max": None,
        "ultra": None,
    },
}
_STRATEGIES = {
    "high": "adaptive:4",
    "xhigh": "adaptive:8",
    "max": "adaptive:16",
    "ultra": "adaptive:40",
}


def effort_budgets(model: str) -> Mapping[str, int | None]:
    """Tokens of thinking at each level, for a model by its name."""
    return _OWN_BUDGETS.get(model, EFFORT_BUDGETS)


def with_effort(params: SamplingParams, level: str, model: str) -> SamplingParams:
    """params with a level's limit, or with their own if that is tighter."""
    budgets = effort_budgets(model)
    if level not in budgets:
        raise ValueError(f"effort={level!r} must be one of {', '.join(budgets)}")
    limits = [x for x in (budgets[level], params.max_thinking_tokens) if x is not None]
    return replace(params, max_thinking_tokens=min(limits)) if limits else params


def strategy_of(level: str) -> str:
    """The specification (`moejet.reasoning.specs`) of the strategy that is worth its cost at a level."""
    return _STRATEGIES.get(level, "single")


def template_effort(level: str, variables: frozenset[str] | set[str]) -> dict[str, Any]:
    """What a chat template that knows efforts is told."""
    return {"reasoning_effort": level} if "reasoning_effort" in variables else {}
