"""Wrong input for everything public, made from annotations, and what a message about it must say.

A message names the field, shows the value (or, of what is too long or has no text, its type or shape) and says what to
do: what is allowed, or where it is written.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class BadValue:
    """must_fail: otherwise it may be accepted as well, but nothing else may happen."""

    value: Any
    must_fail: bool = True

    def __str__(self) -> str:
        return f"{type(self.value).__name__}:{repr(self.value)[:24]}"


class Stranger:
    """An object of no type that anybody expects."""

    def __repr__(self) -> str:
        return "<a stranger>"


HUGE = 10**30
STRANGER = Stranger()
LONG = "x" * 20_000
# Annotation -> values of another type, and such of its own that hardly anybody means.
_WRONG: dict[str, tuple[Any, ...]] = {
    "int": ("3", 1.5, True, math.nan, [], {}, b"3", STRANGER),
    "float": ("0.5", True, math.nan, [], {}, 1j, STRANGER),
    "bool": (1, 0.0, "yes", [], STRANGER),
    "str": (5, 1.5, b"x", [], {}, STRANGER),
    "Path": (5, 1.5, [], {}, STRANGER),
    "Literal": ("nonsense", "", 5, [], {}, STRANGER),
    "Sequence": (5, 1.5, STRANGER, [STRANGER], ({},)),
    "Mapping": (5, "text", [1], STRANGER, {STRANGER: STRANGER}),
    "Callable": (5, "text", [], STRANGER),
    "class": (5, "nonsense", [], STRANGER),
}
_EXTREME: dict[str, tuple[Any, ...]] = {
    "int": (-1, 0, -HUGE, HUGE),
    "float": (-1.0, 0.0, math.inf, -math.inf, 1e300, -1e300),
    "bool": (),
    "str": ("", LONG, "\0", "\ud800", "no such thing"),
    "Path": ("", "\0", LONG, "/no/such/place"),
    "Literal": (),
    "Sequence": ((), [""], ["\ud800"], [-1], [HUGE], [math.nan], [[]], [None], "text", b"bytes"),
    "Mapping": ({}, {"": None}, {-1: math.nan}, {"x": {}}),
    "Callable": (),
    "class": (),
}
_SEQUENCES = ("Sequence", "tuple", "list", "Iterable", "Collection")
_PLAIN = ("int", "float", "bool", "str", "Path", "Literal", "Callable")


def kinds_of(annotation: str) -> set[str]:
    """Keys of the tables above for an annotation as it is written, and "None" and "Any"."""
    outer = annotation
    while "[" in outer:
        outer = re.sub(r"\[[^\[\]]*\]", "", outer)
    kinds = set()
    for part in (p.strip(" '\"") for p in outer.split("|")):
        if part in ("None", "Any", "object"):
            kinds.add("None" if part == "None" else "Any")
        elif part in _PLAIN:
            kinds.add(part)
        elif part in _SEQUENCES:
            kinds.add("Sequence")
        elif part in ("Mapping", "dict"):
            kinds.add("Mapping")
        else:
            kinds.add("class")
    return kinds


def _fits(value: Any, kind: str) -> bool:
    """Whether a value of this type could be meant, so that it may be accepted."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": is_number and not math.isnan(value),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "Path": isinstance(value, str),
        "Literal": False,
        "Sequence": isinstance(value, list | tuple | str | bytes) and not any(
            item is STRANGER or item == {} for item in value
        ),
        "Mapping": isinstance(value, dict) and STRANGER not in value.values(),
        "Callable": callable(value),
        "class": False,
        "None": value is None,
        "Any": True,
    }[kind]  # fmt: skip


def bad_values(annotation: str) -> Iterator[BadValue]:
    """Each value once."""
    kinds = kinds_of(annotation)
    if "Any" in kinds:
        return
    seen: set[str] = set()
    named = [kind for kind in kinds if kind != "None"]
    for table in (_WRONG, _EXTREME):
        for kind in named:
            for value in (*table[kind], None):
                key = f"{type(value)}{value!r}"
                if key in seen:
                    continue
                seen.add(key)
                may_fit = any(_fits(value, kind) for kind in kinds)
                yield BadValue(value, must_fail=not may_fit)


REMEDY = re.compile(
    r"\b(must|needs?|use|using|give|pass|choose|known|one of|did you mean|supported|allowed|at least|at most|between|"
    r"expected|leave|shorten|raise|set|unset|send|name|write|create|make|install|pip|try|see|"
    r"--help|free|run|fetch|check|cannot have|takes|take|put|call|close|add|drop|remove|lower|or more|"
    r"lets|pull|start|instead|only|for example|such as)\b",
    re.IGNORECASE,
)
_Fault = Literal["field", "value", "remedy", "length", "lines", "type"]


def shows(text: str, value: Any) -> bool:
    """Whether a message shows a value: its text or the start of it, else its type's name or its shape."""
    if value is None:
        return bool(re.search(r"None|null|missing|NoneType|empty|needs", text))
    if value in ("", [], (), {}) or (hasattr(value, "__len__") and len(value) == 0):
        return bool(
            re.search(r"''|\[\]|\(\)|\{\}|empty|missing|list|dict|tuple|array|object", text)
        )
    shape = getattr(value, "shape", None)
    if shape is not None:
        return str(list(shape)) in text or str(tuple(shape)) in text or str(value.dtype) in text
    candidates = {str(value)[:12], repr(value)[:12], type(value).__name__}
    if isinstance(value, list | tuple | dict):
        items = value.values() if isinstance(value, dict) else value
        candidates |= {repr(item)[:12] for item in items} | {str(len(value))}
        candidates |= {type(item).__name__ for item in items}
        if isinstance(value, dict):
            candidates |= {repr(key)[:12] for key in value}
    if isinstance(value, int | float) and not isinstance(value, bool):
        candidates |= {f"{value:g}" if abs(value) < 1e308 else str(value)}
    if isinstance(value, str):
        if len(value) > 200:
            candidates |= {str(len(value))}
        with suppress(ValueError, OverflowError):  # as a number, if it is one
            candidates |= {str(float(value)), f"{float(value):g}"}
            candidates |= {str(int(float(value)))}
    return any(candidate and candidate in text for candidate in candidates)


def faults_of(text: str, names: str | tuple[str, ...], value: Any) -> list[_Fault]:
    """What a message lacks. names: any of which counts as the field; value: what was given."""
    faults: list[_Fault] = []
    names = (names,) if isinstance(names, str) else names
    if not any(name.lower() in text.lower() for name in names):
        faults.append("field")
    if not shows(text, value):
        faults.append("value")
    # What the value itself says is no remedy.
    if not REMEDY.search(text.replace(str(value), "") if str(value) else text):
        faults.append("remedy")
    if len(text) > 900:
        faults.append("length")
    return faults


def sampled(cases: list[Any], most: int) -> list[Any]:
    """At most so many of the cases, evenly from all of them and always the same; all, with MOEJET_AUDIT=full."""
    if len(cases) <= most or os.environ.get("MOEJET_AUDIT") == "full":
        return cases
    return [cases[i * len(cases) // most] for i in range(most)]
