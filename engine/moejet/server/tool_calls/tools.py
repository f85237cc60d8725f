"""The tools that a request offers, and which of them the model may or must call, in every dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moejet.grammar import MAX_DEPTH, check_members
from moejet.validation import short

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 1 << 20  # of all tools together, as JSON
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """parameters: JSON schema of the arguments object · strict: arguments must fit it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates expect; those of DeepSeek join texts, so that none may be missing."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """name: the one tool that must be called · parallel: whether there may be several calls."""

    mode: Mode = "auto"
    name: str | None = None
    parallel: bool = True


def parse_tools(value: object) -> tuple[Tool, ...]:
    """Checked tools of OpenAI's Chat ({"function": {...}}) or Responses form, or Anthropic's (`input_schema`)."""
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise ValueError(f"tools must be a list of tools, not {type(value).__name__}")
    if len(value) > MAX_TOOLS:
        raise ValueError(f"tools holds {len(value)} tools, and {MAX_TOOLS} are allowed")
    tools = tuple(_parse_tool(tool, f"tools[{i}]") for i, tool in enumerate(value))
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            raise ValueError(f"tools[{i}]: the name {tool.name!r} occurs twice: rename one tool")
        seen.add(tool.name)
    num_chars = sum(len(json.dumps(tool.for_template())) for tool in tools)
    if num_chars > MAX_TOOLS_CHARS:
        raise ValueError(
            f"tools has {num_chars} characters as JSON, and {MAX_TOOLS_CHARS} are allowed: offer "
            "fewer or shorter tools"
        )
    return tools


def _parse_tool(value: object, where: str) -> Tool:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, not {type(value).__name__}")
    kind = value.get("type")
    if kind not in (None, "function", "custom") or (
        kind == "custom" and "input_schema" not in value
    ):
        raise ValueError(f"{where}.type={short(kind)} is not supported: use 'function'")
    spec, at = value, where
    if "function" in value:
        spec, at = value["function"], f"{where}.function"
        if not isinstance(spec, Mapping):
            raise ValueError(f"{at} must be an object, not {type(spec).__name__}")
    name = spec.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{at}.name={short(name)} must be 1 to 64 letters, digits, underscores and dashes"
        )
    description = spec.get("description")
    if not isinstance(description, str | None):
        raise ValueError(f"{at}.description={short(description)} must be a string")
    strict = spec.get("strict")
    if not isinstance(strict, bool | None):
        raise ValueError(f"{at}.strict={short(strict)} must be true or false")
    word = "input_schema" if "input_schema" in spec else "parameters"
    return Tool(name, description or "", _schema(spec.get(word), f"{at}.{word}"), bool(strict))


def _schema(value: object, where: str) -> Mapping[str, Any]:
    if value is None or value == {}:
        return {"type": "object", "properties": {}}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a JSON schema object, not {type(value).__name__}")
    if value.get("type", "object") != "object":
        raise ValueError(
            f"{where}.type={short(value['type'])} must be 'object': arguments have names"
        )
    properties = value.get("properties")
    if not isinstance(properties, Mapping | None):
        raise ValueError(f"{where}.properties={short(properties)} must be an object")
    for name, part in (properties or {}).items():
        if not isinstance(part, Mapping | bool):
            raise ValueError(f"{where}.properties.{short(name)} must be a JSON schema")
    _check_depth(value, where)
    return {"type": "object", **value}


def _check_depth(value: object, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        check_members(level, where)
        level = [
            child
            for node in level
            if isinstance(node, Mapping | list)
            for child in (node.values() if isinstance(node, Mapping) else node)
        ]
    if level:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels: flatten the schema")


def parse_tool_choice(
    value: object,
    tools: Sequence[Tool],
    *,
    parallel: bool | None = None,
) -> ToolChoice:
    """The choice in any dialect; without tools, "none". parallel: `parallel_tool_calls`."""
    several = True if parallel is None else parallel
    if not isinstance(several, bool):
        raise ValueError(f"parallel_tool_calls={short(parallel)} must be true or false")
    if isinstance(value, Mapping) and isinstance(value.get("disable_parallel_tool_use"), bool):
        several = several and not value["disable_parallel_tool_use"]
    word = value.get("type") if isinstance(value, Mapping) else value
    if word is None and value is None:
        return ToolChoice("auto" if tools else "none", None, several)
    if word in ("function", "tool") and isinstance(value, Mapping):
        spec = value.get("function", value)
        name = spec.get("name") if isinstance(spec, Mapping) else None
        if not any(tool.name == name for tool in tools):
            names = ", ".join(tool.name for tool in tools[:8]) or "none"
            raise ValueError(
                f"tool_choice names {short(name)}, which is not offered; tools: {names}"
            )
        return ToolChoice("required", name, False)
    modes: dict[object, Mode] = {
        "none": "none",
        "auto": "auto",
        "required": "required",
        "any": "required",
    }
    if not isinstance(word, str) or word not in modes:
        raise ValueError(
            f"tool_choice={short(value)} must be 'none', 'auto', 'required' or name a function"
        )
    if modes[word] == "required" and not tools:
        raise ValueError(f"tool_choice={short(value)} needs tools, and none are offered")
    return ToolChoice(modes[word] if tools else "none", None, several)
