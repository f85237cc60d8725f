"""Keeps strategies going: many generators, one or several engines, every step shared by whoever wants it.

`Driver` holds the generators and knows what each waits for. It begins requests; whoever owns it runs the engines and
tells it which requests have ended (`moejet.reasoning.solver`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from moejet.advance import Advance
from moejet.branch import BranchHost
from moejet.reasoning.cost import expected_distinct_experts
from moejet.reasoning.ledger import Ledger
from moejet.reasoning.result import Background, Progress
from moejet.reasoning.task import Gather, Run
from moejet.request import CompletionOutput, RequestOutput

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Active:
    """A generator and what it waits for: requests of an `Advance`, a `Future`, or the runs of a `Gather`."""

    run: Run[Any]
    ledger: Ledger
    watch: Callable[[Progress], None]
    end: Callable[[Any, BaseException | None], None]
    advance: Advance | None = None
    request_ids: list[str] = field(default_factory=list)
    outputs: dict[str, CompletionOutput] = field(default_factory=dict)
    future: Future[Any] | None = None
    gather: _Gathering | None = None


@dataclass(eq=False, slots=True)
class _Gathering:
    owner: Active
    work: Gather
    results: list[Any]
    active: dict[int, Active] = field(default_factory=dict)
    num_started: int = 0
    num_ended: int = 0
    num_asked: int = 0  # of the first results, how many the stop rule has seen


class Submits(Protocol):
    """What is asked of an executor."""

    def submit(self, function: Callable[[], Any], /) -> Future[Any]: ...


class Driver:
    """Keeps generators going. Used by one thread; only `executor`'s threads do something beside it."""

    def __init__(self, executor: Submits, *, only: BranchHost | None = None):
        """only: the one model that may be used, if nobody would run others"""
        self._only = only
        self._executor = executor
        self._active: set[Active] = set()  # those of a Gather included
        self._top: set[Active] = set()
        # Each engine numbers its requests by itself.
        self._by_request: dict[tuple[BranchHost, str], Active] = {}
        self._counters: dict[BranchHost, tuple[int, int, int, int]] = {}
        self._ready: deque[tuple[Active, Callable[[], Any]]] = deque()
        self._is_running = False

    def start(
        self,
        run: Run[Any],
        ledger: Ledger,
        *,
        watch: Callable[[Progress], None],
        end: Callable[[Any, BaseException | None], None],
    ) -> Active:
        """watch: gets its progress · end: gets what it returned or raised."""
        active = Active(run, ledger, watch, end)
        self._active.add(active)
        self._top.add(active)
        self._resume(active, None)
        return active

    def cancel(self, active: Active) -> None:
        """Ends a run without a result; nobody is told."""
        if active not in self._active:
            return
        self._forget(active)
        self._drop(active)
        _close(active.run)

    def cancel_all(self) -> None:
        for active in list(self._active):
            self.cancel(active)

    def requests(self) -> dict[BranchHost, list[str]]:
        """What is waited for, by the model that computes it."""
        found: dict[BranchHost, list[str]] = {}
        for llm, request_id in self._by_request:
            found.setdefault(llm, []).append(request_id)
        return found

    def requests_of(self, ledger: Ledger) -> list[str]:
        """Those of one run."""
        return [i for (_, i), active in self._by_request.items() if active.ledger is ledger]

    @property
    def num_runs(self) -> int:
        """Of those that were started here, how many have not ended."""
        return len(self._top)

    def futures(self) -> list[Future[Any]]:
        return [active.future for active in self._active if active.future is not None]

    def take_futures(self) -> None:
        """Goes on with the runs whose background work is done."""
        for active in list(self._active):
            future = active.future
            if future is None or not future.done() or active not in self._active:
                continue
            active.future = None
            error = CancelledError() if future.cancelled() else future.exception()
            if error is None:
                self._resume(active, future.result())
            else:
                self._throw(active, error)

    def deliver(self, llm: BranchHost, ended: Mapping[str, RequestOutput | Exception]) -> None:
        """Tells of a model's requests that have ended."""
        for request_id, result in ended.items():
            active = self._by_request.pop((llm, request_id), None)
            if active is None:
                continue
            if isinstance(result, Exception):
                self._drop(active)
                self._throw(active, result)
                continue
            active.outputs[request_id] = result.outputs[0]
            if len(active.outputs) == len(active.request_ids):
                work, outputs = active.advance, [active.outputs[i] for i in active.request_ids]
                assert work is not None
                active.advance = None
                try:
                    segments = work.segments(outputs)
                except Exception as error:  # of a condition that the strategy gave
                    self._throw(active, error)
                else:
                    self._resume(active, segments)

    def charge(self, llm: BranchHost) -> None:
        """Divides what the engine has done since the last time among the runs that wait for it."""
        now = _totals(llm)
        before = self._counters.get(llm, now)
        self._counters[llm] = now
        steps, positions, loads, read = (a - b for a, b in zip(now, before, strict=True))
        if not steps:
            return
        expected = steps * _expected_loads(llm, positions / steps)
        waiting = [a for (host, _), a in self._by_request.items() if host is llm]
        running = max(len(waiting), len(llm.engine.scheduler.running))
        seen: set[int] = set()
        for active in waiting:
            usage = active.ledger.usage
            usage.expert_loads += loads / running
            usage.expert_bytes += read / running
            usage.expected_loads += expected / running
            usage.step_share += steps / running
            if id(usage) not in seen:
                seen.add(id(usage))
                usage.steps += steps

    def _resume(self, active: Active, value: Any) -> None:
        self._schedule(active, lambda: active.run.send(value))

    def _throw(self, active: Active, error: BaseException) -> None:
        self._schedule(active, lambda: active.run.throw(error))

    def _schedule(self, active: Active, go_on: Callable[[], Any]) -> None:
        """Runs generators that can go on, one after another; those that others wake come behind."""
        self._ready.append((active, go_on))
        if self._is_running:
            return
        self._is_running = True
        try:
            while self._ready:
                active, go_on = self._ready.popleft()
                if active in self._active:
                    self._go_on(active, go_on)
        finally:
            self._is_running = False

    def _go_on(self, active: Active, go_on: Callable[[], Any]) -> None:
        """Lets a generator run until it waits for something or ends."""
        try:
            work = go_on()
        except StopIteration as stop:
            self._forget(active)
            active.end(stop.value, None)
            return
        except BaseException as error:
            self._forget(active)
            active.end(None, error)
            return
        try:
            match work:
                case Progress():
                    active.watch(work)
                    self._resume(active, None)
                case Advance():
                    self._begin(active, work)
                case Background(function):
                    active.future = self._executor.submit(function)
                case Gather():
                    self._gather(active, work)
                case _:
                    raise TypeError(f"a strategy yielded {work!r}, which is no work")
        except Exception as error:
            self._throw(active, error)

    def _begin(self, active: Active, work: Advance) -> None:
        if self._only is not None and work.llm is not self._only:
            raise ValueError(
                "a strategy with a second model does not run on an AsyncLLM: use moejet.reasoning.solve"
            )
        self._counters.setdefault(work.llm, _totals(work.llm))
        ids = work.llm.begin(work.starts)
        active.advance, active.request_ids, active.outputs = work, ids, {}
        self._by_request |= {(work.llm, request_id): active for request_id in ids}

    def _gather(self, active: Active, work: Gather) -> None:
        gathering = _Gathering(active, work, [None] * len(work.runs))
        active.gather = gathering
        self._start_more(gathering)

    def _start_more(self, gathering: _Gathering) -> None:
        work = gathering.work
        while (
            gathering.owner.gather is gathering
            and len(gathering.active) < work.limit
            and gathering.num_started < len(work.runs)
        ):
            index = gathering.num_started
            gathering.num_started += 1
            child = Active(
                work.runs[index],
                gathering.owner.ledger,
                gathering.owner.watch,
                partial(self._child_ended, gathering, index),
            )
            gathering.active[index] = child
            self._active.add(child)
            self._resume(child, None)

    def _child_ended(
        self, gathering: _Gathering, index: int, result: Any, error: BaseException | None
    ) -> None:
        owner, work = gathering.owner, gathering.work
        gathering.active.pop(index, None)
        if owner.gather is not gathering:
            return
        gathering.results[index] = result
        gathering.num_ended += 1
        is_enough = False
        if error is None and work.stop is not None:
            try:
                is_enough = _is_enough(gathering, work.stop)
            except Exception as raised:
                error = raised
        if error is not None:
            self._drop(owner)
            self._throw(owner, error)
        elif is_enough or gathering.num_ended == len(work.runs):
            self._drop(owner)
            self._resume(owner, gathering.results)
        else:
            self._start_more(gathering)

    def _forget(self, active: Active) -> None:
        self._active.discard(active)
        self._top.discard(active)

    def _drop(self, active: Active) -> None:
        """Ends what a run waits for."""
        if active.advance is not None:
            for request_id in active.request_ids:
                self._by_request.pop((active.advance.llm, request_id), None)
            active.advance.llm.abandon(active.request_ids)
            active.advance = None
        if active.future is not None:
            active.future.cancel()
            active.future = None
        if active.gather is not None:
            gathering, active.gather = active.gather, None
            for child in list(gathering.active.values()):
                self.cancel(child)
            for run in gathering.work.runs[gathering.num_started :]:
                _close(run)


