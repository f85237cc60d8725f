"""One API request as it runs: the engine's deltas as events, the same for all dialects, streamed or not.

    Job(s) -> Backend -> StreamDelta -> OutputParser -> Piece ... ChoiceEnd per sample -> Totals

A piece is reasoning, content or part of a tool call, never two of them. Choices are numbered over all prompts: sample
i of prompt j of a request with n samples is choice j * n + i.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from moejet.reasoning.result import Progress as StrategyProgress
from moejet.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    StreamDelta,
    TokenLogprobs,
)
from moejet.server.backend import Backend, Job, Stream
from moejet.server.errors import ApiError
from moejet.server.strategies import Conversation, Outcome, SolveJob
from moejet.server.tool_calls import ContentDelta, OutputEvent, OutputParser, ReasoningDelta
from moejet.ticket import EngineStepError

logger = logging.getLogger(__name__)

_PROGRESS_S = 0.25  # between two looks at how far a prompt is


@runtime_checkable
class Observer(Protocol):
    """What is counted of requests; seconds are wall time."""

    def request_started(self, dialect: str) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def inter_token(self, seconds: float) -> None: ...

    def finished(
        self,
        reason: str,
        totals: Totals,
        seconds: float,
    ) -> None: ...

    def rejected(self, reason: str) -> None: ...

    def cancelled(self, phase: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens behind an event, with their log-probabilities if those were asked for."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """tokens: those that have come since the choice's last piece; text may be held back for a while."""

    choice: int
    event: OutputEvent
    tokens: Tokens = Tokens()


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """stop_reason: the stop string or token · outcome: of the strategy that chose this answer"""

    choice: int
    finish_reason: FinishReason
    num_calls: int
    stop_reason: str | int | None
    tokens: Tokens = Tokens()
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of the prompt is there, in tokens, those that were there before included, and since when."""

    total: int
    cached: int
    processed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StrategyStep:
    """A strategy tells what it has done."""

    progress: StrategyProgress


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing has come for a while."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Token counts and seconds of all prompts together; the seconds are those of the slowest.

    longest: tokens of the longest sample · outcome: of a strategy, whose branches are all counted
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    longest: int = 0
    outcome: Outcome | None = None

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput]) -> Totals:
        times = [output.timings for output in outputs]
        return cls(
            prompt_tokens=sum(t.prompt_tokens for t in times),
            cached_tokens=sum(t.cached_tokens for t in times),
            completion_tokens=sum(t.completion_tokens for t in times),
            reasoning_tokens=sum(s.num_reasoning_tokens for o in outputs for s in o.outputs),
            queue_s=max((t.queue_s for t in times), default=0.0),
            prefill_s=max((t.prefill_s for t in times), default=0.0),
            decode_s=max((t.decode_s for t in times), default=0.0),
            longest=max((len(s.token_ids) for o in outputs for s in o.outputs), default=0),
        )


Event = Piece | ChoiceEnd | Progress | StrategyStep | Silence


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request asks of the engine.

    make_parser: None if the text is wanted as it is, thinking tags included · include_reasoning: whether it is shown
    is_logged: whether prompts and answers may be written to the log · solve: a strategy answers it, in place of jobs
    returns_candidates: of that · conversation: that it was made of
    """

    request_id: str
    dialect: str
    jobs: Sequence[Job]
    make_parser: Callable[[], OutputParser] | None = None
    include_reasoning: bool = True
    wants_progress: bool = False
    is_logged: bool = False
    solve: SolveJob | None = None
    conversation: Conversation | None = None
    returns_candidates: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def salted(self, salt: str | None) -> Plan:
        """The same among the cached prefixes of whoever has this salt, a request's own one included."""
        if salt is None:
            return self

        def salted(params: SamplingParams) -> SamplingParams:
            return replace(params, cache_salt=f"{salt}/{params.cache_salt or ''}")

        jobs = [replace(job, params=salted(job.params)) for job in self.jobs]
        solve = self.solve and replace(self.solve, params=salted(self.solve.params))
        return replace(self, jobs=jobs, solve=solve)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(job.token_ids) for job in self.jobs)


def refusal(error: BaseException) -> ApiError | None:
    """What to raise instead where a request could not be begun: it is as good as ever, later."""
    if isinstance(error, EngineStepError):  # a step hangs, so nothing new is taken
        return ApiError(503, str(error), code="engine_stuck", headers={"retry-after": "10"})
    return None


