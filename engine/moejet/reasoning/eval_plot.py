"""Accuracy against tokens, as text; `moejet.cli.plot` draws the same points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Point:
    """A strategy: tokens of a run, and its accuracy between two bounds."""

    name: str
    tokens: float
    accuracy: float
    low: float
    high: float


def points_of(found: Mapping[str, Any]) -> list[Point]:
    """Of a report (`eval_report.report`)."""
    return [
        Point(
            one["strategy"],
            one["cost"]["generated_tokens"],
            one["pass@1"]["value"],
            one["pass@1"]["low"],
            one["pass@1"]["high"],
        )
        for one in found["strategies"]
    ]


def text_plot(points: Sequence[Point], *, width: int = 60, height: int = 13) -> str:
    """Letters at each strategy's place, bars for the intervals; tokens grow by factors from left to right."""
    low, high = min(p.low for p in points), max(p.high for p in points)
    low, high = (low - 0.05, high + 0.05) if high - low < 1e-9 else (low, high)
    logs = [math.log(max(1.0, p.tokens)) for p in points]
    start, span = min(logs), (max(logs) - min(logs)) or 1.0
    grid = [[" "] * width for _ in range(height)]

    def row(value: float) -> int:
        return height - 1 - round((value - low) / (high - low) * (height - 1))

    columns = [round((x - start) / span * (width - 1)) for x in logs]
    for point, column in zip(points, columns, strict=True):
        for line in range(row(point.high), row(point.low) + 1):
            grid[line][column] = "|"
    for index, (point, column) in enumerate(zip(points, columns, strict=True)):
        cell = grid[row(point.accuracy)]
        cell[column] = "*" if cell[column] not in " |" else MARKS[index % len(MARKS)]
    lines = []
    for number, cells in enumerate(grid):
        value = high - (high - low) * number / (height - 1)
        label = f"{value:6.3f}" if number % 4 == 0 else " " * 6
        lines.append(f"{label} ┤{''.join(cells).rstrip()}")
    least, most = min(p.tokens for p in points), max(p.tokens for p in points)
    lines.append(f"{'':6} └{'─' * width}")
    ends = f"{least:.0f}" if least == most else f"{least:.0f}{f'{most:.0f}':>{width - 8}}"
    lines.append(f"{'':8}{ends} tokens")
    for index, point in enumerate(points):
        mark = MARKS[index % len(MARKS)]
        lines.append(f"{'':8}{mark} {point.name}: {point.accuracy:.3f} at {point.tokens:.0f}")
    return "\n".join(lines)
