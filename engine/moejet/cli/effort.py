"""--effort: how hard a model shall think, by its chat template if that knows efforts, else by a limit of tokens."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejet.llm import LLM
    from moejet.request import SamplingParams

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")


def add_effort_option(parser: argparse._ActionsContainer) -> None:
    """Add --effort."""
    parser.add_argument(
        "--effort",
        choices=EFFORTS,
        help="how hard to think: a limit on the tokens of thinking, or what the chat template makes of it",
    )


def template_of(level: str | None, llm: "LLM") -> dict[str, Any]:
    """What the chat template is told of the level; nothing if it knows no efforts."""
    if level in (None, "none"):
        return {}
    from moejet.reasoning.effort import template_effort

    assert level is not None
    return template_effort(level, llm.tokenizer.template_variables)


def with_level(
    params: "SamplingParams", level: str | None, model: str, llm: "LLM"
) -> "SamplingParams":
    """params with the level's limit, unless the chat template takes care of it."""
    if level is None or template_of(level, llm):
        return params
    from moejet.reasoning.effort import with_effort

    return with_effort(params, level, model)


def resolve_strategy(spec: str, level: str | None) -> str:
    """`auto` becomes what is worth its cost at the level."""
    if spec != "auto":
        return spec
    if level is None:
        raise ValueError("--strategy auto needs --effort: it chooses by the level")
    from moejet.reasoning.effort import strategy_of

    return strategy_of(level)
