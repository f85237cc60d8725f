"""Markdown tables that grow while their rows are measured."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Row = dict[str, Any]
# Heading, width, and the text of a row.
Column = tuple[str, int, Callable[[Row], str]]


def write_table(columns: list[Column], rows: Iterable[Row]) -> Row | None:
    """Print each row as it comes; returns the last one, None if there was none."""
    row = None
    for number, row in enumerate(rows):
        if number == 0:
            print(_line([name.ljust(width) for name, width, _ in columns]))
            print(_line(["-" * width for _, width, _ in columns]))
        print(_line([text(row).ljust(width) for _, width, text in columns]), flush=True)
    return row


def keep(rows: Iterable[Row], kept: list[Row]) -> Iterator[Row]:
    """The same rows, which `kept` has afterwards."""
    for row in rows:
        kept.append(row)
        yield row


def percent(fraction: float | None) -> str:
    """Such as 97.3%; nothing for what could not be measured."""
    return "" if fraction is None or not math.isfinite(fraction) else f"{fraction:.1%}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
