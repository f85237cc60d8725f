"""Strategies on an `AsyncLLM`, beside its other requests and in common steps with them.

Generators run on the engine's thread, between steps; what they put into the background runs on threads of its own. A
consumer reads progress and result on its event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moejet.engine_thread import EngineThread
from moejet.llm import LLM
from moejet.prompt_reader import Message
from moejet.reasoning.answer_classes import Answers
from moejet.reasoning.budget import Budget
from moejet.reasoning.driver import Active, Driver
from moejet.reasoning.result import Progress, Result
from moejet.reasoning.solver import Prompt, check_strategy, make_task, supervised
from moejet.reasoning.specs import parse_strategy
from moejet.reasoning.task import Render, Strategy, Task
from moejet.request import StreamDelta
from moejet.ticket import QueueFullError

if TYPE_CHECKING:
    from moejet.request import SamplingParams

logger = logging.getLogger(__name__)

MAX_RUNS = 16
_THREADS = 4
_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to answer and how; see `moejet.reasoning.solve`. strategy: one, or its specification

    messages: of which a prompt of token ids was made · render: makes prompts of further conversations
    """

    prompt: Prompt
    strategy: Strategy | str | Mapping[str, Any]
    params: SamplingParams | None = None
    budget: Budget | None = None
    seed: int = 0
    answers: Answers | None = None
    template_kwargs: Mapping[str, Any] | None = None
    messages: Sequence[Message] | None = None
    render: Render | None = None


_Event = Progress | Result | BaseException | None  # None: the stream was closed


class StrategyStream:
    """A strategy's run: iterate over its progress, the last item is the `Result`; or await `result()`.

    `close` and cancelling the task that reads end the run; leave an iteration early by way of `contextlib.aclosing`,
    or the run goes on for nobody. For one event loop.
    """

    def __init__(self, runs: AsyncRuns, wanted: Wanted, request_id: str | None = None):
        self.request_id = request_id
        self.ended: Future[None] = Future()
        self.is_aborted = self.answers_now = False  # what somebody wants of it
        self._runs = runs
        self._wanted = wanted
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_ended = False
        self.start_s = 0.0

    async def start(self) -> StrategyStream:
        """Begins the run. Raises QueueFullError, EngineClosedError or EngineDeadError; twice does nothing."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self.start_s = time.monotonic()
            try:
                self._runs.begin(self, self._wanted)
            except BaseException:
                self._loop = None  # it can be tried again
                raise
        return self

    def __aiter__(self) -> StrategyStream:
        return self

    async def __anext__(self) -> Progress | Result:
        if self._has_ended:
            raise StopAsyncIteration
        await self.start()
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if isinstance(event, Progress):
            return event
        if event is None:
            raise StopAsyncIteration
        self._has_ended = True
        if isinstance(event, BaseException):
            raise event
        return event

    async def result(self) -> Result:
        """Reads on to the end."""
        async for event in self:
            if isinstance(event, Result):
                return event
        raise ValueError("this stream has been read to its end already")

    def close(self) -> None:
        """Ends the run, if it still goes on, and the iteration."""
        if self._loop is not None and not self._has_ended:
            self._runs.cancel(self)
            self.put(None)  # somebody may be reading
        self._has_ended = True

    async def aclose(self) -> None:
        """The same, by the name that contextlib.aclosing expects."""
        self.close()

    def put(self, event: _Event) -> None:
        """On any thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            logger.debug("the event loop of a strategy's stream is closed")
            self._runs.cancel(self)


