"""An engine with a thread of its own, and everything that other threads may ask of it.

Callers, on any thread, put commands into an inbox; the engine's thread (`moejet.engine_loop`) takes them between two
steps, runs a step, and puts what it yields into the mailbox of each request. With nothing to do it sleeps in the inbox.
A request counts as queued from the moment a caller asked for it until its first step. A second thread watches how long
a step takes.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from moejet.decode_traffic import BandwidthGauge
from moejet.engine import Engine
from moejet.engine_counters import TrafficCounters
from moejet.engine_loop import EngineLoop
from moejet.engine_state import EngineState, Guest
from moejet.mailbox import wake
from moejet.request import SamplingParams
from moejet.ticket import Admission, EngineClosedError, Ticket, describe
from moejet.watchdog import watch

logger = logging.getLogger(__name__)

_CLOSE_WAIT_S = 60.0  # for the step that runs while everything is being aborted
_EXIT_WAIT_S = 10.0  # the same, at the interpreter's exit


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
        counters = TrafficCounters()
        admission = Admission(
            max_queued_requests, max_queued_tokens, engine.config.max_num_requests, counters
        )
        self._state = EngineState(admission, counters, step_timeout_s=step_timeout_s)
        self.inbox = self._state.inbox
        self._loop = EngineLoop(engine, self._state, self._bandwidth)
        self._pid = os.getpid()
        # Daemons, so that an engine that nobody closed cannot hold up the interpreter's exit.
        threading.Thread(target=self._run, name="moejet-engine", daemon=True).start()
        if step_timeout_s is not None:
            arguments = self._state, self._loop.ended
            threading.Thread(
                target=watch, args=arguments, name="moejet-watchdog", daemon=True
            ).start()
        _LIVE.add(self)

    def _run(self) -> None:
        """A method of this object, which lives as long as the thread."""
        self._loop.run()

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
        return self._state.is_healthy()

    def reserve(self, request_id: str | None, priority: int) -> Ticket:
        """A place in the queue, for a prompt that is still to be tokenised; `enqueue` or `cancel` it."""
        self.check_process()
        with self._state.changed:
            self._state.check_accepting()
            return self._state.admission.admit(request_id, priority)

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
        with self._state.changed:
            if ticket.ended.done():
                raise ticket.mailbox.error() or EngineClosedError("the engine was closed")
            self._state.admission.count_tokens(ticket, len(token_ids))
            ticket.prompt, ticket.token_ids, ticket.params = prompt, token_ids, params
            ticket.num_top = num_top
            self._state.counters.accepted_requests += 1
            self._state.inbox.put(("add", ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Gives back the place of a request that was not enqueued."""
        with self._state.changed:
            wakes = [self._state.end(ticket)]
        wake(wakes)

    def check_accepting(self) -> None:
        """Raises EngineClosedError or EngineDeadError where nothing new may be begun."""
        with self._state.changed:
            self._state.check_accepting()

    def call(self, function: Callable[[], None]) -> None:
        """Runs a function on the engine's thread, between two steps; it must not raise. Takes no lock."""
        if self.is_own_process():
            self._state.inbox.put(("call", function))

    def notify(self) -> None:
        """The guest has one thing less under way."""
        with self._state.changed:
            self._state.changed.notify_all()

    def attach(self, guest: Guest) -> None:
        self._state.guest = guest

    def find(self, request_id: str) -> Ticket | None:
        return self._state.tickets.get(request_id)

    def abort(self, ticket: Ticket) -> None:
        """Ends a request before the next step. Takes no lock, so finalisers may call it."""
        ticket.is_aborted = True
        if self.is_own_process():
            self._state.inbox.put(("abort", ticket))

    def end_thinking(self, ticket: Ticket) -> Future[bool]:
        """Makes a request answer now; the result comes between two steps: whether it thought."""
        reply: Future[bool] = Future()
        with self._state.changed:
            if ticket.ended.done():
                reply.set_result(False)
            else:
                ticket.thinking_ends.append(reply)
                self._state.inbox.put(("end_thinking", ticket))
        return reply

    def close(self, *, drain: bool, timeout_s: float | None, wait_s: float = _CLOSE_WAIT_S) -> None:
        """Blocks until the engine's thread has ended, which closes the engine; see AsyncLLM.close."""
        if not self.is_own_process():
            return  # in a forked child there is nothing to end
        state = self._state
        state.refuse_new()
        with state.changed:
            if drain:
                state.changed.wait_for(lambda: state.is_idle() or state.has_ended, timeout_s)
            if state.phase != "dead":
                state.phase = "closed"
        state.inbox.put(("abort_all", None))
        state.inbox.put(("stop", None))
        with state.changed:
            state.changed.wait_for(lambda: state.has_ended or state.is_stuck, wait_s)
            if not state.has_ended:
                logger.warning("closing while a step still runs: the engine ends when it returns")

    def refuse_new(self) -> None:
        self._state.refuse_new()

    def health(self) -> dict[str, Any]:
        """See AsyncLLM.health."""
        self.check_process()
        state, scheduler, pool = self._state, self.engine.scheduler, self.engine.block_pool
        now = time.perf_counter()
        with state.changed:
            started = state.step_started_s
            return {
                "alive": self.is_healthy(),
                "state": "stuck" if state.is_stuck else state.phase,
                "error": None if state.cause is None else describe(state.cause),
                "last_step_age_s": now - state.last_step_s,
                "step_running_s": 0.0 if started is None else now - started,
                "running": len(scheduler.running),
                "waiting": len(scheduler.waiting),
                "requests": len(state.tickets),
                "queued_requests": state.admission.queued_requests,
                "max_queued_requests": state.admission.max_queued_requests,
                "queued_tokens": state.admission.queued_tokens,
                "max_queued_tokens": state.admission.max_queued_tokens,
                "free_blocks": pool.num_free,
                "total_blocks": pool.num_blocks,
                "cached_blocks": pool.num_cached,
                "disk_blocks": None if scheduler.store is None else scheduler.store.num_blocks,
                "memory_bytes_per_s": self._bandwidth.ceiling,
                "bandwidth_fraction": self._bandwidth.fraction,
                "generated_tokens_per_s": state.counters.generated_tokens_rate.per_s(now),
                "prompt_tokens_per_s": state.counters.computed_prompt_tokens_rate.per_s(now),
            }

    def totals(self) -> dict[str, Any]:
        """See AsyncLLM.counters."""
        self.check_process()
        with self._state.changed:
            return {**asdict(self.engine.counters), **self._state.counters.as_dict()}


_LIVE: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that returns from native code into an interpreter that is gone would abort the process."""
    for thread in list(_LIVE):
        thread.close(drain=False, timeout_s=0.0, wait_s=_EXIT_WAIT_S)
