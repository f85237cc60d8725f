"""What an evaluation has found: figures of every strategy with intervals, compared with the first one, as JSON and
Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moejet.config import ModelConfig
from moejet.reasoning.answers import AnswerKey
from moejet.reasoning.cost import expert_reads
from moejet.reasoning.eval_runs import Row
from moejet.reasoning.metrics import (
    Interval,
    Solution,
    bootstrap_interval,
    mcnemar,
    outcome_efficiency,
    paired_bootstrap,
    pass_at_k,
    plurality,
    process_efficiency,
    risk_coverage,
    truncation_rate,
    wilson_interval,
)
from moejet.reasoning.result import Usage

MAX_CURVE_POINTS = 101


@dataclass(frozen=True)
class Outcomes:
    """Of one strategy: its rows by problem, [problems][samples], in the same order for all strategies."""

    strategy: str
    rows: Sequence[Sequence[Row]]
    consensus: Sequence[bool]  # whether the plurality of a problem's samples is right

    @property
    def flat(self) -> list[Row]:
        return [row for rows in self.rows for row in rows]

    @property
    def accuracy(self) -> list[float]:
        """Of each problem, over its samples."""
        return [float(np.mean([row.correct for row in rows])) for rows in self.rows]

    @property
    def tokens(self) -> float:
        return float(np.mean([row.usage.generated_tokens for row in self.flat]))


def outcomes_of(
    strategy: str,
    rows: Mapping[tuple[str, str, int], Row],
    ids: Sequence[str],
    k: int,
    key: AnswerKey,
) -> Outcomes:
    """Of the rows of a results file, those of the first k samples of these problems."""
    table = [[rows[strategy, name, sample] for sample in range(k)] for name in ids]
    return Outcomes(strategy, table, [_consensus(samples, key) for samples in table])


def _consensus(rows: Sequence[Row], key: AnswerKey) -> bool:
    """Whether the plurality answer is right; ties go to the likelier texts."""
    groups = key.group([row.answer for row in rows])
    keys = [None if row.answer is None else group for row, group in zip(rows, groups, strict=True)]
    logprobs = [-math.inf if row.logprob is None else row.logprob for row in rows]
    winner = plurality(keys, logprobs)
    return isinstance(winner, int) and rows[winner].correct


def report(
    outcomes: Sequence[Outcomes], settings: Mapping[str, Any], model: ModelConfig
) -> dict[str, Any]:
    """Plain values. Every strategy but the first is compared with the first on the same problems."""
    first = outcomes[0]
    return {
        "settings": dict(settings),
        "problems": len(first.rows),
        "samples": len(first.rows[0]),
        "model": {
            "experts": model.num_experts,
            "experts_per_token": model.num_experts_per_tok,
            "moe_layers": model.num_moe_layers,
        },
        "strategies": [
            _figures(one, model) | ({} if one is first else {"versus": _versus(first, one)})
            for one in outcomes
        ],
    }


def _figures(outcomes: Outcomes, model: ModelConfig) -> dict[str, Any]:
    rows, k = outcomes.flat, len(outcomes.rows[0])
    right = [sum(row.correct for row in samples) for samples in outcomes.rows]
    chances = [pass_at_k(k, count, k) for count in right]
    agreed = sum(outcomes.consensus)
    figures: dict[str, Any] = {
        "strategy": outcomes.strategy,
        "pass@1": _share(outcomes.accuracy, bootstrap_interval(outcomes.accuracy)),
    }
    if k > 1:
        figures[f"pass@{k}"] = _share(chances, bootstrap_interval(chances))
        interval = wilson_interval(agreed, len(right))
        figures[f"cons@{k}"] = _share(outcomes.consensus, interval)
    return figures | {
        "cost": _cost([row.usage for row in rows], model),
        "outcome_efficiency": outcome_efficiency([_trace(row) for row in rows]),
        "process_efficiency": _or_none(
            process_efficiency, [row.solutions for row in rows if row.solutions]
        ),
        "truncation_rate": truncation_rate([row.finish_reason for row in rows]),
        "exhausted_rate": float(np.mean([row.is_exhausted for row in rows])),
        "no_answer_rate": float(np.mean([row.answer is None for row in rows])),
        "risk_coverage": _risk(rows),
    }


def _share(values: Sequence[float], interval: Interval) -> dict[str, float]:
    return {"value": float(np.mean(values)), "low": interval.low, "high": interval.high}


def _or_none(function: Callable[[Any], float], values: Sequence[Any]) -> float | None:
    return function(values) if values else None


def _trace(row: Row) -> Sequence[Solution]:
    """A run without an answer has found none, whatever it has cost."""
    return row.solutions or (Solution(1, None, False),)


def _cost(usages: Sequence[Usage], model: ModelConfig) -> dict[str, Any]:
    """Means over runs; distinct experts over all steps that there were."""
    total = Usage(
        **{f.name: sum(getattr(usage, f.name) for usage in usages) for f in fields(Usage)}
    )
    runs = len(usages)
    reads = expert_reads(total, model)
    return {
        "prompt_tokens": total.prompt_tokens / runs,
        "generated_tokens": total.generated_tokens / runs,
        "thinking_tokens": total.thinking_tokens / runs,
        "answer_tokens": (total.generated_tokens - total.thinking_tokens) / runs,
        "injected_tokens": (total.injected_tokens + total.appended_tokens) / runs,
        "branches": total.branches / runs,
        "steps": total.steps / runs,
        "seconds": total.seconds / runs,
        "model_evaluations": total.model_evaluations / runs,
        "expert_loads": total.expert_loads / runs,
        "expert_bytes": total.expert_bytes / runs,
        "distinct_experts": None if reads is None else reads.measured,
        "distinct_experts_expected": None if reads is None else reads.expected,
    }


def _risk(rows: Sequence[Row]) -> dict[str, Any] | None:
    """By the strategy's own confidence, or, where it has none, by the mean probability of a token."""
    source = "confidence"
    scores = [row.confidence for row in rows]
    if any(score is None for score in scores):
        source = "token probability"
        scores = [0.0 if row.mean_logprob is None else math.exp(row.mean_logprob) for row in rows]
    curve = risk_coverage(np.array(scores, dtype=np.float64), [row.correct for row in rows])
    count = len(curve.coverage)
    picked = np.unique(np.linspace(0, count - 1, min(count, MAX_CURVE_POINTS)).round().astype(int))
    return {
        "by": source,
        "area": curve.area,
        "coverage": curve.coverage[picked].tolist(),
        "risk": curve.risk[picked].tolist(),
    }