class AsyncRuns:
    """The `Guest` of an engine's thread that drives strategies there."""

    def __init__(self, thread: EngineThread, *, max_runs: int = MAX_RUNS):
        self.max_runs = max_runs
        self._thread = thread
        self._llm = LLM.over(thread.engine)
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="moejet-strategy")
        self._driver = Driver(_Watched(self._executor, self._go_on_later), only=self._llm)
        self._active: dict[StrategyStream, Active] = {}
        self._streams: set[StrategyStream] = set()  # those that have not been told their end
        thread.attach(self)

    # On any thread.

    @property
    def num_runs(self) -> int:
        return len(self._streams)

    def begin(self, stream: StrategyStream, wanted: Wanted) -> None:
        self._thread.check_process()
        if len(self._streams) >= self.max_runs:
            raise QueueFullError(
                f"{self.max_runs} strategies run already",
                retry_after_s=_RETRY_S,
            )
        self._streams.add(stream)
        try:
            self._thread.check_accepting()
            prepared = self._executor.submit(self._prepare, wanted)
        except BaseException:
            self._streams.discard(stream)
            raise
        prepared.add_done_callback(partial(self._start_later, stream))

    def find(self, request_id: str) -> StrategyStream | None:
        """The run of that id, if it has not ended."""
        return next((s for s in list(self._streams) if s.request_id == request_id), None)

    def abort(self, stream: StrategyStream) -> None:
        """Ends a run with what it has by then."""
        stream.is_aborted = True
        self._thread.call(partial(self._heed, stream))

    def end_thinking(self, stream: StrategyStream) -> None:
        """Makes every branch of a run answer now; it begins no others."""
        stream.answers_now = True
        self._thread.call(partial(self._heed, stream))

    def cancel(self, stream: StrategyStream) -> None:
        self._thread.call(partial(self._cancel, stream))

    def give_up(self, error: Exception) -> None:
        for stream in list(self._streams):
            self._tell(stream, error)
            self.cancel(stream)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    # On the executor's threads, or wherever its work is called off.

    def _prepare(self, wanted: Wanted) -> tuple[Task, Strategy]:
        """What takes long where the prompt is long."""
        strategy = wanted.strategy
        if isinstance(strategy, str | Mapping):
            strategy = parse_strategy(strategy, self._llm)
        check_strategy(strategy)
        task = make_task(
            self._llm,
            wanted.prompt,
            wanted.params,
            wanted.budget,
            wanted.seed,
            wanted.answers,
            wanted.template_kwargs,
            wanted.messages,
            wanted.render,
        )
        return task, strategy

    def _start_later(self, stream: StrategyStream, prepared: Future[tuple[Task, Strategy]]) -> None:
        self._thread.call(partial(self._start, stream, prepared))

    # On the engine's thread.

    def deliver(self, deltas: Iterable[StreamDelta]) -> None:
        self._llm.post(deltas)
        if not self._active:
            return
        self._driver.charge(self._llm)
        self._driver.deliver(self._llm, self._llm.ended(self._driver.requests().get(self._llm, ())))

    def fail(self, request_ids: Collection[str] | None, error: Exception) -> None:
        if request_ids is not None:
            own = set(self._driver.requests().get(self._llm, ()))
            self._driver.deliver(self._llm, {i: error for i in request_ids if i in own})
            return
        for stream in list(self._streams):
            self._tell(stream, error)
            self._cancel(stream)

    def _start(self, stream: StrategyStream, prepared: Future[tuple[Task, Strategy]]) -> None:
        if stream not in self._streams:
            return  # it was told that the engine has ended, or left
        try:
            task, strategy = prepared.result()
        except (Exception, CancelledError) as error:
            self._tell(stream, error)
            return
        task.ledger.start_s = stream.start_s

        def ended(result: Any, error: BaseException | None) -> None:
            self._active.pop(stream, None)
            self._tell(stream, result if error is None else error)

        self._driver.charge(self._llm)  # what others have done so far is not for this one
        active = self._driver.start(
            supervised(task, strategy), task.ledger, watch=stream.put, end=ended
        )
        if stream in self._streams:
            self._active[stream] = active
            self._heed(stream)

    def _heed(self, stream: StrategyStream) -> None:
        """Does with a run's branches what was wanted of it, perhaps before it began."""
        active = self._active.get(stream)
        if active is None or not (stream.is_aborted or stream.answers_now):
            return
        ledger, engine = active.ledger, self._llm.engine
        ledger.is_aborted, ledger.answers_now = stream.is_aborted, stream.answers_now
        ledger.has_cut |= ledger.is_aborted
        for request_id in self._driver.requests_of(ledger):
            if ledger.is_aborted:
                self.deliver(engine.abort(request_id))
            else:
                engine.end_thinking(request_id)

    def _cancel(self, stream: StrategyStream) -> None:
        active = self._active.pop(stream, None)
        if active is not None:
            self._driver.cancel(active)
        self._forget(stream)

    def _go_on_later(self) -> None:
        """Something in the background is done."""
        self._thread.call(self._driver.take_futures)

    def _tell(self, stream: StrategyStream, event: Result | BaseException) -> None:
        is_known = stream in self._streams
        self._forget(stream)
        if is_known:
            stream.put(event)

    def _forget(self, stream: StrategyStream) -> None:
        self._streams.discard(stream)
        with suppress(InvalidStateError):
            stream.ended.set_result(None)
        # Not at once: whoever ends it may hold the lock that is needed for this.
        self._thread.call(self._thread.notify)


class _Watched:
    """An executor that says when something is done."""

    def __init__(self, executor: ThreadPoolExecutor, on_done: Callable[[], None]):
        self._executor = executor
        self._on_done = on_done

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        future = self._executor.submit(function)
        future.add_done_callback(lambda _: self._on_done())
        return future
