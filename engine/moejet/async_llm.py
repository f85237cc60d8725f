"""The asynchronous entry point: many requests at once from any number of event loops and threads.

>>> from moejet import AsyncLLM
>>> async def main():
...     async with AsyncLLM() as llm:
...         async for delta in llm.chat([{"role": "user", "content": "Start with 17, add 25."}]):
...             print(delta.content, end="")

One thread owns the engine (`moejet.engine_thread`); everything here only talks to it. Prompts are rendered and
tokenised on two more threads, so a long one does not hold up the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejet.branch import BRANCH_ID
from moejet.config import EngineConfig, ModelConfig
from moejet.decode_traffic import read_ceiling
from moejet.engine_thread import EngineThread
from moejet.llm import LLM, TINY_REASONER
from moejet.prompt_reader import Message
from moejet.request import MAX_LOGPROBS, RequestOutput, SamplingParams, TokenLogprobs
from moejet.request_stream import RequestStream
from moejet.ticket import check_limits
from moejet.tokenizer import Tokenizer
from moejet.validation import require_ids, require_int, require_text, require_type

if TYPE_CHECKING:
    from moejet.reasoning.answer_classes import Answers
    from moejet.reasoning.async_runs import AsyncRuns, StrategyStream
    from moejet.reasoning.budget import Budget
    from moejet.reasoning.task import Render, Strategy

_MAX_QUEUED_REQUESTS = 512
_MAX_QUEUED_TOKENS = 1 << 20
_STEP_TIMEOUT_S = 600.0
_PROMPT_THREADS = 2


class AsyncLLM:
    """A loaded model that serves concurrent requests. Use it as an asynchronous context manager, or await close().

    model and engine options: as for `moejet.LLM`; loading blocks.
    max_queued_requests, max_queued_tokens: requests, and tokens of their prompts, that may wait beyond those that the
    engine can start at once; more are refused with QueueFullError. A prompt of any length may wait alone.
    step_timeout_s: a step that takes longer counts as hung: its requests fail and new ones are refused until it returns
    (None: no limit)
    memory_gbps: GB/s with which memory can be read, for the share of it in `health` (None: measured, which takes a
    second, for weights of a GiB or more; 0: not wanted)

    All methods may be called from any thread and any event loop. `async with` finishes what runs when its body ends,
    and aborts it when the body raises.
    """

    def __init__(
        self,
        model: str | Path = TINY_REASONER,
        *,
        max_queued_requests: int = _MAX_QUEUED_REQUESTS,
        max_queued_tokens: int = _MAX_QUEUED_TOKENS,
        step_timeout_s: float | None = _STEP_TIMEOUT_S,
        memory_gbps: float | None = None,
        **engine_options: Any,
    ):
        limits: dict[str, Any] = {
            "max_queued_requests": max_queued_requests,
            "max_queued_tokens": max_queued_tokens,
            "step_timeout_s": step_timeout_s,
            "memory_gbps": memory_gbps,
        }
        check_limits(**limits)
        self._setup(LLM(model, **engine_options), limits)

    def _setup(self, llm: LLM, limits: dict[str, Any]) -> None:
        self._llm = llm
        engine = llm.hand_over()
        try:
            ceiling = read_ceiling(engine, limits.pop("memory_gbps"))
        except BaseException:
            engine.close()
            raise
        self._thread = EngineThread(engine, **limits, read_ceiling=ceiling)
        self._workers = ThreadPoolExecutor(_PROMPT_THREADS, thread_name_prefix="moejet-prompt")
        self._runs: AsyncRuns | None = None
        self._runs_lock = threading.Lock()
        # Not at exit: then the engine's thread is ended and waited for.
        weakref.finalize(self, self._thread.inbox.put, ("stop", None)).atexit = False

    @classmethod
    def from_llm(
        cls,
        llm: LLM,
        *,
        max_queued_requests: int = _MAX_QUEUED_REQUESTS,
        max_queued_tokens: int = _MAX_QUEUED_TOKENS,
        step_timeout_s: float | None = _STEP_TIMEOUT_S,
        memory_gbps: float | None = None,
    ) -> AsyncLLM:
        """Takes over the engine of an LLM, which is closed from then on."""
        limits: dict[str, Any] = {
            "max_queued_requests": max_queued_requests,
            "max_queued_tokens": max_queued_tokens,
            "step_timeout_s": step_timeout_s,
            "memory_gbps": memory_gbps,
        }
        check_limits(**limits)
        require_type("llm", llm, LLM)
        self = cls.__new__(cls)
        self._setup(llm, limits)
        return self

    @classmethod
    def synthetic(cls, shape: str | ModelConfig, **options: Any) -> AsyncLLM:
        """A model with random weights and no tokenizer, as `LLM.synthetic`; options of both classes."""
        names = ("max_queued_requests", "max_queued_tokens", "step_timeout_s", "memory_gbps")
        limits = {name: options.pop(name) for name in names if name in options}
        return cls.from_llm(LLM.synthetic(shape, **options), **limits)

    @property
    def config(self) -> EngineConfig:
        return self._llm.config

    @property
    def model_config(self) -> ModelConfig:
        return self._llm.model_config

    @property
    def max_context(self) -> int:
        """Tokens that one request may have, prompt and answer together."""
        return self._llm.max_context

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises ValueError for a synthetic model, which has none."""
        return self._llm.tokenizer

    def describe(self) -> str:
        """See `LLM.describe`."""
        return self._llm.describe()

    def default_sampling(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends; temperature 1 where it is silent."""
        return self._llm.default_sampling()

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Completes a prompt (text or token ids): `async for delta in llm.generate(...)`.

        priority: requests with smaller numbers run first. Errors are raised by the first read, or by `start`.
        """
        # A copy, because the caller may go on using its own.
        mine = list(prompt) if isinstance(prompt, list) else prompt
        return self._stream(lambda: self._llm.prompts.tokenise(mine), params, request_id, priority)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        **template_kwargs: Any,
    ) -> RequestStream:
        """Answers one conversation, through the checkpoint's chat template; template_kwargs go to that."""
        return self._stream(
            lambda: self._llm.prompts.render(messages, template_kwargs),
            params,
            request_id,
            priority,
        )

    async def complete(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestOutput:
        """The whole of `generate`; for conversations: `await llm.chat(...).result()`."""
        stream = self.generate(prompt, params, request_id=request_id, priority=priority)
        return await stream.result()

    async def score(
        self, token_ids: Sequence[int], *, request_id: str | None = None, priority: int = 0
    ) -> list[float]:
        """Log-probability of each token given those before it: len(token_ids) - 1 values, the first token has none.

        It is computed beside the other requests, in chunks, and counts as a request in all limits.
        """
        scores = await self.score_top(token_ids, 0, request_id=request_id, priority=priority)
        return [score.logprob for score in scores]

    async def score_top(
        self,
        token_ids: Sequence[int],
        num_top: int,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> list[TokenLogprobs]:
        """The same with the num_top tokens that the model would have thought most likely in each place."""
        ids = require_ids("token_ids", token_ids)
        require_int("num_top", num_top, 0, MAX_LOGPROBS)
        stream = self._request(lambda: (None, ids), None, request_id, priority, num_top)
        output = await stream.result()
        if output.prompt_logprobs is None:
            raise RuntimeError(f"{output.request_id!r} was aborted before its tokens were scored")
        top = output.prompt_top or ((),) * len(output.prompt_logprobs)
        scored = zip(ids[1:], output.prompt_logprobs, top, strict=True)
        return [TokenLogprobs(token_id, logprob, best) for token_id, logprob, best in scored]

    def solve(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        strategy: Strategy | str | Mapping[str, Any],
        *,
        params: SamplingParams | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        answers: Answers | None = None,
        request_id: str | None = None,
        messages: Sequence[Message] | None = None,
        render: Render | None = None,
        **template_kwargs: Any,
    ) -> StrategyStream:
        """Answers a prompt by a strategy, or by its specification (`moejet.reasoning.specs`), beside other requests.

        `await llm.solve(...).result()`, or iterate over its progress. Arguments as of `moejet.reasoning.solve`.
        At most 16 run at once; more are refused with QueueFullError.
        request_id: by which `abort` and `end_thinking` find it · messages: of which a prompt of token ids was made ·
        render: makes text and tokens of conversations with which a strategy goes on, in place of the chat template
        """
        from moejet.reasoning.async_runs import AsyncRuns, StrategyStream, Wanted

        require_text("request_id", request_id, or_none=True)
        with self._runs_lock:
            if self._runs is None:
                self._runs = AsyncRuns(self._thread)
        wanted = Wanted(
            prompt, strategy, params, budget, seed, answers, template_kwargs, messages, render
        )
        return StrategyStream(self._runs, wanted, request_id)

    async def checked_strategy(
        self,
        spec: str | Mapping[str, Any],
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_samples: int | None = None,
    ) -> Strategy:
        """The strategy of a specification, for a prompt that can be answered by it. Raises ValueError.

        max_samples: that it may ask for
        """
        from moejet.reasoning.specs import parse_strategy

        def check() -> Strategy:
            strategy = parse_strategy(spec, self._llm, max_samples=max_samples)
            self._thread.engine.rules.check_prompt(list(token_ids), params)
            return strategy

        self._thread.check_process()
        return await asyncio.get_running_loop().run_in_executor(self._workers, check)

    def progress(self, request_id: str) -> tuple[int, int, int] | None:
        """(tokens of the prompt in the cache so far, all of them, those that were there before).

        None if there is no such request, or it waits.
        """
        require_text("request_id", request_id)
        return self._thread.engine.progress(request_id)

    async def abort(self, request_id: str) -> bool:
        """Ends a request within one step: its stream gets a last delta with finish_reason "abort".

        A strategy ends with the best of what it has. Returns when it has ended; False if there is none of that id.
        """
        require_text("request_id", request_id)
        self._thread.check_process()
        ticket = self._thread.find(request_id)
        if ticket is None:
            if self._runs is None or (run := self._runs.find(request_id)) is None:
                return False
            self._runs.abort(run)
            await asyncio.shield(asyncio.wrap_future(run.ended))
            return True
        self._thread.abort(ticket)
        await asyncio.shield(asyncio.wrap_future(ticket.ended))
        return True

    async def end_thinking(self, request_id: str) -> bool:
        """Makes a request answer now: with the next step its samples end their thinking, as if its budget were spent.

        So do all branches of a strategy, which begins no further ones. False if there is no request of that id, or none
        of its samples thinks.
        """
        require_text("request_id", request_id)
        self._thread.check_process()
        ticket = self._thread.find(request_id)
        if ticket is None:
            if self._runs is None or (run := self._runs.find(request_id)) is None:
                return False
            self._runs.end_thinking(run)
            return True
        return await asyncio.wrap_future(self._thread.end_thinking(ticket))

    @property
    def is_healthy(self) -> bool:
        """Whether the engine works and its present step is not late."""
        self._thread.check_process()
        return self._thread.is_healthy()

    def health(self) -> dict[str, Any]:
        """Numbers of this moment.

        `alive`, `state` (running, draining, closed, dead or stuck), the `error` that killed it, the age and duration of
        steps, samples `running` and `waiting` in the engine, queue sizes and their limits, cache blocks, and tokens per
        second over about the last 20 s; `memory_bytes_per_s` and the `bandwidth_fraction` of it with which weights were
        read while decoding, None where that is not known.
        """
        return self._thread.health()

    def counters(self) -> dict[str, Any]:
        """Totals since the start, for a metrics endpoint.

        Tokens, steps, requests, preemptions, errors, and a histogram of the seconds between arrival and first step,
        with cumulative buckets as in Prometheus.
        """
        return self._thread.totals()

    async def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Refuses new requests, finishes what runs (drain) for at most timeout_s, aborts the rest, ends the threads.

        Calling it again waits for the same end, or hastens it with drain=False.
        """
        if not self._thread.is_own_process():
            return
        self._thread.refuse_new()
        await asyncio.to_thread(self._thread.close, drain=drain, timeout_s=timeout_s)
        self._workers.shutdown(wait=False)
        if self._runs is not None:
            self._runs.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        await self.close(drain=kind is None)

    def _stream(
        self,
        prepare: Callable[[], tuple[str | None, list[int]]],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
    ) -> RequestStream:
        params = self.default_sampling() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, not {type(params).__name__}")
        return self._request(prepare, params, request_id, priority)

    def _request(
        self,
        prepare: Callable[[], tuple[str | None, list[int]]],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        num_top: int = 0,
    ) -> RequestStream:
        _check_request(request_id, priority)
        return RequestStream(
            self._thread,
            self._workers,
            prepare,
            params,
            request_id=request_id,
            priority=priority,
            owner=self,
            num_top=num_top,
        )


def _check_request(request_id: Any, priority: Any) -> None:
    require_text("request_id", request_id, or_none=True)
    if request_id is not None and request_id.startswith(BRANCH_ID):
        raise ValueError(f"request_id={request_id!r} is for branches of strategies: choose another")
    require_int("priority", priority, hint="smaller ones run first")
