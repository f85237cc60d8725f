"""A call's arguments, turned into fragments of one JSON text while they arrive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from moejet.server.tool_calls.formats import FieldMarkers, ToolFormat
from moejet.server.tool_calls.scanner import MarkerScanner

_MAX_KEY = 1024  # characters
Kind = Literal["string", "json", "any"]


class JsonArguments:
    """Arguments that are JSON already: passed on as they are, without what stands around them."""

    def __init__(self, format: ToolFormat):
        self._trailer = format.trailer
        self._text = ""  # all that has been handed out
        self._waiting = ""
        self.stray = ""

    def step(self, scanner: MarkerScanner, ends: tuple[str, ...]) -> tuple[str, bool]:
        """Reads what it can; returns a fragment, and whether one of `ends` comes next."""
        at, marker = scanner.find(ends)
        self._waiting += scanner.take(at)
        if not self._text:
            self._waiting = self._waiting.lstrip()
        safe = len(self._waiting) - self._tail(self._waiting)
        fragment, self._waiting = self._waiting[:safe], self._waiting[safe:]
        self._text += fragment
        return fragment, marker is not None

    def finish(self, rest: str, *, is_complete: bool) -> str:
        """The last fragment; `rest` is text that could have begun a marker."""
        last = self._waiting + rest
        cut = last.rstrip()
        if self._trailer and cut.endswith(self._trailer):
            shorter = cut[: -len(self._trailer)].rstrip()
            # A brace may belong to the arguments themselves if the one around them is missing.
            if _is_json(self._text + shorter) or (is_complete and not _is_json(self._text + cut)):
                return shorter or "{}" * (not self._text)
        if not is_complete:
            return last
        return cut or "{}" * (not self._text)

    def _tail(self, text: str) -> int:
        """Length of the end that may turn out to be the trailer, white space around it included."""
        rest = text.rstrip()
        for _ in self._trailer:
            rest = rest.removesuffix(self._trailer[0])
        return len(text) - len(rest.rstrip())


class FieldArguments:
    """Arguments written one by one. Values that the tool's schema calls texts are passed on while they arrive."""

    def __init__(self, fields: FieldMarkers, schema: Mapping[str, Any]):
        self._fields = fields
        self._schema = schema
        self._state: Literal["between", "key", "string", "value"] = "between"
        self._raw = ""  # text of a field that is not understood yet
        self._kind: Kind = "any"
        self._has_fields = False
        self._gap = ""  # between two fields
        self.stray = ""  # what is no field

    def step(self, scanner: MarkerScanner, ends: tuple[str, ...]) -> tuple[str, bool]:
        fragment = ""
        while True:
            state = self._state
            read = {"between": self._between, "key": self._key}.get(state, self._value)
            piece, is_end = read(scanner, ends)
            fragment += piece
            if is_end or state == self._state:
                return fragment, is_end

    def finish(self, rest: str, *, is_complete: bool) -> str:
        fragment = self._last_fragment(rest, is_complete=is_complete)
        self._close_gap()
        return fragment

    def _last_fragment(self, rest: str, *, is_complete: bool) -> str:
        if self._state == "between":
            self._gap += rest
        elif self._state == "key":
            self._gap += self._raw + rest
        elif self._state == "string":
            return _escaped(rest) + '"}' * is_complete
        else:
            text = self._raw + rest
            return _value(text, self._kind) + "}" if is_complete else text.strip()
        if not is_complete:
            return ""
        return "}" if self._has_fields else "{}"

    def _between(self, scanner: MarkerScanner, ends: tuple[str, ...]) -> tuple[str, bool]:
        at, marker = scanner.find((*self._fields.begin, *ends))
        self._gap += scanner.take(at)
        if marker in self._fields.begin:
            self._raw = scanner.take(len(marker))
            self._state = "key"
        return "", marker is not None and self._state == "between"

    def _key(self, scanner: MarkerScanner, ends: tuple[str, ...]) -> tuple[str, bool]:
        at, marker = scanner.find((*self._fields.value_begin, *self._fields.begin, *ends))
        if at <= _MAX_KEY and marker is None:
            return "", False
        match = self._fields.key.fullmatch(scanner.text[:at].strip())
        if at > _MAX_KEY or marker not in self._fields.value_begin or match is None:
            self._gap += self._raw
            self._state = "between"
            return "", False
        self._close_gap()
        scanner.take(at + len(marker))
        key, string = match["key"].strip(), match.groupdict().get("string")
        self._kind = {"true": "string", "false": "json", None: self._kind_of(key)}[string]
        self._state, self._raw = ("string" if self._kind == "string" else "value"), ""
        start = ", " if self._has_fields else "{"
        self._has_fields = True
        return f"{start}{json.dumps(key, ensure_ascii=False)}: " + '"' * (
            self._kind == "string"
        ), False

    def _value(self, scanner: MarkerScanner, ends: tuple[str, ...]) -> tuple[str, bool]:
        at, marker = scanner.find((*self._fields.value_end, *ends))
        text = scanner.take(at)
        if self._state == "string":
            piece = _escaped(text) + '"' * (marker is not None)
        else:
            self._raw += text
            piece = _value(self._raw, self._kind) if marker is not None else ""
        if marker is not None:
            self._state, self._raw = "between", ""
            if marker in self._fields.value_end:
                scanner.take(len(marker))
        return piece, False

    def _close_gap(self) -> None:
        if self._gap.strip():
            self.stray += self._gap
        self._gap = ""

    def _kind_of(self, key: str) -> Kind:
        properties = self._schema.get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        return kind_of(schema, self._schema)


def kind_of(schema: Any, root: Any) -> Kind:
    """Whether values that fit a schema are texts, other JSON, or perhaps either; `root` holds its $defs."""
    kinds = _json_types(schema, root)
    if kinds == {"string"}:
        return "string"
    return "json" if kinds and "string" not in kinds else "any"


def _json_types(schema: Any, root: Any, depth: int = 8) -> set[str]:
    """Types that a schema allows as far as it says so; empty if it does not."""
    if not isinstance(schema, Mapping) or depth == 0:
        return set()
    if isinstance(reference := schema.get("$ref"), str):
        return _json_types(_look_up(reference, root), root, depth - 1)
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {kind for kind in declared if isinstance(kind, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values:
        return {"string" if isinstance(value, str) else "other" for value in values}
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            found = [_json_types(part, root, depth - 1) for part in schema[word]]
            return set().union(*found) if all(found) else set()
    return set()


def _look_up(reference: str, root: Any) -> Any:
    """The part of a schema that a JSON pointer such as #/$defs/x names, None if there is none."""
    if not reference.startswith("#/"):
        return None
    for name in reference[2:].split("/"):
        name = name.replace("~1", "/").replace("~0", "~")
        root = root.get(name) if isinstance(root, Mapping) else None
    return root


def _value(text: str, kind: Kind) -> str:
    """JSON of a value written as JSON, or as plain text."""
    stripped = text.strip()
    return stripped if kind != "string" and _is_json(stripped) else f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
