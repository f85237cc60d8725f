"""What /metrics says of strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

if TYPE_CHECKING:
    from moejet.server.strategies import Outcome

_PREFIX = "moejet:"


class StrategyMetrics:
    """Told of every strategy that begins and ends. strategy: its name without numbers, of which there are few."""

    def __init__(self, registry: CollectorRegistry, model_name: str):
        self._label = model_name
        self._running = Gauge(
            _PREFIX + "strategies_running",
            "Strategies that are under way",
            ("model_name",),
            registry=registry,
        ).labels(model_name)
        self._finished = Counter(
            _PREFIX + "strategies_finished",
            "Strategies that have ended: stop, length, cancelled or error",
            ("model_name", "strategy", "reason"),
            registry=registry,
        )
        self._generated = Counter(
            _PREFIX + "strategy_generation_tokens",
            "Tokens that strategies generated in all their branches",
            ("model_name", "strategy"),
            registry=registry,
        )
        self._abandoned = Counter(
            _PREFIX + "strategy_abandoned_tokens",
            "Of those, tokens of branches that were given up before they became candidates, at least",
            ("model_name", "strategy"),
            registry=registry,
        )

    def started(self) -> None:
        self._running.inc()

    def ended(self, strategy: str, reason: str, outcome: Outcome | None) -> None:
        self._running.dec()
        self._finished.labels(self._label, strategy, reason).inc()
        if outcome is not None:
            tokens = outcome.result.usage.generated_tokens
            self._generated.labels(self._label, strategy).inc(tokens)
            self._abandoned.labels(self._label, strategy).inc(outcome.abandoned_tokens)
