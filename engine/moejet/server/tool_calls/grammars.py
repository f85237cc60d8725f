"""Grammars under which a reply holds tool calls that fit the tools' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from moejet.grammar import WHITE_SPACE, Grammar
from moejet.server.tool_calls.arguments import kind_of
from moejet.server.tool_calls.formats import ToolFormat
from moejet.server.tool_calls.tools import Tool, ToolChoice

# Words of a schema that allow and forbid nothing.
_REMARKS = frozenset(("description", "title", "examples", "default", "$comment", "$schema"))
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))


def tool_grammar(format: ToolFormat, tools: Sequence[Tool], choice: ToolChoice) -> Grammar | None:
    """What a reply must look like, or None if nothing is to be forced.

    "required": calls and nothing else. "auto" with a strict tool: any text, then perhaps calls, which fit their
    schemas; only where calls begin with a token of the vocabulary, since typed text could not be told from them.
    Raises ValueError for tools that make too large a grammar.
    """
    named = [tool for tool in tools if choice.name in (None, tool.name)]
    begin = _split(format.section.replace("$calls", format.pattern), format.tokens)[0]
    is_strict = any(tool.strict for tool in tools) and begin in format.tokens
    if choice.mode == "none" or not named or (choice.mode == "auto" and not is_strict):
        return None
    writer = _Writer(format)
    calls = " | ".join(writer.call(i, tool) for i, tool in enumerate(named))
    more = f" ({writer.text(format.separator)} call)*" * choice.parallel
    before, after = format.section.split("$calls")
    section = f"{writer.text(before)} call{more} {writer.text(after)}"
    start = section if choice.mode == "required" else f"TEXT ({section})?"
    rules = [f"start: {start}", f"call: {calls}", *writer.rules, r"TEXT: /(.|\n)*/"]
    try:
        return Grammar.lark("\n".join(rules))
    except ValueError as error:
        raise ValueError(
            f"tools cannot be enforced ({error}): offer fewer or simpler ones"
        ) from error


class _Writer:
    """Rules of one grammar in Lark's notation."""

    def __init__(self, format: ToolFormat):
        self._format = format
        self.rules: list[str] = []

    def text(self, text: str) -> str:
        """Exactly this text, tokens of the format as such."""
        tokens = self._format.tokens
        parts = [
            f"<[{tokens[part]}]>" if part in tokens else json.dumps(part, ensure_ascii=False)
            for part in _split(text, tokens)
        ]
        return " ".join(parts)

    def call(self, number: int, tool: Tool) -> str:
        """The name of the rule of a call of this tool."""
        name = f"call_{number}"
        arguments = (
            self._json(name, _closed(_lean(tool.parameters)), tool.strict)
            if self._format.fields is None
            else self._fields(name, tool)
        )
        body = self._fill(
            self._format.pattern,
            {"$name": self.text(tool.name), "$number": "/[0-9]{1,3}/", "$arguments": arguments},
        )
        self.rules.append(f"{name}: {body}")
        return name

    def _fill(self, pattern: str, values: Mapping[str, str]) -> str:
        parts = re.split(r"(\$[a-z]+)", pattern)
        return " ".join(
            values[part] if part.startswith("$") else self.text(part) for part in parts if part
        )

    def _json(self, name: str, schema: object, strict: bool) -> str:
        """The name of a rule for JSON that fits a schema."""
        rule = f"{name}_json"
        checked = dict(schema) if isinstance(schema, Mapping) else {}
        # Stated here, so that a schema cannot switch its own checks off.
        checked["x-guidance"] = {
            "lenient": not strict,
            "coerce_one_of": not strict,
            "whitespace_flexible": True,
            "whitespace_pattern": WHITE_SPACE,
        }
        self.rules.append(f"{rule}: %json {json.dumps(checked, ensure_ascii=False)}")
        return rule

    def _fields(self, name: str, tool: Tool) -> str:
        properties = tool.parameters.get("properties") or {}
        needed = tool.parameters.get("required") or ()
        shared = {k: v for k, v in _lean(tool.parameters).items() if k in ("$defs", "definitions")}
        parts = []
        for i, (key, schema) in enumerate(properties.items()):
            rule = f"{name}_{i}"
            typed = {**shared, **_lean(schema)} if isinstance(schema, Mapping) else shared
            forms = self._forms(rule, key, typed, tool.strict)
            self.rules.append(f"{rule}: {' | '.join(forms)}")
            parts.append(rule + "?" * (key not in needed))
        return " ".join(parts)

    def _forms(self, rule: str, key: str, schema: Mapping[str, Any], strict: bool) -> Iterator[str]:
        """A field whose value is a text, and one whose value is other JSON, as far as the schema allows them."""
        assert self._format.fields is not None, "arguments are fields"
        kind, (head, tail) = kind_of(schema, schema), self._format.fields.pattern.split("$value")
        if kind != "json":
            names = {"$key": self.text(key), "$string": '"true"'}
            yield f"{self._fill(head, names)} {self._string(rule, schema, tail)}"
        if kind == "json" or (kind == "any" and "$string" in head):
            names = {"$key": self.text(key), "$string": '"false"'}
            value = self._json(rule, schema, strict)
            yield f"{self._fill(head, names)} {value} {self.text(tail)}"

    def _string(self, rule: str, schema: Mapping[str, Any], tail: str) -> str:
        """A text and what ends it."""
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values and all(isinstance(value, str) for value in values):
            return f"({' | '.join(self.text(value) for value in values)}) {self.text(tail)}"
        end, *rest = _split(tail, self._format.tokens)
        if end in self._format.tokens:
            return f"TEXT {self.text(tail)}"
        if rest:  # a token comes after some text
            last = re.escape(end).replace("/", r"\/")
            return rf"/(.|\n)*{last}/ {self.text(''.join(rest))}"
        assert self._format.fields is not None, "arguments are fields"
        marker = self._format.fields.value_end[0]
        self.rules.append(f"{rule}_text[suffix={json.dumps(marker)}]: TEXT")
        return f"{rule}_text {self.text(tail.removeprefix(marker))}"


def _split(text: str, tokens: Collection[str]) -> list[str]:
    """The text as parts that are tokens and parts between them."""
    if not tokens:
        return [text]
    longest_first = sorted(tokens, key=len, reverse=True)
    return [part for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if part]


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a tool does not declare are not wanted unless it says so."""
    is_open = "properties" not in schema or any(w in schema for w in ("$ref", "allOf", "anyOf"))
    return schema if is_open else {"additionalProperties": False, **schema}


def _lean(schema: Any) -> Any:
    """A schema without remarks, which would only make the grammar longer."""
    if isinstance(schema, list):
        return [_lean(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    lean: dict[str, Any] = {}
    for word, value in schema.items():
        if word in _MAPS and isinstance(value, Mapping):
            lean[word] = {name: _lean(part) for name, part in value.items()}
        elif word in ("enum", "const"):
            lean[word] = value
        elif word not in _REMARKS:
            lean[word] = _lean(value)
    return lean
