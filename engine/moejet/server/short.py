"""Values of requests in error messages."""

from __future__ import annotations

_MAX_CHARS = 80


def short(value: object) -> str:
    """A value as Python writes it, cut to one line's length."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 3]}..."
