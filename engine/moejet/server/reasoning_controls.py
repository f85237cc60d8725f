"""What clients of every dialect say about thinking, in one form.

| field | meaning |
|---|---|
| `reasoning_effort`, `reasoning.effort`, `output_config.effort`, `think: "high"` | one of `EFFORTS` |
| `thinking.type`, `thinking`, `enable_thinking`, `think`, `reasoning.enabled` | on, off |
| `thinking.budget_tokens`, `reasoning.max_tokens` and the names in `BUDGET_FIELDS` | limit in tokens, 0 off, -1 none |
| `include_reasoning`, `reasoning.exclude`, `thinking.display` | whether the thinking is returned |
| `chat_template_kwargs` | variables that the model's chat template reads; switches and efforts among them as above |

A model is switched by its template's own variable where it has one. Where it has none, "off" is a budget of 0: the tag
is closed as soon as it is opened. An effort goes to a template that reads `reasoning_effort`; for other models it is a
budget. Fields that contradict each other are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moejet.reasoning.effort import EFFORT_BUDGETS, EFFORTS
from moejet.tokenizer import Tokenizer
from moejet.validation import short

SWITCHES = ("thinking", "enable_thinking")  # in templates
BUDGET_FIELDS = (
    "thinking_token_budget",
    "thinking_budget",
    "thinking_budget_tokens",
    "reasoning_budget",
    "reasoning_budget_tokens",
    "max_thinking_tokens",
)
REASONING_FIELDS = (
    *("reasoning_effort", "reasoning", "thinking", "enable_thinking", "think", "output_config"),
    *("include_reasoning", "separate_reasoning", "chat_template_kwargs", *BUDGET_FIELDS),
)
MAX_KWARGS_CHARS = 16 << 10
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReasoningControls:
    """What a request wants.

    template_kwargs: for the chat template · max_thinking_tokens: for SamplingParams · effort: as asked for
    is_enabled: None leaves it to the model
    """

    template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_thinking_tokens: int | None = None
    include_reasoning: bool = True
    effort: str | None = None
    is_enabled: bool | None = None


def normalise_reasoning(
    fields: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    *,
    effort_budgets: Mapping[str, int | None] = EFFORT_BUDGETS,
) -> ReasoningControls:
    """Reads those of `REASONING_FIELDS` that a request has; a null is as good as a missing field.

    `output_config.format` is the caller's. Raises ValueError naming the field (or both), its value and what to do.
    """
    claims = _Claims()
    claims.read({name: value for name, value in fields.items() if value is not None})
    variables = tokenizer.template_variables if tokenizer is not None else frozenset()
    kwargs = _template_kwargs(fields.get("chat_template_kwargs"), variables, tokenizer)
    claims.read_kwargs(kwargs)
    effort = _agreed(claims.efforts)
    budget = _agreed(claims.budgets)
    switch = _agreed(claims.switches)
    tags = tokenizer.think_tags if tokenizer is not None else None
    if tags is None and switch is not None and switch[1]:
        raise ValueError(f"{switch[0]}: this model does not think; leave the field out")
    if effort is not None and "reasoning_effort" not in variables and budget is None:
        budget = (effort[0], effort_budgets[effort[1]])
    if effort is not None and effort[1] != "none" and "reasoning_effort" in variables:
        kwargs["reasoning_effort"] = effort[1]
    limit = budget[1] if budget is not None else None
    if switch is not None:
        limit = limit if switch[1] else 0
        kwargs |= {name: switch[1] for name in SWITCHES if name in variables}
    include = _agreed(claims.includes)
    return ReasoningControls(
        template_kwargs={name: kwargs[name] for name in kwargs if name in variables},
        max_thinking_tokens=limit if tags is not None else None,
        include_reasoning=True if include is None else include[1],
        effort=effort[1] if effort is not None else None,
        is_enabled=switch[1] if switch is not None else None,
    )


class _Claims:
    """What the fields of a request say, each with the name of the field."""

    def __init__(self) -> None:
        self.switches: list[tuple[str, bool]] = []
        self.efforts: list[tuple[str, str]] = []
        self.budgets: list[tuple[str, int | None]] = []
        self.includes: list[tuple[str, bool]] = []

    def read(self, fields: Mapping[str, Any]) -> None:
        if "reasoning_effort" in fields:
            self._effort("reasoning_effort", fields["reasoning_effort"])
        if "enable_thinking" in fields:
            self._switch("enable_thinking", fields["enable_thinking"])
        if "think" in fields:
            is_level = isinstance(fields["think"], str)
            (self._effort if is_level else self._switch)("think", fields["think"])
        for name in BUDGET_FIELDS:
            if name in fields:
                self._budget(name, fields[name])
        if "include_reasoning" in fields:
            self.includes.append(_flag("include_reasoning", fields["include_reasoning"]))
        if fields.get("separate_reasoning", True) is not True:
            raise ValueError(
                f"separate_reasoning={short(fields['separate_reasoning'])} is not supported: "
                "reasoning is always separate from content; leave the field out"
            )
        self._read_thinking(fields.get("thinking"))
        self._read_reasoning(fields.get("reasoning"))
        config = _object("output_config", fields.get("output_config"), ("effort", "format"))
        if "effort" in config:
            self._effort("output_config.effort", config["effort"])

    def read_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        for name in SWITCHES:
            if name in kwargs:
                self._switch(f"chat_template_kwargs.{name}", kwargs[name])
        if "reasoning_effort" in kwargs:
            self._effort("chat_template_kwargs.reasoning_effort", kwargs["reasoning_effort"])

    def _read_thinking(self, value: object) -> None:
        if isinstance(value, bool):
            return self._switch("thinking", value)
        spec = _object("thinking", value, ("type", "budget_tokens", "display"))
        if "type" in spec:
            switches = {"enabled": True, "disabled": False, "adaptive": None}
            kind = spec["type"]
            if not isinstance(kind, str) or kind not in switches:
                raise ValueError(
                    f"thinking.type={short(kind)} must be 'enabled', 'disabled' or 'adaptive'"
                )
            if (switch := switches[kind]) is not None:
                self._switch("thinking.type", switch)
        if "budget_tokens" in spec:
            self._budget("thinking.budget_tokens", spec["budget_tokens"])
        if "display" in spec:
            if spec["display"] not in ("summarized", "omitted"):
                raise ValueError(
                    f"thinking.display={short(spec['display'])} must be 'summarized' or 'omitted'"
                )
            self.includes.append(("thinking.display", spec["display"] == "summarized"))

    def _read_reasoning(self, value: object) -> None:
        known = ("effort", "max_tokens", "exclude", "enabled", "summary", "generate_summary")
        spec = _object("reasoning", value, known)
        if "effort" in spec:
            self._effort("reasoning.effort", spec["effort"])
        if "max_tokens" in spec:
            self._budget("reasoning.max_tokens", spec["max_tokens"])
        if "enabled" in spec:
            self._switch("reasoning.enabled", spec["enabled"])
        if "exclude" in spec:
            name, is_excluded = _flag("reasoning.exclude", spec["exclude"])
            self.includes.append((name, not is_excluded))
        for name in ("summary", "generate_summary"):
            # The thinking itself is returned, which is more than any of them asks for.
            if name in spec and spec[name] not in ("auto", "concise", "detailed"):
                raise ValueError(
                    f"reasoning.{name}={short(spec[name])} must be 'auto', 'concise' or 'detailed'"
                )

    def _effort(self, name: str, value: object) -> None:
        if not isinstance(value, str) or value not in EFFORTS:
            raise ValueError(f"{name}={short(value)} must be one of {', '.join(EFFORTS)}")
        self.efforts.append((name, value))
        self.switches.append((f"{name}={value!r}", value != "none"))

    def _switch(self, name: str, value: object) -> None:
        name, is_on = _flag(name, value)
        self.switches.append((f"{name}={value!r}", is_on))

    def _budget(self, name: str, value: object) -> None:
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if not is_count or not -1 <= int(str(value)) < 2**31:
            raise ValueError(
                f"{name}={short(value)} must be a number of tokens: 0 switches the thinking off, "
                "-1 sets no limit"
            )
        tokens = int(str(value))
        self.budgets.append((name, None if tokens < 0 else tokens))
        if tokens == 0:
            self.switches.append((f"{name}=0", False))


def _agreed(claims: list[tuple[str, T]]) -> tuple[str, T] | None:
    """The first claim, if all others say the same."""
    for name, value in claims[1:]:
        first, wanted = claims[0]
        if value != wanted:
            a, b = (
                n if "=" in n else f"{n}={short(v)}" for n, v in ((first, wanted), (name, value))
            )
            raise ValueError(f"{a} contradicts {b}: give one of the two")
    return claims[0] if claims else None


def _template_kwargs(
    value: object, variables: frozenset[str], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Checked `chat_template_kwargs`: only what the template reads, and nothing that the server sets."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"chat_template_kwargs must be an object, not {type(value).__name__}: "
            'for example {"enable_thinking": false}'
        )
    size = len(json.dumps(value))
    if size > MAX_KWARGS_CHARS:
        raise ValueError(
            f"chat_template_kwargs has {size} characters as JSON, and {MAX_KWARGS_CHARS} are allowed"
        )
    # A switch is understood even where a template has none.
    allowed = variables.union(SWITCHES if tokenizer is not None else ())
    for name in value:
        if name not in allowed:
            names = f"use {', '.join(sorted(allowed))}" if allowed else "leave it out"
            raise ValueError(
                f"chat_template_kwargs has {short(name)}, which is not a variable of this model's "
                f"chat template: {names}"
            )
    return dict(value)


def _object(name: str, value: object, known: tuple[str, ...]) -> dict[str, Any]:
    """A field's own fields, those that are null left out."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={short(value)} must be an object with {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ValueError(f"{name} has no field {short(key)}: use {', '.join(known)}")
    return {key: item for key, item in value.items() if item is not None}


def _flag(name: str, value: object) -> tuple[str, bool]:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={short(value)} must be true or false")
    return name, value
