"""What the callers of a running engine and its own thread know together, under one lock."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Literal, Protocol

from moejet.engine_counters import TrafficCounters
from moejet.mailbox import wake
from moejet.request import StreamDelta
from moejet.ticket import (
    Admission,
    EngineClosedError,
    Ticket,
    dead_error,
    stuck_error,
)

Phase = Literal["running", "draining", "closed", "dead"]
Command = (
    tuple[Literal["add", "abort", "end_thinking"], Ticket]
    | tuple[Literal["call"], Callable[[], None]]
    | tuple[Literal["abort_all", "stop"], None]
)


class Guest(Protocol):
    """Somebody with requests of its own on the engine, who starts them by `EngineThread.call`.

    num_runs: how many things it has under way, for which a draining end waits
    """

    @property
    def num_runs(self) -> int: ...

    def deliver(self, deltas: Iterable[StreamDelta]) -> None:
        """What a step gave, to all requests; on the engine's thread."""

    def fail(self, request_ids: Collection[str] | None, error: Exception) -> None:
        """These requests, or all, have ended with an error; on the engine's thread."""

    def give_up(self, error: Exception) -> None:
        """The engine hangs: tells those who wait. On any thread."""


class EngineState:
    """Who is in, who may come in, and how the engine is.

    changed guards everything but the inbox; methods that do not take it say so. step_timeout_s: a step that takes
    longer counts as hung (None: no limit) · step_started_s: None between two steps, on the clock of time.perf_counter
    """

    def __init__(
        self, admission: Admission, counters: TrafficCounters, *, step_timeout_s: float | None
    ):
        self.changed = threading.Condition(threading.Lock())
        # Its put() may interrupt itself, so finalisers may call it wherever they happen to run.
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.admission, self.counters = admission, counters
        self.tickets = admission.tickets
        self.guest: Guest | None = None
        self.phase: Phase = "running"
        self.cause: BaseException | None = None  # of death
        self.step_timeout_s = step_timeout_s
        self.step_started_s: float | None = None
        self.last_step_s = time.perf_counter()
        self.is_stuck = False  # the present step takes too long
        self.has_ended = False  # its thread

    def is_healthy(self) -> bool:
        return self.phase in ("running", "draining") and not self.is_stuck

    def refuse_new(self) -> None:
        """Takes the lock."""
        with self.changed:
            if self.phase == "running":
                self.phase = "draining"

    def is_idle(self) -> bool:
        return not self.tickets and (self.guest is None or self.guest.num_runs == 0)

    def check_accepting(self) -> None:
        if self.phase == "dead":
            raise dead_error(self.cause)
        if self.phase == "draining":
            raise EngineClosedError(
                "the engine is being closed: it finishes what runs and takes no new requests"
            )
        if self.phase == "closed":
            raise EngineClosedError("the engine is closed: create a new AsyncLLM")
        if self.is_stuck:
            raise stuck_error(self.step_timeout_s)

    def end(
        self, ticket: Ticket, error: BaseException | None = None
    ) -> asyncio.Future[None] | None:
        """Ends a request and returns who is to be woken."""
        if ticket.ended.done():
            return None
        self.admission.remove(ticket)
        if error is not None:
            num_samples = ticket.params.n if ticket.params else 1
            self.counters.finished_samples["error"] += num_samples - ticket.num_finished
        ticket.ended.set_result(None)
        self.answer_thinking(ticket, False)
        if not self.tickets:
            self.changed.notify_all()
        return ticket.mailbox.end(error)

    def answer_thinking(self, ticket: Ticket, has_thought: bool) -> None:
        for reply in ticket.thinking_ends:
            # Who asked may have gone.
            if reply.set_running_or_notify_cancel():
                reply.set_result(has_thought)
        ticket.thinking_ends.clear()

    def fail(self, tickets: Iterable[Ticket], make_error: Callable[[], Exception]) -> None:
        """Ends requests with an exception each: one that several consumers raised would mix their tracebacks.

        Takes the lock.
        """
        with self.changed:
            wakes = [self.end(ticket, make_error()) for ticket in tickets]
        wake(wakes)
