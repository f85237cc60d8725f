"""Checks of what a caller gives, with one form of message: `field=value must be ...`, on one line.

Everything here raises ValueError. `checked` compares the fields of a dataclass with their annotations; ranges are the
business of its __post_init__, which runs afterwards.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

_MAX_CHARS = 80
T = TypeVar("T")
Test = Callable[[Any], bool]
Check = Callable[[str, Any], None]  # of a field's name and value


def short(value: object) -> str:
    """A value as Python writes it, cut to one line's length."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    except ValueError:  # an integer of more digits than Python writes
        return f"an {type(value).__name__} too long to show"
    text = " ".join(text.split("\n"))
    return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 3]}..."


def near_miss(name: object, known: Iterable[str]) -> str:
    """ "; did you mean 'X'?" for the known name nearest to `name`, or nothing."""
    near = difflib.get_close_matches(str(name)[:80], list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def require_int(
    name: str,
    value: object,
    low: int | None = None,
    high: int | None = None,
    hint: str = "",
    *,
    or_none: bool = False,
) -> None:
    """An integer from low to high."""
    if value is None and or_none:
        return
    is_low_enough = is_int(value) and (high is None or typing.cast(int, value) <= high)
    if is_low_enough and (low is None or typing.cast(int, value) >= low):
        return
    bounds = "" if low is None else f" of at least {low}"
    if low is not None and high is not None:
        bounds = f" between {low} and {high}"
    none = " or None" if or_none else ""
    raise ValueError(f"{name}={short(value)} must be an integer{bounds}{none}{_in_brackets(hint)}")


def require_number(
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    hint: str = "",
    *,
    above: float | None = None,
    below: float | None = None,
    or_none: bool = False,
) -> None:
    """A finite number from low to high, both included, or between above and below, both excluded."""
    if value is None and or_none:
        return
    number = typing.cast(float, value)
    fits = is_number(value) and (low is None or number >= low) and (high is None or number <= high)
    if fits and (above is None or number > above) and (below is None or number < below):
        return
    bounds = [
        f"{word} {limit:g}"
        for word, limit in (
            ("of at least", low),
            ("above", above),
            ("at most", high),
            ("below", below),
        )
        if limit is not None
    ]
    text = f" {' and '.join(bounds)}" if bounds else ""
    if low is not None and high is not None:
        text = f" between {low:g} and {high:g}"
    none = " or None" if or_none else ""
    raise ValueError(f"{name}={short(value)} must be a number{text}{none}{_in_brackets(hint)}")


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={short(value)} must be True or False")


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name}={short(value)} must be one of {', '.join(choices)}{near_miss(value, choices)}"
        )


def require_text(name: str, value: object, *, or_none: bool = False) -> None:
    """A string that is not empty."""
    if not (value is None and or_none) and (not isinstance(value, str) or not value):
        none = " or None" if or_none else ""
        raise ValueError(f"{name}={short(value)} must be a non-empty string{none}")


def require_type(name: str, value: object, kind: type, remedy: str = "") -> None:
    """An object of a class."""
    if not isinstance(value, kind):
        hint = f": {remedy}" if remedy else ""
        raise ValueError(
            f"{name}={short(value)} must be {_PLAIN[kind][1] if kind in _PLAIN else _article(kind.__name__)}{hint}"
        )


def require_path(name: str, value: object) -> Path:
    """Where a file is, or will be."""
    try:
        is_path = isinstance(value, str | Path) and bool(os.fsencode(value))
    except UnicodeError:
        is_path = False
    if not is_path or "\0" in str(value):
        raise ValueError(f"{name}={short(value)} must be a path")
    value = typing.cast("str | Path", value)
    return Path(value)