def _versus(first: Outcomes, second: Outcomes) -> dict[str, Any]:
    """Bootstrap over problems of the mean accuracy; McNemar on whether a problem's plurality answer is right."""
    paired = paired_bootstrap(first.accuracy, second.accuracy)
    pairs = list(zip(first.consensus, second.consensus, strict=True))
    return {
        "strategy": first.strategy,
        "difference": paired.difference,
        "low": paired.interval.low,
        "high": paired.interval.high,
        "bootstrap_p": paired.p_value,
        "mcnemar_p": mcnemar(first.consensus, second.consensus),
        "gained": sum(b and not a for a, b in pairs),
        "lost": sum(a and not b for a, b in pairs),
        "token_ratio": second.tokens / first.tokens if first.tokens else None,
    }


# --- Markdown ------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """The whole report."""
    settings = found["settings"]
    parts = [f"# {settings.get('model')} on {settings.get('file')}", _introduction(found)]
    parts += [accuracy_table(found)]
    if len(found["strategies"]) > 1:
        parts += [f"Compared with `{found['strategies'][0]['strategy']}`:", versus_table(found)]
    parts += ["Cost of a run, on average:", cost_table(found)]
    parts += ["Settings:", _table(["setting", "value"], [[n, v] for n, v in settings.items()])]
    return "\n\n".join(parts) + "\n"


def _introduction(found: Mapping[str, Any]) -> str:
    model = found["model"]
    text = (
        f"{found['problems']} problems, {found['samples']} runs of each strategy on each. Intervals are 95 %: "
        "bootstrap over problems for pass@k, Wilson's for cons@k. "
    )
    return text + (
        "Distinct experts are those that a layer reads per step, beside the number expected if every token of a step "
        f"chose its {model['experts_per_token']} of {model['experts']} at random."
    )


def accuracy_table(found: Mapping[str, Any]) -> str:
    k = found["samples"]
    names = ["pass@1"] + ([f"pass@{k}", f"cons@{k}"] if k > 1 else [])
    heads = [
        "strategy",
        *names,
        "tokens",
        "outcome efficiency",
        "cut off",
        "no answer",
        "risk area",
    ]
    rows = [
        [
            f"`{one['strategy']}`",
            *(interval_text(one[name]) for name in names),
            f"{one['cost']['generated_tokens']:.0f}",
            f"{one['outcome_efficiency']:.2f}",
            f"{one['truncation_rate']:.1%}",
            f"{one['no_answer_rate']:.1%}",
            f"{one['risk_coverage']['area']:.3f} ({one['risk_coverage']['by']})",
        ]
        for one in found["strategies"]
    ]
    return _table(heads, rows)


def versus_table(found: Mapping[str, Any]) -> str:
    heads = ["strategy", "difference", "bootstrap p", "McNemar p", "gained", "lost", "tokens"]
    rows = []
    for one in found["strategies"][1:]:
        versus = one["versus"]
        ratio = versus["token_ratio"]
        rows.append(
            [
                f"`{one['strategy']}`",
                f"{versus['difference']:+.3f} [{versus['low']:+.3f}, {versus['high']:+.3f}]",
                _p(versus["bootstrap_p"]),
                _p(versus["mcnemar_p"]),
                versus["gained"],
                versus["lost"],
                "" if ratio is None else f"{ratio:.2f}x",
            ]
        )
    return _table(heads, rows)


def cost_table(found: Mapping[str, Any]) -> str:
    heads = ["strategy", "thinking", "answer", "injected", "branches", "steps", "seconds"]
    heads += ["expert loads", "expert MB", "distinct experts", "formula"]
    rows = []
    for one in found["strategies"]:
        cost = one["cost"]
        rows.append(
            [
                f"`{one['strategy']}`",
                *(f"{cost[f'{name}_tokens']:.0f}" for name in ("thinking", "answer", "injected")),
                f"{cost['branches']:.1f}",
                f"{cost['steps']:.0f}",
                f"{cost['seconds']:.2f}",
                f"{cost['expert_loads']:.0f}",
                f"{cost['expert_bytes'] / 1e6:.1f}",
                _number(cost["distinct_experts"]),
                _number(cost["distinct_experts_expected"]),
            ]
        )
    return _table(heads, rows)


def interval_text(share: Mapping[str, float]) -> str:
    return f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned, so that it reads well as plain text."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
