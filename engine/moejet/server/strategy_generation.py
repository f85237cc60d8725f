"""A request that a strategy answers, as it runs: `Generation` for many branches of which one is returned.

Progress comes while it runs; the answer comes whole at the end and is passed on as a stream of it would be.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

from moejet.reasoning.result import Candidate, Progress
from moejet.request import CompletionOutput, FinishReason, RequestOutput, Timings
from moejet.server.backend import Backend
from moejet.server.generation import (
    ChoiceEnd,
    Event,
    Observer,
    Piece,
    Plan,
    Silence,
    StrategyStep,
    Totals,
    refusal,
)
from moejet.server.strategies import Outcome, SolveJob, StrategyRun
from moejet.server.strategy_metrics import StrategyMetrics
from moejet.server.tool_calls import ContentDelta, ReasoningDelta

logger = logging.getLogger(__name__)

_PIECE_CHARS = 1024
_CUT = ("budget", "wall_s")  # stop reasons of what a budget ended


class StrategyGeneration:
    """Runs a plan that has a `solve`; used as `moejet.server.generation.Generation`."""

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        *,
        keep_alive_s: float,
        observer: Observer,
        metrics: StrategyMetrics,
    ):
        assert plan.solve is not None, "the plan is for a strategy"
        self.plan = plan
        self.outputs: list[RequestOutput] = []
        self._job: SolveJob = plan.solve
        self._backend = backend
        self._keep_alive_s = keep_alive_s
        self._observer = observer
        self._metrics = metrics
        self._run: StrategyRun | None = None
        self._outcome: Outcome | None = None
        self._reason = "cancelled"  # unless something else becomes of it
        self._is_over = False
        self._started_s = time.perf_counter()

    async def start(self) -> None:
        self._observer.request_started(self.plan.dialect)
        if self.plan.is_logged:
            prompt = self.plan.jobs[0].prompt
            logger.info("%s asks by %s %r", self._job.request_id, self._job.strategy, prompt)
        try:
            self._run = await self._backend.solve(self._job)
        except Exception as error:
            self._is_over = True
            self._observer.rejected(type(error).__name__)
            if (refused := refusal(error)) is not None:
                raise refused from error
            raise
        self._metrics.started()

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.close()
            self._metrics.ended(self._job.name, self._reason, self._outcome)

    def cancel(self) -> None:
        """Ends everything because the client has gone, if only before it had read the end."""
        if not self._is_over:
            self._observer.cancelled("decode")
        self.close()

    def totals(self) -> Totals:
        if self._outcome is None:
            return Totals.of(self.outputs)
        thinking = self._outcome.result.usage.thinking_tokens
        totals = Totals.of(self.outputs)
        return replace(totals, reasoning_tokens=thinking, outcome=self._outcome)

    async def events(self) -> AsyncGenerator[Event]:
        """Raises what ended the strategy."""
        try:
            async for item in self._items():
                if item is None:
                    yield Silence()
                elif isinstance(item, Progress):
                    yield StrategyStep(item)
                else:
                    self._take(item)
            assert self._outcome is not None, "it is the last item"
            for event in self._answer(self._outcome):
                yield event
        except Exception:
            self._reason = "error"
            raise
        finally:
            self._is_over = True
            self.close()
        seconds = time.perf_counter() - self._started_s
        self._tell_observer(seconds)

    async def _items(self) -> AsyncGenerator[Progress | Outcome | None]:
        """What the run gives, None for each silence."""
        run, read = self._run, None
        assert run is not None, "it has been started"
        try:
            while True:
                if read is None:
                    read = asyncio.ensure_future(run.get())
                await asyncio.wait((read,), timeout=self._keep_alive_s)
                if not read.done():
                    yield None
                    continue
                item, read = read.result(), None
                yield item
                if isinstance(item, Outcome):
                    return
        finally:
            if read is not None:
                read.cancel()
                await asyncio.gather(read, return_exceptions=True)

    def _take(self, outcome: Outcome) -> None:
        usage, chosen = outcome.result.usage, outcome.result.candidate
        self._outcome = outcome
        self._reason = finish_reason(chosen)
        sample = CompletionOutput(
            0,
            chosen.text,
            chosen.reasoning,
            chosen.content,
            (),
            finish_reason(chosen),
            chosen.stop_reason,
        )
        num_prompt = len(self._job.token_ids)
        timings = Timings(num_prompt, usage.generated_tokens, 0.0, 0.0, usage.seconds)
        job = self.plan.jobs[0]
        self.outputs = [RequestOutput(job.request_id, job.prompt, (), (sample,), timings)]
        if self.plan.is_logged:
            logger.info("%s was answered %r", job.request_id, chosen.text)

    def _answer(self, outcome: Outcome) -> Iterator[Event]:
        chosen = outcome.result.candidate
        if chosen.reasoning and self.plan.include_reasoning:
            for part in _parts(chosen.reasoning):
                yield Piece(0, ReasoningDelta(part))
        for part in _parts(chosen.content):
            yield Piece(0, ContentDelta(part))
        yield ChoiceEnd(0, finish_reason(chosen), 0, chosen.stop_reason, outcome=outcome)

    def _tell_observer(self, seconds: float) -> None:
        totals = self.totals()
        self._observer.first_token(seconds)  # of those that the client gets
        self._observer.finished(self._reason, totals, seconds)


def finish_reason(chosen: Candidate) -> FinishReason:
    return "length" if chosen.stop_reason in _CUT else chosen.finish_reason


def _parts(text: str) -> Iterator[str]:
    for begin in range(0, len(text), _PIECE_CHARS):
        yield text[begin : begin + _PIECE_CHARS]
