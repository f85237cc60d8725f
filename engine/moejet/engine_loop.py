"""What the one thread that drives an engine does: commands, a step, its results to their readers, and so on.

The engine ends requests that it cannot compute by itself. A step that raises all the same ends those that were running;
if a small forward pass works afterwards the others go on, otherwise the engine is dead and says so to everyone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from moejet.batch import Batch
from moejet.decode_traffic import BandwidthGauge
from moejet.engine import Engine
from moejet.engine_state import EngineState
from moejet.mailbox import Wakes, wake
from moejet.request import Request, StreamDelta
from moejet.ticket import EngineClosedError, Ticket, dead_error, step_error

logger = logging.getLogger(__name__)

_STALL_WAIT_S = 0.002  # before asking again, when requests wait and none could be scheduled


class EngineLoop:
    """Owns `engine` from here on. `run` is its thread's; ended: that has come to its end."""

    def __init__(self, engine: Engine, state: EngineState, bandwidth: BandwidthGauge):
        self.ended = threading.Event()
        self._engine, self._state, self._bandwidth = engine, state, bandwidth
        self._batch_requests: list[Request] = []
        # By id, what the engine knows. An id may be used again before its first request has left the engine: then
        # this is the old one, and the admission's the new one.
        self._in_engine: dict[str, Ticket] = {}
        self._seen_tokens = 0, 0  # of prompts and of answers
        engine.on_scheduled = self._on_scheduled

    def run(self) -> None:
        """Until somebody stops the engine, or it dies; closes it."""
        try:
            may_sleep = True
            while self._take_commands(may_sleep=may_sleep):
                may_sleep = not self._engine.has_work
                if not may_sleep:
                    self._step()
        except BaseException as error:
            self._die(error)
        finally:
            try:
                self._engine.close()
            except Exception:
                logger.exception("closing the engine failed")
            with self._state.changed:
                if self._state.phase != "dead":
                    self._state.phase = "closed"
                self._state.has_ended = True
                closed = EngineClosedError("the engine was closed before this request was finished")
                if self._state.guest is not None:
                    self._state.guest.give_up(closed)
                wakes = [self._state.end(t, closed) for t in list(self._state.tickets.values())]
                self._state.changed.notify_all()
            wake(wakes)
            self.ended.set()

    def _take_commands(self, *, may_sleep: bool) -> bool:
        """Does what the inbox asks for, sleeping until there is something if that is allowed; False to stop."""
        try:
            command = self._state.inbox.get(block=may_sleep)
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
                command = self._state.inbox.get_nowait()
        except queue.Empty:
            return True

    def _add(self, ticket: Ticket) -> None:
        if ticket.ended.done():
            return
        add = (
            partial(self._engine.add_scoring, ticket.token_ids, num_top=ticket.num_top)
            if ticket.params is None
            else partial(
                self._engine.add_request, ticket.token_ids, ticket.params, prompt=ticket.prompt
            )
        )
        try:
            add(
                request_id=ticket.request_id,
                priority=ticket.priority,
                arrival_s=ticket.arrival_s,
            )
        except Exception as error:
            self._engine.discard(ticket.request_id)
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
            self._engine.discard(ticket.request_id)
            return
        try:
            self._deliver(self._engine.abort(ticket.request_id))
            self._in_engine.pop(ticket.request_id, None)
        except Exception as error:
            logger.error("the output of an aborted request could not be built", exc_info=error)
            self._engine.discard(ticket.request_id)
            self._fail_step([ticket], error)

    def _end_thinking(self, ticket: Ticket) -> None:
        if self._in_engine.get(ticket.request_id) is not ticket or ticket.ended.done():
            return  # if it has yet to come, it will be looked at again when the engine gets it
        has_thought = self._engine.end_thinking(ticket.request_id)
        with self._state.changed:
            self._state.answer_thinking(ticket, has_thought)

    def _abort_all(self) -> None:
        if self._state.guest is not None:
            self._state.guest.fail(None, EngineClosedError("the engine was closed"))
        for ticket in list(self._state.tickets.values()):
            if self._in_engine.get(ticket.request_id) is ticket:
                self._abort(ticket)
            else:  # its prompt is still being tokenised
                self._fail([ticket], lambda: EngineClosedError("the engine was closed"))

    def _step(self) -> None:
        self._batch_requests = []
        with self._state.changed:
            self._state.step_started_s = time.perf_counter()
        deltas: list[StreamDelta] = []
        try:
            deltas = self._engine.step()
        except Exception as error:
            self._recover(error)
        finally:
            with self._state.changed:
                self._state.step_started_s, self._state.is_stuck = None, False
                self._state.last_step_s = time.perf_counter()
                self._count_tokens(self._state.last_step_s)
        self._deliver(deltas)
        if self._state.guest is not None:
            self._state.guest.deliver(deltas)
        if not self._batch_requests and self._engine.has_work:
            time.sleep(_STALL_WAIT_S)
        self._batch_requests = []

    def _on_scheduled(self, batch: Batch) -> None:
        """Between a step's schedule and its computation."""
        self._batch_requests = batch.requests
        if self._state.admission.queued_requests == 0:
            return
        now = time.perf_counter()
        with self._state.changed:
            for request in batch.requests:
                ticket = self._in_engine.get(request.request_id)
                if ticket is not None and ticket.is_queued and not ticket.ended.done():
                    self._state.admission.leave_queue(ticket)
                    self._state.counters.starts.add(1, now)
                    self._state.counters.queue_time.observe(now - ticket.arrival_s)
            self._count_spare_slots()

    def _count_tokens(self, now: float) -> None:
        totals, seen = self._engine.totals, self._seen_tokens
        self._seen_tokens = totals.prefill_tokens, totals.generated_tokens
        self._state.counters.computed_prompt_tokens_rate.add(self._seen_tokens[0] - seen[0], now)
        self._state.counters.generated_tokens_rate.add(self._seen_tokens[1] - seen[1], now)
        self._bandwidth.add(self._engine.traffic, now)

    def _deliver(self, deltas: Iterable[StreamDelta]) -> None:
        wakes: Wakes = []
        with self._state.changed:
            for delta in deltas:
                ticket = self._in_engine.get(delta.request_id)
                is_step_error = delta.error is not None and delta.is_step_error
                if is_step_error or delta.output is not None:
                    self._in_engine.pop(delta.request_id, None)
                if ticket is None or ticket.ended.done():  # was failed by the watchdog
                    continue
                if delta.error is not None and is_step_error:
                    self._state.counters.step_errors += 1
                    wakes.append(self._state.end(ticket, step_error(delta.error)))
                    continue
                if delta.finish_reason is not None:
                    self._state.counters.finished_samples[delta.finish_reason] += 1
                    ticket.num_finished += 1
                waiter = ticket.mailbox.put(delta)
                if delta.output is not None:
                    waiter = self._state.end(ticket) or waiter
                wakes.append(waiter)
            self._count_spare_slots()
        wake(wakes)

    def _fail(self, tickets: Iterable[Ticket], make_error: Callable[[], Exception]) -> None:
        tickets = list(tickets)
        for ticket in tickets:
            if self._in_engine.get(ticket.request_id) is ticket:
                self._in_engine.pop(ticket.request_id)
        self._state.fail(tickets, make_error)

    def _fail_step(self, tickets: Iterable[Ticket | None], error: Exception) -> None:
        self._state.counters.step_errors += 1
        known = [ticket for ticket in tickets if ticket is not None]
        self._fail(known, lambda: step_error(error))

    def _recover(self, error: Exception) -> None:
        """After a step that raised: ends who took part, and makes sure that the engine still works."""
        logger.error("a step of the engine failed; the running requests end", exc_info=error)
        scheduler = self._engine.scheduler
        # With none of them it is one of the waiting that breaks the schedule: every failure ends one at least.
        running = [*scheduler.running, *self._batch_requests] or scheduler.waiting[:1]
        victims = dict.fromkeys(request.request_id for request in running)
        for request_id in victims:
            self._engine.discard(request_id)
        self._fail_step([self._in_engine.get(request_id) for request_id in victims], error)
        if self._state.guest is not None:
            self._state.guest.fail(list(victims), step_error(error))
        try:
            scheduler.check_integrity()
            self._engine.probe()
        except Exception as probe_error:
            logger.error("the engine does not work any more", exc_info=probe_error)
            raise error from None

    def _die(self, error: BaseException) -> None:
        logger.critical("the engine is dead", exc_info=error)
        with self._state.changed:
            self._state.phase, self._state.cause = "dead", error.with_traceback(None)
        tickets = list(self._state.tickets.values())
        for ticket in tickets:
            self._engine.discard(ticket.request_id)
        self._fail(tickets, lambda: dead_error(error))
        if self._state.guest is not None:
            self._state.guest.fail(None, dead_error(error))

    def _count_spare_slots(self) -> None:
        scheduler = self._engine.scheduler
        room = self._engine.config.max_num_requests - len(scheduler.running)
        self._state.admission.spare_slots = 0 if scheduler.waiting else max(0, room)