def require_ids(name: str, value: object) -> list[int]:
    """Token ids, as a list of integers; whether a model has them is another question."""
    # An array of numpy's, or a tensor, holds what counts as integers.
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        raise ValueError(f"{name}={short(value)} must be a list of token ids")
    ids = list(typing.cast(Iterable[Any], value))
    for i, token_id in enumerate(ids):
        if not is_int(token_id):
            if not hasattr(token_id, "__index__") or isinstance(token_id, bool):
                raise ValueError(f"{name} holds {short(token_id)}: token ids must be integers")
            ids[i] = token_id.__index__()
    return ids


def checked(cls: type[T]) -> type[T]:
    """Class decorator, below @dataclass: each field has to be what its annotation says, or ValueError is raised."""
    then: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)
    checks: dict[type, dict[str, Check]] = {}  # of the class and of those that inherit from it

    def __post_init__(self: Any) -> None:
        kind = type(self)
        if kind not in checks:
            checks[kind] = {name: _check_of(hint) for name, hint in _hints_of(kind).items()}
        for name, check in checks[kind].items():
            check(name, getattr(self, name))
        if then is not None:
            then(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


def _in_brackets(hint: str) -> str:
    return f" ({hint})" if hint else ""


def _hints_of(cls: Any) -> dict[str, Any]:
    """A dataclass's fields and what their annotations mean."""
    found = {}
    for kind in reversed(cls.__mro__):
        names = _Names(vars(sys.modules[kind.__module__]))
        for name, annotation in vars(kind).get("__annotations__", {}).items():
            found[name] = eval(annotation, {}, names) if isinstance(annotation, str) else annotation
    return {field.name: found[field.name] for field in fields(cls) if field.init}


class _Names(dict[str, Any]):
    """A module's names, and for those that it imports for type checkers only the package's exports."""

    def __missing__(self, name: str) -> Any:
        import builtins

        import moejet

        if hasattr(builtins, name):
            return getattr(builtins, name)
        return getattr(moejet, name)


def _check_of(hint: Any) -> Check:
    """Raises ValueError where a value does not fit an annotation."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return lambda name, value: require_choice(name, value, choices)
    test, wanted = _test_of(hint)

    def check(name: str, value: object) -> None:
        if not test(value):
            raise ValueError(f"{name}={short(value)} must be {wanted}")

    return check


def _test_of(hint: Any) -> tuple[Test, str]:
    """Whether a value fits an annotation, and how to call what fits."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is Literal:
        return (lambda value: isinstance(value, str) and value in parts), " or ".join(
            map(repr, parts)
        )
    if origin in (Union, types.UnionType):
        found = [_test_of(part) for part in sorted(parts, key=lambda part: part is type(None))]
        return (lambda value: any(test(value) for test, _ in found)), " or ".join(
            wanted for _, wanted in found
        )
    if origin in (tuple, Sequence):
        return _test_of_items(parts)
    if origin is Mapping or hint is Mapping:
        return (lambda value: isinstance(value, Mapping)), "a mapping"
    if origin is Callable or hint is Callable:
        return callable, "a function"
    if isinstance(hint, type):
        where = f"{hint.__module__}.{hint.__name__}"
        wanted = f"{_article(hint.__name__)} (see {where})"
        # A protocol's class has all of its methods, too.
        return (lambda value: isinstance(value, hint) and not isinstance(value, type)), wanted
    raise AssertionError(f"{hint=}")


def _test_of_items(parts: tuple[Any, ...]) -> tuple[Test, str]:
    test, wanted = _test_of(parts[0])
    noun = wanted.split(" ", 1)[-1]
    return (
        lambda value: isinstance(value, tuple | list) and all(map(test, value)),
        f"a tuple of which each item is {'a ' + noun if wanted.startswith('a ') else wanted}",
    )


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' and name != 'LLM' else 'a'} {name}"


_PLAIN: dict[Any, tuple[Test, str]] = {
    int: (is_int, "an integer"),
    float: (is_number, "a finite number"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    str: (lambda value: isinstance(value, str), "a string"),
    Path: (lambda value: isinstance(value, Path), "a path"),
    type(None): (lambda value: value is None, "None"),
    Any: (lambda value: True, "anything"),
}