class Generation:
    """Runs a plan. `start`, then iterate over `events`; `outputs` is filled when that has ended."""

    def __init__(self, backend: Backend, plan: Plan, *, keep_alive_s: float, observer: Observer):
        self.plan = plan
        self.outputs: list[RequestOutput] = []
        self._backend = backend
        self._keep_alive_s = keep_alive_s
        self._observer = observer
        self._streams: list[Stream] = []
        self._samples: dict[int, _Sample] = {}
        self._started_s = self._last_s = time.perf_counter()
        self._has_tokens = False
        self._is_over = False
        self._num_processed = 0
        self._sign_s = self._started_s  # when a sign of life was last given

    async def start(self) -> None:
        """Queues all prompts, or none."""
        self._observer.request_started(self.plan.dialect)
        try:
            for job in self.plan.jobs:
                if self.plan.is_logged:
                    logger.info("%s asks %r", job.request_id, job.prompt or job.token_ids)
                self._streams.append(await self._backend.start(job))
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):
                self._is_over = True
                self._observer.rejected(type(error).__name__)
            if (refused := refusal(error)) is not None:
                raise refused from error
            raise

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    def cancel(self) -> None:
        """Ends everything because the client has gone, if only before it had read the end."""
        if not self._is_over:
            self._observer.cancelled("decode" if self._has_tokens else "prefill")
        self.close()

    def totals(self) -> Totals:
        return Totals.of(self.outputs)

    async def events(self) -> AsyncGenerator[Event]:
        """Raises what the engine raised."""
        outputs: dict[int, RequestOutput] = {}
        try:
            async for index, delta in self._deltas():
                if delta is None:
                    if (sign := self._sign_of_life()) is not None:
                        yield sign
                    continue
                self._observe(delta)
                choice = index * self.plan.jobs[index].params.n + delta.index
                for event in self._read(choice, delta):
                    yield event
                if delta.output is not None:
                    outputs[index] = delta.output
        finally:
            self._is_over = True
            self.close()
        self.outputs = [outputs[i] for i in range(len(self.plan.jobs))]
        if self.plan.is_logged:
            for output in self.outputs:
                texts = [sample.text for sample in output.outputs]
                logger.info("%s was answered %r", output.request_id, texts)
        totals = self.totals()
        self._observer.finished(
            self.outputs[0].outputs[0].finish_reason if self.outputs else "stop",
            totals,
            time.perf_counter() - self._started_s,
        )

    async def _deltas(self) -> AsyncGenerator[tuple[int, StreamDelta | None]]:
        """What the streams give, with the number of the stream; None for each silence."""
        timeout_s = self._timeout_s
        if len(self._streams) == 1:
            while True:
                try:
                    delta = await self._streams[0].get(timeout_s())
                except TimeoutError:
                    yield 0, None
                    continue
                if delta is None:
                    return
                yield 0, delta
        reads: dict[asyncio.Future[StreamDelta | None], int] = {
            asyncio.ensure_future(stream.get()): i for i, stream in enumerate(self._streams)
        }
        try:
            while reads:
                done, _ = await asyncio.wait(
                    reads, timeout=timeout_s(), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    yield 0, None
                for read in done:
                    index = reads.pop(read)
                    if (delta := read.result()) is not None:
                        yield index, delta
                        reads[asyncio.ensure_future(self._streams[index].get())] = index
        finally:
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)

    def _timeout_s(self) -> float:
        is_watched = self.plan.wants_progress and not self._has_tokens
        return min(_PROGRESS_S, self._keep_alive_s) if is_watched else self._keep_alive_s

    def _sign_of_life(self) -> Event | None:
        now = time.perf_counter()
        if self.plan.wants_progress and not self._has_tokens:
            found = [self._backend.progress(job.request_id) for job in self.plan.jobs]
            processed = sum(p[0] for p in found if p is not None)
            cached = sum(p[2] for p in found if p is not None)
            if processed != self._num_processed:
                self._num_processed, self._sign_s = processed, now
                seconds = now - self._started_s
                return Progress(self.plan.num_prompt_tokens, cached, processed, seconds)
        if now - self._sign_s < self._keep_alive_s:
            return None
        self._sign_s = now
        return Silence()

    def _observe(self, delta: StreamDelta) -> None:
        if not delta.token_ids:
            return
        now = time.perf_counter()
        if self._has_tokens:
            # What was not read in time comes merged.
            self._observer.inter_token((now - self._last_s) / len(delta.token_ids))
        else:
            self._observer.first_token(now - self._started_s)
        self._has_tokens = True
        self._last_s = self._sign_s = now

    def _read(self, choice: int, delta: StreamDelta) -> list[Event]:
        sample = self._samples.get(choice)
        if sample is None:
            parser = self.plan.make_parser() if self.plan.make_parser is not None else None
            sample = self._samples[choice] = _Sample(choice, parser)
        events = sample.read(delta)
        if self.plan.include_reasoning:
            return events
        return [
            e for e in events if not (isinstance(e, Piece) and isinstance(e.event, ReasoningDelta))
        ]


class _Sample:
    """One choice while it comes in."""

    def __init__(self, choice: int, parser: OutputParser | None):
        self._choice = choice
        self._parser = parser
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def read(self, delta: StreamDelta) -> list[Event]:
        self._ids += delta.token_ids
        self._logprobs += delta.logprobs
        if self._parser is None:
            parts: list[OutputEvent] = [ContentDelta(delta.text)] if delta.text else []
        else:
            parts = self._parser.push_delta(delta)
        events: list[Event] = [
            Piece(self._choice, part, self._take() if i == 0 else Tokens())
            for i, part in enumerate(parts)
        ]
        if delta.finish_reason is not None:
            num_calls = self._parser.num_calls if self._parser is not None else 0
            reasons = delta.finish_reason, num_calls, delta.stop_reason
            events.append(ChoiceEnd(self._choice, *reasons, self._take()))
        return events

    def _take(self) -> Tokens:
        taken = Tokens(tuple(self._ids), tuple(self._logprobs))
        self._ids, self._logprobs = [], []
        return taken
