"""What the lines of each benchmark say: which keys tell its cases apart, and the figure that came out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moejet.cli.table import Row

MACHINE = ("cpu", "allowed_cpus", "gpu")


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a line: value and what its repetitions say of its spread (relative, None: not repeated)."""

    value: float
    spread: float | None


@dataclass(frozen=True, slots=True)
class Kind:
    """How lines of one benchmark are compared: `keys` say what was measured, `metric` is what came out.

    Lines that hold several figures are taken apart by `parts` first. is_timed: a faster machine gives another figure.
    """

    keys: tuple[str, ...]
    name: str
    metric: Callable[[Row], Metric | None]
    higher_is_better: bool = True
    is_timed: bool = True
    parts: Callable[[Row], Iterable[Row]] = lambda row: (row,)


def _positive(row: Mapping[str, Any], key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r} must be a positive number")
    return float(value)


def _milliseconds(row: Row) -> Metric | None:
    if row["ms_p50"] is None:
        return None
    low, middle, high = (_positive(row, key) for key in ("ms_p20", "ms_p50", "ms_p80"))
    return Metric(middle, (high - low) / 2 / middle)


def _rate(row: Row) -> Metric:
    rate = _positive(row, "tokens_per_s")
    samples = [_positive({"samples_s": s}, "samples_s") for s in row["samples_s"]]
    if len(samples) < 2:
        return Metric(rate, None)
    return Metric(rate, (max(samples) - min(samples)) / 2 / statistics.median(samples))


def _ceiling(row: Row) -> Metric | None:
    if row["value"] is None:
        return None
    low, value, high = (_positive(row, key) for key in ("low", "value", "high"))
    return Metric(value, (high - low) / 2 / value)


def _with_interval(row: Row) -> Metric:
    low, high = row["interval"]
    return Metric(_positive(row, "accuracy"), (high - low) / 2 / row["accuracy"])


def _streams(row: Row) -> Metric:
    rate, all_rates = _positive(row, "streams_tokens_per_s"), row["streams_all"]
    return Metric(
        rate, (max(all_rates) - min(all_rates)) / 2 / rate if len(all_rates) > 1 else None
    )


def _ceilings_of(row: Row) -> Iterator[Row]:
    """Without the line's read rate, which would explain a difference of that rate away."""
    facts = {key: row.get(key) for key in MACHINE}
    for ceiling in row["ceilings"]:
        yield {**facts, **ceiling, "time": row.get("time")}


def _strategies_of(row: Row) -> Iterator[Row]:
    facts = {key: value for key, value in row.items() if key != "rows"}
    for strategy in row["rows"]:
        yield {**facts, **strategy}


_LAYER = ("shape", "hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok")
KINDS = {
    "moe": Kind(
        (*_LAYER, "format", "isa", "arithmetic", "tokens", "threads"),
        "ms",
        _milliseconds,
        higher_is_better=False,
    ),
    "peers": Kind(
        (*_LAYER, "engine", "variant", "format", "tokens", "threads"),
        "ms",
        _milliseconds,
        higher_is_better=False,
    ),
    "gpu": Kind(("kernel", "case"), "ms", _milliseconds, higher_is_better=False),
    "model": Kind(
        ("model", "test", "format", "dense", "cache", "isa", "arithmetic", "device", "threads"),
        "tokens/s",
        _rate,
    ),
    "ceilings": Kind(("name", "threads"), "rate", _ceiling, parts=_ceilings_of),
    "streams": Kind(("shape", "format", "batch", "tokens", "threads"), "tokens/s", _streams),
    "tiny_formats": Kind(
        ("stored", "experts", "problems"), "accuracy", _with_interval, is_timed=False
    ),
    "reasoning": Kind(
        ("strategy", "model", "problems", "temperature", "min_steps", "max_steps", "seed"),
        "accuracy",
        _with_interval,
        is_timed=False,
        parts=_strategies_of,
    ),
}
