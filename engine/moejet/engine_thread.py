"""The one thread that drives an engine, and everything that other threads may ask of it.

Callers, on any thread, put commands into an inbox; the engine's thread takes them between two steps, runs a step, and
puts what it yields into the mailbox of each request. With nothing to do it sleeps in the inbox. A request counts as
queued from the moment a caller asked for it until its first step.

The engine ends requests that it cannot compute by itself. A step that raises all the same ends those that were running;
if a small forward pass works afterwards the others go on, otherwise the engine is dead and says so to everyone. A
second thread watches how long a step takes.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Protocol

from moejet.batch import Batch
from moejet.decode_traffic import BandwidthGauge
from moejet.engine import Engine
from moejet.engine_counters import TrafficCounters
from moejet.mailbox import Wakes, wake
from moejet.request import Request, SamplingParams, StreamDelta
from moejet.ticket import (
    Admission,
    EngineClosedError,
    Ticket,
    dead_error,
    describe,
    step_error,
    stuck_error,
)

logger = logging.getLogger(__name__)

_STALL_WAIT_S = 0.002  # before asking again, when requests wait and none could be scheduled
_CLOSE_WAIT_S = 60.0  # for the step that runs while everything is being aborted
_EXIT_WAIT_S = 10.0  # the same, at the interpreter's exit

State = Literal["running", "draining", "closed", "dead"]
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


class EngineThread:
    """Owns `engine` from here on, closes it at the end, and is safe to call from any thread.

    max_queued_requests, max_queued_tokens: of requests that no step has computed yet, beyond those that the engine
    could start at once · step_timeout_s: a step that takes longer counts as hung (None: no limit)
    read_ceiling: bytes/s of this machine's memory, where it is known
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued_requests: int,
        max_queued_tokens: int,
        step_timeout_s: float | None,
        read_ceiling: float | None = None,
    ):
        self.engine = engine
        self._bandwidth = BandwidthGauge(read_ceiling)
        self.step_timeout_s = step_timeout_s
        self.counters = TrafficCounters()
        # Its put() may interrupt itself, so finalisers may call it wherever they happen to run.
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.Lock())  # guards everything below
        self._admission = Admission(
            max_queued_requests, max_queued_tokens, engine.config.max_num_requests, self.counters
        )
        self._tickets = self._admission.tickets
        self._state: State = "running"
        self._cause: BaseException | None = None
        self._is_stuck = False
        self._has_ended = False
        self._step_started_s: float | None = None
        self._last_step_s = time.perf_counter()
        self._batch_requests: list[Request] = []
        # By id, what the engine knows; only its thread looks here. An id may be used again before its first request
        # has left the engine: then this is the old one, and the admission's the new one.
        self._in_engine: dict[str, Ticket] = {}
        self._seen_tokens = 0, 0  # of prompts and of answers
        self._watch_ended = threading.Event()
        self.guest: Guest | None = None
        engine.on_scheduled = self._on_scheduled
        # Daemons, so that an engine that nobody closed cannot hold up the interpreter's exit.
        threading.Thread(target=self._run, name="moejet-engine", daemon=True).start()
        if step_timeout_s is not None:
            threading.Thread(target=self._watch, name="moejet-watchdog", daemon=True).start()
        _LIVE.add(self)

    # Called by any thread.

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child, where the engine's thread does not exist."""
        if not self.is_own_process():
            raise RuntimeError(
                "this AsyncLLM belongs to the parent process, and its engine thread does not exist "
                "in a forked child: load the model after the fork, or start the process with 'spawn'"
            )

    def is_own_process(self) -> bool:
        return os.getpid() == self._pid

    def is_healthy(self) -> bool:
        return self._state in ("running", "draining") and not self._is_stuck

    def reserve(self, request_id: str | None, priority: int) -> Ticket:
        """A place in the queue, for a prompt that is still to be tokenised; `enqueue` or `cancel` it."""
        self.check_process()
        with self._changed:
            self._check_accepting()
            return self._admission.admit(request_id, priority)

    def enqueue(
        self,
        ticket: Ticket,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams | None,
        num_top: int = 0,
    ) -> None:
        """Hands a reserved request to the engine, to be scored with num_top alternatives if there are no params.

        The prompt must have passed `RequestRules.check_prompt` or `check_scoring`.
        """
        with self._changed:
            if ticket.ended.done():
                raise ticket.mailbox.error() or EngineClosedError("the engine was closed")
            self._admission.count_tokens(ticket, len(token_ids))
            ticket.prompt, ticket.token_ids, ticket.params = prompt, token_ids, params
            ticket.num_top = num_top
            self.counters.accepted_requests += 1
            self.inbox.put(("add", ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Gives back the place of a request that was not enqueued."""
        with self._changed:
            wakes = [self._end(ticket)]
        wake(wakes)

    def check_accepting(self) -> None:
        """Raises EngineClosedError or EngineDeadError where nothing new may be begun."""
        with self._changed:
            self._check_accepting()

    def call(self, function: Callable[[], None]) -> None:
        """Runs a function on the engine's thread, between two steps; it must not raise. Takes no lock."""
        if self.is_own_process():
            self.inbox.put(("call", function))

    def notify(self) -> None:
        """The guest has one thing less under way."""
        with self._changed:
            self._changed.notify_all()

    def find(self, request_id: str) -> Ticket | None:
        return self._tickets.get(request_id)

    def abort(self, ticket: Ticket) -> None:
        """Ends a request before the next step. Takes no lock, so finalisers may call it."""
        ticket.is_aborted = True
        if self.is_own_process():
            self.inbox.put(("abort", ticket))

    def end_thinking(self, ticket: Ticket) -> Future[bool]:
        """Makes a request answer now; the result comes between two steps: whether it thought."""
        reply: Future[bool] = Future()
        with self._changed:
            if ticket.ended.done():
                reply.set_result(False)
            else:
                ticket.thinking_ends.append(reply)
                self.inbox.put(("end_thinking", ticket))
        return reply

    def close(self, *, drain: bool, timeout_s: float | None, wait_s: float = _CLOSE_WAIT_S) -> None:
        """Blocks until the engine's thread has ended, which closes the engine; see AsyncLLM.close."""
        if not self.is_own_process():
            return  # in a forked child there is nothing to end
        self.refuse_new()
        with self._changed:
            if drain:
                self._changed.wait_for(lambda: self._is_idle() or self._has_ended, timeout_s)
            if self._state != "dead":
                self._state = "closed"
        self.inbox.put(("abort_all", None))
        self.inbox.put(("stop", None))
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or self._is_stuck, wait_s)
            if not self._has_ended:
                logger.warning("closing while a step still runs: the engine ends when it returns")

    def refuse_new(self) -> None:
        with self._changed:
            if self._state == "running":
                self._state = "draining"

    def health(self) -> dict[str, Any]:
        """See AsyncLLM.health."""
        self.check_process()
        now = time.perf_counter()
        with self._changed:
            started, scheduler = self._step_started_s, self.engine.scheduler
            return {
                "alive": self.is_healthy(),
                "state": "stuck" if self._is_stuck else self._state,
                "error": None if self._cause is None else describe(self._cause),
                "last_step_age_s": now - self._last_step_s,
                "step_running_s": 0.0 if started is None else now - started,
                "running": len(scheduler.running),
                "waiting": len(scheduler.waiting),
                "requests": len(self._tickets),
                "queued_requests": self._admission.queued_requests,
                "max_queued_requests": self._admission.max_queued_requests,
                "queued_tokens": self._admission.queued_tokens,
                "max_queued_tokens": self._admission.max_queued_tokens,
                "free_blocks": self.engine.block_pool.num_free,
                "total_blocks": self.engine.block_pool.num_blocks,
                "cached_blocks": self.engine.block_pool.num_cached,
                "disk_blocks": None if scheduler.store is None else scheduler.store.num_blocks,
                "memory_bytes_per_s": self._bandwidth.ceiling,
                "bandwidth_fraction": self._bandwidth.fraction,
                "generated_tokens_per_s": self.counters.generated_tokens_rate.per_s(now),
                "prompt_tokens_per_s": self.counters.computed_prompt_tokens_rate.per_s(now),
            }

    def totals(self) -> dict[str, Any]:
        """See AsyncLLM.counters."""
        self.check_process()
        with self._changed:
            return {**asdict(self.engine.counters), **self.counters.as_dict()}

    # The lock is held.

    def _is_idle(self) -> bool:
        return not self._tickets and (self.guest is None or self.guest.num_runs == 0)

    def _check_accepting(self) -> None:
        if self._state == "dead":
            raise dead_error(self._cause)
        if self._state == "draining":
            raise EngineClosedError(
                "the engine is being closed: it finishes what runs and takes no new requests"
            )
        if self._state == "closed":
            raise EngineClosedError("the engine is closed: create a new AsyncLLM")
        if self._is_stuck:
            raise stuck_error(self.step_timeout_s)

    def _end(
        self, ticket: Ticket, error: BaseException | None = None
    ) -> asyncio.Future[None] | None:
        if ticket.ended.done():
            return None
        self._admission.remove(ticket)
        if error is not None:
            num_samples = ticket.params.n if ticket.params else 1
            self.counters.finished_samples["error"] += num_samples - ticket.num_finished
        ticket.ended.set_result(None)
        self._answer_thinking(ticket, False)
        if not self._tickets:
            self._changed.notify_all()
        return ticket.mailbox.end(error)

    def _answer_thinking(self, ticket: Ticket, has_thought: bool) -> None:
        for reply in ticket.thinking_ends:
            # Who asked may have gone.
            if reply.set_running_or_notify_cancel():
                reply.set_result(has_thought)
        ticket.thinking_ends.clear()

    def _count_spare_slots(self) -> None:
        scheduler = self.engine.scheduler
        room = self.engine.config.max_num_requests - len(scheduler.running)
        self._admission.spare_slots = 0 if scheduler.waiting else max(0, room)

    # The engine's thread.

    def _run(self) -> None:
        try:
            may_sleep = True
            while self._take_commands(may_sleep=may_sleep):
                may_sleep = not self.engine.has_work
                if not may_sleep:
                    self._step()
        except BaseException as error:
            self._die(error)
        finally:
            try:
                self.engine.close()
            except Exception:
                logger.exception("closing the engine failed")
            with self._changed:
                if self._state != "dead":
                    self._state = "closed"
                self._has_ended = True
                closed = EngineClosedError("the engine was closed before this request was finished")
                if self.guest is not None:
                    self.guest.give_up(closed)
                wakes = [self._end(t, closed) for t in list(self._tickets.values())]
                self._changed.notify_all()
            wake(wakes)
            self._watch_ended.set()

    def _take_commands(self, *, may_sleep: bool) -> bool:
        """Does what the inbox asks for, sleeping until there is something if that is allowed; False to stop."""
        try:
            command = self.inbox.get(block=may_sleep)
            while True:
                match command:
                    case ("stop", _):
                        return False
                    case ("add", Ticket() as ticket):
                        self._add(ticket)
                    case ("abort", Ticket() as ticket):
                        self._abort(ticket)
                    case ("end_thinking", Ticket() as ticket):
                        self._end_thinking(ticket)
                    case ("abort_all", _):
                        self._abort_all()
                    case ("call", function) if callable(function):
                        function()
                command = self.inbox.get_nowait()
        except queue.Empty:
            return True

    def _add(self, ticket: Ticket) -> None:
        if ticket.ended.done():
            return
        add = (
            partial(self.engine.add_scoring, ticket.token_ids, num_top=ticket.num_top)
            if ticket.params is None
            else partial(
                self.engine.add_request, ticket.token_ids, ticket.params, prompt=ticket.prompt
            )
        )
        try:
            add(
                request_id=ticket.request_id,
                priority=ticket.priority,
                arrival_s=ticket.arrival_s,
            )
        except Exception as error:
            self.engine.discard(ticket.request_id)
            self._fail_step([ticket], error)
            return
        self._in_engine[ticket.request_id] = ticket
        if ticket.is_aborted:
            self._abort(ticket)
        elif ticket.thinking_ends:
            self._end_thinking(ticket)

    def _abort(self, ticket: Ticket) -> None:
        if self._in_engine.get(ticket.request_id) is not ticket:
            return
        if ticket.ended.done():  # the watchdog ended it
            self._in_engine.pop(ticket.request_id)
            self.engine.discard(ticket.request_id)
            return
        try:
            self._deliver(self.engine.abort(ticket.request_id))
            self._in_engine.pop(ticket.request_id, None)
        except Exception as error:
            logger.error("the output of an aborted request could not be built", exc_info=error)
            self.engine.discard(ticket.request_id)
            self._fail_step([ticket], error)

    def _end_thinking(self, ticket: Ticket) -> None:
        if self._in_engine.get(ticket.request_id) is not ticket or ticket.ended.done():
            return  # if it has yet to come, it will be looked at again when the engine gets it
        has_thought = self.engine.end_thinking(ticket.request_id)
        with self._changed:
            self._answer_thinking(ticket, has_thought)

    def _abort_all(self) -> None:
        if self.guest is not None:
            self.guest.fail(None, EngineClosedError("the engine was closed"))
        for ticket in list(self._tickets.values()):
            if self._in_engine.get(ticket.request_id) is ticket:
                self._abort(ticket)
            else:  # its prompt is still being tokenised
                self._fail([ticket], lambda: EngineClosedError("the engine was closed"))

    def _step(self) -> None:
        self._batch_requests = []
        with self._changed:
            self._step_started_s = time.perf_counter()
        deltas: list[StreamDelta] = []
        try:
            deltas = self.engine.step()
        except Exception as error:
            self._recover(error)
        finally:
            with self._changed:
                self._step_started_s, self._is_stuck = None, False
                self._last_step_s = time.perf_counter()
                self._count_tokens(self._last_step_s)
        self._deliver(deltas)
        if self.guest is not None:
            self.guest.deliver(deltas)
        if not self._batch_requests and self.engine.has_work:
            time.sleep(_STALL_WAIT_S)
        self._batch_requests = []

    def _on_scheduled(self, batch: Batch) -> None:
        """Between a step's schedule and its computation."""
        self._batch_requests = batch.requests
        if self._admission.queued_requests == 0:
            return
        now = time.perf_counter()
        with self._changed:
            for request in batch.requests:
                ticket = self._in_engine.get(request.request_id)
                if ticket is not None and ticket.is_queued and not ticket.ended.done():
                    self._admission.leave_queue(ticket)
                    self.counters.starts.add(1, now)
                    self.counters.queue_time.observe(now - ticket.arrival_s)
            self._count_spare_slots()

    def _count_tokens(self, now: float) -> None:
        totals, seen = self.engine.totals, self._seen_tokens
        self._seen_tokens = totals.prefill_tokens, totals.generated_tokens
        self.counters.computed_prompt_tokens_rate.add(self._seen_tokens[0] - seen[0], now)
        self.counters.generated_tokens_rate.add(self._seen_tokens[1] - seen[1], now)
        self._bandwidth.add(self.engine.traffic, now)

    def _deliver(self, deltas: Iterable[StreamDelta]) -> None:
        wakes: Wakes = []
        with self._changed:
            for delta in deltas:
                ticket = self._in_engine.get(delta.request_id)
                is_step_error = delta.error is not None and delta.is_step_error
                if is_step_error or delta.output is not None:
                    self._in_engine.pop(delta.request_id, None)
                if ticket is None or ticket.ended.done():  # was failed by the watchdog
                    continue
                if delta.error is not None and is_step_error:
                    self.counters.step_errors += 1
                    wakes.append(self._end(ticket, step_error(delta.error)))
                    continue
                if delta.finish_reason is not None:
                    self.counters.finished_samples[delta.finish_reason] += 1
                    ticket.num_finished += 1
                waiter = ticket.mailbox.put(delta)
                if delta.output is not None:
                    waiter = self._end(ticket) or waiter
                wakes.append(waiter)
            self._count_spare_slots()
        wake(wakes)

    def _fail(self, tickets: Iterable[Ticket], make_error: Callable[[], Exception]) -> None:
        """Ends requests with an exception each: one that several consumers raised would mix their tracebacks."""
        with self._changed:
            wakes = []
            for ticket in tickets:
                if self._in_engine.get(ticket.request_id) is ticket:
                    self._in_engine.pop(ticket.request_id)
                wakes.append(self._end(ticket, make_error()))
        wake(wakes)

    def _fail_step(self, tickets: Iterable[Ticket | None], error: Exception) -> None:
        self.counters.step_errors += 1
        known = [ticket for ticket in tickets if ticket is not None]
        self._fail(known, lambda: step_error(error))

    def _recover(self, error: Exception) -> None:
        """After a step that raised: ends who took part, and makes sure that the engine still works."""
        logger.error("a step of the engine failed; the running requests end", exc_info=error)
        scheduler = self.engine.scheduler
        # With none of them it is one of the waiting that breaks the schedule: every failure ends one at least.
        running = [*scheduler.running, *self._batch_requests] or scheduler.waiting[:1]
        victims = dict.fromkeys(request.request_id for request in running)
        for request_id in victims:
            self.engine.discard(request_id)
        self._fail_step([self._in_engine.get(request_id) for request_id in victims], error)
        if self.guest is not None:
            self.guest.fail(list(victims), step_error(error))
        try:
            scheduler.check_integrity()
            self.engine.probe()
        except Exception as probe_error:
            logger.error("the engine does not work any more", exc_info=probe_error)
            raise error from None

    def _die(self, error: BaseException) -> None:
        logger.critical("the engine is dead", exc_info=error)
        with self._changed:
            self._state, self._cause = "dead", error.with_traceback(None)
        tickets = list(self._tickets.values())
        for ticket in tickets:
            self.engine.discard(ticket.request_id)
        self._fail(tickets, lambda: dead_error(error))
        if self.guest is not None:
            self.guest.fail(None, dead_error(error))

    # The watchdog's thread.

    def _watch(self) -> None:
        assert self.step_timeout_s is not None
        delay_s = self.step_timeout_s
        # A step that has not begun yet cannot be late before a whole timeout has passed.
        while not self._watch_ended.wait(delay_s):
            delay_s = self.step_timeout_s
            with self._changed:
                if self._step_started_s is None or self._is_stuck:
                    continue
                left_s = self._step_started_s + self.step_timeout_s - time.perf_counter()
                if left_s > 0:
                    delay_s = left_s
                    continue
                self._is_stuck = True
                self.counters.step_timeouts += 1
                tickets = list(self._tickets.values())
                wakes = [self._end(ticket, stuck_error(self.step_timeout_s)) for ticket in tickets]
                for ticket in tickets:
                    self.inbox.put(("abort", ticket))
                self._changed.notify_all()
            if self.guest is not None:
                self.guest.give_up(stuck_error(self.step_timeout_s))
            logger.error("%s", stuck_error(self.step_timeout_s))
            wake(wakes)


_LIVE: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that returns from native code into an interpreter that is gone would abort the process."""
    for thread in list(_LIVE):
        thread.close(drain=False, timeout_s=0.0, wait_s=_EXIT_WAIT_S)