def _is_enough(gathering: _Gathering, stop: Callable[[Sequence[Any]], bool]) -> bool:
    """Whether the results of the first runs are enough, all of which have ended; the others' are then forgotten.

    So the outcome does not depend on which of them ended first.
    """
    complete = next(
        (i for i in range(gathering.num_started) if i in gathering.active), gathering.num_started
    )
    for count in range(gathering.num_asked + 1, complete + 1):
        gathering.num_asked = count
        if stop(gathering.results[:count]):
            rest = len(gathering.results) - count
            gathering.results[count:] = [None] * rest
            return True
    return False


def _close(run: Run[Any]) -> None:
    """Ends a generator, whatever its clean-up does."""
    try:
        run.close()
    except Exception:
        logger.exception("a strategy that was ended failed to clean up")


def _totals(llm: BranchHost) -> tuple[int, int, int, int]:
    """Steps, positions computed, experts read, and their bytes."""
    counters = llm.engine.counters
    positions = counters.prefill_tokens + counters.decode_tokens
    return counters.steps, positions, counters.expert_loads, counters.expert_bytes


def _expected_loads(llm: BranchHost, positions: float) -> float:
    """Experts that a step would read for all layers if its positions chose theirs at random."""
    model = llm.engine.model_config
    distinct = expected_distinct_experts(model.num_experts, model.num_experts_per_tok, positions)
    return model.num_moe_layers * distinct
