"""What a long run says of itself: rows, sums, and a table."""

from __future__ import annotations

from typing import Any

from serving.ledger import Tally
from serving.process import Metrics, quantiles, total

SOAK_KEYS = (
    *("requests", "answered", "left", "cancelled", "refused", "wrong", "errors", "solved"),
    *("sessions", "leaked_blocks", "preemptions", "growth", "first_errors"),
)
_OUTCOMES = ("complete", "left", "refused", "failed", "rejected", "lost", "stuck")


def prefixes_of(metrics: Metrics) -> dict[str, int]:
    """Since the server's last start: tokens of prompts found in each tier, blocks that had to go."""
    found = {"prompt_tokens": int(total(metrics, "prompt_tokens_total"))}
    for tier in ("ram", "disk"):
        for name in ("tier_hits", "evictions"):
            label = f'tier="{tier}"'
            found[f"{tier}_{name}"] = int(total(metrics, f"prefix_cache_{name}_total", label))
    return found


def line_of(row: dict[str, Any]) -> str:
    counts = " ".join(f"{n} {row[n]}" for n in _OUTCOMES if row.get(n))
    times = []
    for name in ("ttft_ms", "itl_ms", "answer_ms"):
        if (found := row[name]) is not None:
            times.append(f"{name[:-3]} {found['p50']:.0f}/{found['p99']:.0f}/{found['max']:.0f}")
    return f"{row['phase']:<9}{row['seconds']:6.0f} s  {counts}; ms p50/p99/max: {', '.join(times)}"


def table_of(result: dict[str, Any]) -> str:
    lines = [
        f"{result['requests']} requests in {result['seconds']:.0f} s: {result['outcomes']}",
        f"{result['right']:.3f} of {result['posed']} new problems right, {result['tokens']} tokens, "
        f"{result['preemptions']:.0f} preemptions; {result['events']}",
        f"recovery after a kill: {result['recovery_ms']}; {result['scrapes']} scrapes: {result['scrape_ms']}",
        f"prefixes: {result['prefixes']}",
        *(f"memory of {name}: {trend}" for name, trend in result["memory"].items()),
        f"in process: {result['in_process']}",
        *(f"VIOLATED {n} times: {what}" for what, n in result["violations"].items()),
        *(f"  {text}" for text in result["shown"]),
    ]
    return "\n".join(lines)


def summary_of(tally: Tally) -> dict[str, Any]:
    return {
        **dict(sorted(tally.outcomes.items())),
        "kinds": dict(sorted(tally.kinds.items())),
        "right": tally.right,
        "posed": tally.posed,
        "tokens": tally.least["tokens"],
        "ttft_ms": quantiles(tally.first_s),
        "itl_ms": quantiles(tally.gaps_s),
        "answer_ms": quantiles(tally.answer_s),
    }
