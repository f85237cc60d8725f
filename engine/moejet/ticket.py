"""A request as callers of a running engine know it, and the errors that they meet."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from moejet.mailbox import Mailbox
from moejet.request import SamplingParams


class QueueFullError(RuntimeError):
    """More waits than the limits allow. retry_after_s: when there will be room, by what was started lately."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(f"{message}; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineStepError(RuntimeError):
    """The step that computed this request failed or never returned; the request has ended."""


class EngineDeadError(RuntimeError):
    """The engine failed beyond repair: load the model again."""


class EngineClosedError(RuntimeError):
    """The engine is closed, or is finishing what runs and takes no new requests."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One request, from the moment a caller asks for it until its end.

    arrival_s: on the clock of time.perf_counter · is_queued: no step has computed any of it
    is_in_engine: the engine knows it; only the engine's thread looks here
    """

    request_id: str
    priority: int
    prompt: str | None = None
    token_ids: list[int] = field(default_factory=list)
    params: SamplingParams | None = None
    arrival_s: float = field(default_factory=time.perf_counter)
    mailbox: Mailbox = field(default_factory=Mailbox)
    ended: Future[None] = field(default_factory=Future)
    is_queued: bool = True
    is_aborted: bool = False
    is_in_engine: bool = False
