"""Specifications of strategies as texts and as objects, before anybody knows what they mean; loads no torch.

    vote:16    best:16:logprob    beam:16x4,max_steps=10    critique:2,inner=(vote:4)

NAME:N, NAME:NxWIDTH, then :SCORER, then options; a strategy stands in parentheses, a text with commas in "quotes".
As an object: {"name": "critique", "n": 2, "inner": {"name": "vote", "n": 4}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moejet.validation import short

MAX_DEPTH = 8
_HEAD = re.compile(r"\s*([a-z_]+)(?::(\d+)(?:x(\d+))?)?(?::([a-z_]\w*))?\s*")
_KEY = re.compile(r"\s*([a-z_]+)\s*=\s*")
_BARE = re.compile(r'[^,()"\s](?:[^,()"]*[^,()"\s])?')
_COMMA = re.compile(r"\s*,")
_CLOSE = re.compile(r"\s*\)\s*")


@dataclass(frozen=True, slots=True)
class Spec:
    """A strategy's name and its options: numbers, texts, truth values, and other strategies."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Any) -> Spec:
        """From a text or an object. Raises ValueError, naming what is wrong with it."""
        if isinstance(given, Mapping):
            return _from_object(given, "strategy", MAX_DEPTH)
        if isinstance(given, str):
            return _Reader(given).whole()
        raise _not_understood(given)

    @property
    def text(self) -> str:
        """In one line, which `read` reads as the same."""
        numbers = [self.options.get("n"), self.options.get("width")]
        scorer = self.options.get("scorer")
        parts, in_head = [self.name], set()
        if isinstance(numbers[0], int):
            in_head = {"n", "width"} if isinstance(numbers[1], int) else {"n"}
            parts.append("x".join(str(number) for number in numbers[: len(in_head)]))
        if isinstance(scorer, str) and re.fullmatch(r"[a-z_]\w*", scorer):
            in_head.add("scorer")
            parts.append(scorer)
        rest = [(key, value) for key, value in self.options.items() if key not in in_head]
        return ",".join([":".join(parts), *(f"{key}={_text_of(value)}" for key, value in rest)])

    @property
    def names(self) -> Iterator[str]:
        """Of this strategy and of all that are in it."""
        yield self.name
        for value in self.options.values():
            if isinstance(value, Spec):
                yield from value.names


class _Reader:
    def __init__(self, text: str):
        self._text, self._at = text, 0

    def whole(self) -> Spec:
        spec = self._spec(MAX_DEPTH)
        if self._text[self._at :].strip():
            self._fail()
        return spec

    def _spec(self, depth: int) -> Spec:
        name, n, width, scorer = self._take(_HEAD).groups()
        if not depth:
            raise ValueError(f"strategy {name!r} is too deep: at most {MAX_DEPTH} in one another")
        options: dict[str, Any] = {}
        for key, value in (("n", n), ("width", width)):
            if value is not None:
                options[key] = int(value)
        if scorer is not None:
            options["scorer"] = scorer
        while comma := _COMMA.match(self._text, self._at):
            self._at = comma.end()
            key = self._take(_KEY)[1]
            if key in options:
                raise ValueError(f"strategy.{key} is given twice in {self._text!r}")
            options[key] = self._value(depth)
        return Spec(name, options)

    def _value(self, depth: int) -> Any:
        if self._text.startswith("(", self._at):
            self._at += 1
            spec = self._spec(depth - 1)
            self._take(_CLOSE)
            return spec
        if self._text.startswith('"', self._at):
            try:
                value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                self._fail()
            return value
        word = self._take(_BARE)[0]
        for read in (int, float):
            try:
                return read(word)
            except ValueError:
                continue
        return {"true": True, "false": False}.get(word, word)

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            self._fail()
        self._at = match.end()
        return match

    def _fail(self) -> NoReturn:
        raise _not_understood(self._text, self._at)


def _from_object(given: Mapping[str, Any], place: str, depth: int) -> Spec:
    name = given.get("name")
    if not isinstance(name, str):
        raise ValueError(f"{place}.name={short(name)} must be the name of a strategy")
    if not depth:
        raise ValueError(f"strategy {name!r} is too deep: at most {MAX_DEPTH} in one another")
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key == "name" or value is None:
            continue
        if not isinstance(key, str) or not re.fullmatch(r"[a-z_]+", key):
            raise ValueError(f"{place} has an option {key!r}: options are words of small letters")
        if isinstance(value, Mapping):
            value = _from_object(value, f"{place}.{key}", depth - 1)
        if not isinstance(value, bool | int | float | str | Spec):
            raise ValueError(f"{place}.{key} must be a number, a text or a strategy, not {value!r}")
        options[key] = value
    return Spec(name, options)


def _text_of(value: Any) -> str:
    if isinstance(value, Spec):
        return f"({value.text})"
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    is_plain = _BARE.fullmatch(value) and _Reader(value)._value(1) == value
    return value if is_plain else json.dumps(value)


def _not_understood(given: Any, at: int = 0) -> ValueError:
    where = f" from {given[at : at + 40]!r} on" if at else ""
    return ValueError(
        f"strategy={given!r} is not understood{where}: write NAME, NAME:NUMBER or NAME:NUMBER:SCORER, and options "
        "behind commas, for example vote:16, best:16:logprob or beam:16x4,max_steps=10"
    )
