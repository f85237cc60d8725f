"""Watches how long a step of the engine takes, on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time

from moejet.engine_state import EngineState
from moejet.mailbox import wake
from moejet.ticket import stuck_error

logger = logging.getLogger(__name__)


def watch(state: EngineState, has_ended: threading.Event) -> None:
    """Ends all requests when a step is late, and has them aborted when it returns. Returns at the engine's end."""
    timeout_s = state.step_timeout_s
    assert timeout_s is not None, "there is nothing to watch"
    delay_s = timeout_s
    # A step that has not begun yet cannot be late before a whole timeout has passed.
    while not has_ended.wait(delay_s):
        delay_s = timeout_s
        with state.changed:
            if state.step_started_s is None or state.is_stuck:
                continue
            left_s = state.step_started_s + timeout_s - time.perf_counter()
            if left_s > 0:
                delay_s = left_s
                continue
            state.is_stuck = True
            state.counters.step_timeouts += 1
            tickets = list(state.tickets.values())
            wakes = [state.end(ticket, stuck_error(timeout_s)) for ticket in tickets]
            for ticket in tickets:
                state.inbox.put(("abort", ticket))
            state.changed.notify_all()
        if state.guest is not None:
            state.guest.give_up(stuck_error(timeout_s))
        logger.error("%s", stuck_error(timeout_s))
        wake(wakes)
