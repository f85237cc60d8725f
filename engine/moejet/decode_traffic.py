"""How much of the memory's speed an engine uses while it decodes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from moejet.engine_counters import Rate

if TYPE_CHECKING:
    from moejet.engine import Engine
    from moejet.runner import Runner

logger = logging.getLogger(__name__)

# Smaller models live in the processor's caches to a large part, and their share would mean nothing.
MIN_WEIGHT_BYTES = 1 << 30


class DecodeTraffic:
    """Weights that steps read which compute no prompt, and the seconds in which they did.

    dense_bytes: weights beside routed experts that every step reads through this machine's memory
    """

    def __init__(self, runner: Runner, dense_bytes: int):
        self.steps = 0
        self.seconds = 0.0
        self.num_bytes = 0
        self._runner = runner
        self._dense_bytes = dense_bytes
        self._begin = 0.0, 0

    def begin(self) -> None:
        self._begin = self._now()

    def end(self, is_decode: bool) -> None:
        """Counts what has been done since `begin`."""
        if not is_decode:
            return
        seconds, num_bytes = self._now()
        self.steps += 1
        self.seconds += seconds - self._begin[0]
        self.num_bytes += num_bytes - self._begin[1] + self._dense_bytes

    def _now(self) -> tuple[float, int]:
        return self._runner.native_seconds, self._runner.expert_loads()[1]


class BandwidthGauge:
    """The share of the memory's read rate that decoding has reached lately; pauses do not count.

    ceiling: bytes/s, None if it is not known
    """

    def __init__(self, ceiling: float | None):
        self.ceiling = ceiling
        self._bytes, self._seconds = Rate(), Rate()
        self._seen = 0, 0.0
        self._fraction: float | None = None

    @property
    def fraction(self) -> float | None:
        """As of the last decoding step; None before the first and without a ceiling."""
        return self._fraction

    def add(self, traffic: DecodeTraffic, now: float) -> None:
        """Takes the steps since the last call into account."""
        num_bytes, seconds = traffic.num_bytes - self._seen[0], traffic.seconds - self._seen[1]
        if self.ceiling is None or seconds <= 0:
            return
        self._seen = traffic.num_bytes, traffic.seconds
        self._bytes.add(num_bytes, now)
        self._seconds.add(seconds, now)
        self._fraction = self._bytes.per_s(now) / self._seconds.per_s(now) / self.ceiling


def read_ceiling(engine: Engine, given_gbps: float | None) -> float | None:
    """Bytes/s: those given (GB/s, 0: not wanted), or measured with the engine's threads while it rests.

    A model of less than a GiB is not worth the second that takes.
    """
    from moejet.ceilings import Meter
    from moejet.model_cost import ModelCost

    if given_gbps is not None:
        return given_gbps * 1e9 or None
    if ModelCost.of(engine.model_config, engine.config).weight_bytes < MIN_WEIGHT_BYTES:
        return None
    value = Meter(engine.runner.pool, isa=engine.runner.isa).read().value
    if value is None:
        return None
    logger.info("memory can be read with %.1f GB/s", value)
    return value * 1e9
