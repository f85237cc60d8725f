"""A request as callers of a running engine know it, who is let in, and the errors that they meet."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from moejet.engine_counters import TrafficCounters
from moejet.mailbox import Mailbox
from moejet.request import SamplingParams
from moejet.validation import require_int, require_number

_DEFAULT_RETRY_S = 5.0


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


def describe(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def step_error(cause: Exception) -> EngineStepError:
    error = EngineStepError(f"the step that computed this request failed: {describe(cause)}")
    # What its traceback refers to would live as long as somebody keeps the exception.
    error.__cause__ = cause.with_traceback(None)
    return error


def stuck_error(step_timeout_s: float | None) -> EngineStepError:
    return EngineStepError(
        f"a step of the engine has been running for more than step_timeout_s={step_timeout_s:g} s; "
        "requests are accepted again once it returns"
    )


def dead_error(cause: BaseException | None) -> EngineDeadError:
    assert cause is not None, "an engine dies of something"
    error = EngineDeadError(f"the engine is dead ({describe(cause)}): load the model again")
    error.__cause__ = cause
    return error


@dataclass(slots=True, eq=False)
class Ticket:
    """One request, from the moment a caller asks for it until its end.

    arrival_s: on the clock of time.perf_counter · is_queued: no step has computed any of it
    params: None for a prompt that is to be scored
    thinking_ends: whoever asked for an end of the thinking and waits to hear whether there was any
    """

    request_id: str
    priority: int
    prompt: str | None = None
    token_ids: list[int] = field(default_factory=list)
    params: SamplingParams | None = None
    num_top: int = 0  # alternatives beside each score
    arrival_s: float = field(default_factory=time.perf_counter)
    mailbox: Mailbox = field(default_factory=Mailbox)
    ended: Future[None] = field(default_factory=Future)
    thinking_ends: list[Future[bool]] = field(default_factory=list)
    is_queued: bool = True
    is_aborted: bool = False
    num_finished: int = 0  # of its samples


class Admission:
    """The tickets of a running engine, and how many of them may wait. Not thread-safe: its owner holds a lock.

    spare_slots: requests that the engine could start at once; as many are welcome beyond max_queued_requests
    """

    def __init__(
        self,
        max_queued_requests: int,
        max_queued_tokens: int,
        spare_slots: int,
        counters: TrafficCounters,
    ):
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.spare_slots = spare_slots
        self.tickets: dict[str, Ticket] = {}
        self.queued_requests = 0
        self.queued_tokens = 0
        self._counters = counters
        self._ids = itertools.count()

    def admit(self, request_id: str | None, priority: int) -> Ticket:
        """A ticket for a new request, under an id of its own if none is given."""
        if request_id is None:
            names = (f"request-{number}" for number in self._ids)
            request_id = next(name for name in names if name not in self.tickets)
        elif request_id in self.tickets:
            raise ValueError(f"request_id={request_id!r} is already running; choose another")
        if self.queued_requests >= self.max_queued_requests + self.spare_slots:
            raise self._full(f"{self.queued_requests} requests are waiting")
        ticket = self.tickets[request_id] = Ticket(request_id, priority)
        self.queued_requests += 1
        return ticket

    def count_tokens(self, ticket: Ticket, num_tokens: int) -> None:
        """Adds a prompt to the queue, as long as it likes if no other waits; the ticket is to get that many tokens."""
        assert not ticket.token_ids, f"{ticket.request_id=} has its prompt"
        if self.queued_tokens and self.queued_tokens + num_tokens > self.max_queued_tokens:
            waiting = f"{self.queued_tokens} prompt tokens are waiting"
            raise self._full(f"{waiting}, and this prompt has {num_tokens}")
        self.queued_tokens += num_tokens

    def leave_queue(self, ticket: Ticket) -> None:
        if ticket.is_queued:
            ticket.is_queued = False
            self.queued_requests -= 1
            self.queued_tokens -= len(ticket.token_ids)

    def remove(self, ticket: Ticket) -> None:
        self.leave_queue(ticket)
        del self.tickets[ticket.request_id]

    def _full(self, what: str) -> QueueFullError:
        self._counters.rejected_requests += 1
        per_s = self._counters.starts.per_s()
        # Half of the queue: late enough to find room, early enough that the queue does not run dry.
        wait_s = max(1, self.queued_requests) / 2 / per_s if per_s > 0 else _DEFAULT_RETRY_S
        limits = f"{self.max_queued_requests} requests, {self.max_queued_tokens} tokens"
        return QueueFullError(f"the queue is full ({limits}): {what}", min(max(wait_s, 1.0), 600.0))


def check_limits(
    *,
    max_queued_requests: int = 1,
    max_queued_tokens: int = 1,
    step_timeout_s: float | None = None,
    memory_gbps: float | None = None,
) -> None:
    """Raises ValueError for limits of `moejet.AsyncLLM` that cannot be."""
    require_int("max_queued_requests", max_queued_requests, 1)
    require_int("max_queued_tokens", max_queued_tokens, 1)
    longest = threading.TIMEOUT_MAX
    require_number("step_timeout_s", step_timeout_s, above=0, high=longest, or_none=True)
    require_number("memory_gbps", memory_gbps, 0, below=1e9, hint="GB/s", or_none=True)
