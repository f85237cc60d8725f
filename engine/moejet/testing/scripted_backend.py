"""A backend that answers what it was told to, token by token, for tests of the server without a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from moejet.output import OutputAssembler
from moejet.reasoning.result import Progress
from moejet.request import (
    CompletionOutput,
    FinishReason,
    RequestOutput,
    SamplingParams,
    StreamDelta,
    Timings,
    TokenLogprobs,
)
from moejet.server.backend import Job, ModelCard
from moejet.server.strategies import Outcome, SolveJob
from moejet.thinking import prompt_opens_thinking
from moejet.tokenizer import Tokenizer


class ScriptedStream:
    """One answer of n equal samples. After it has been closed nothing comes any more."""

    def __init__(self, backend: ScriptedBackend, job: Job, text: str):
        self._backend = backend
        self._deltas = backend.deltas_of(job, text)
        self._due_s = time.monotonic() + backend.delay_s
        self.is_closed = False

    async def get(self, timeout_s: float | None = None) -> StreamDelta | None:
        if self._backend.error is not None and len(self._deltas) <= self._backend.error_at:
            raise self._backend.error
        left_s = self._due_s - time.monotonic()
        if timeout_s is not None and timeout_s < left_s:
            await asyncio.sleep(timeout_s)
            raise TimeoutError
        await asyncio.sleep(max(0.0, left_s))
        self._due_s = time.monotonic() + self._backend.delay_s
        if not self._deltas:
            self.is_closed = True
            return None
        self._backend.num_read += 1
        return self._deltas.pop(0)

    def close(self) -> None:
        self.is_closed = True


class ScriptedRun:
    """One strategy; error: raised in place of the first event that is missing."""

    def __init__(self, backend: ScriptedBackend, job: SolveJob):
        self.job = job
        self._backend = backend
        self._events = list(backend.events)
        self.is_closed = False

    async def get(self) -> Progress | Outcome:
        await asyncio.sleep(self._backend.delay_s)
        if self._events:
            return self._events.pop(0)
        raise self._backend.error or ValueError("this strategy has ended")

    def close(self) -> None:
        self.is_closed = True


class ScriptedBackend:
    """Answers the texts in turn, the last one again and again.

    tokens_per_delta: how many come at once · delay_s: before each delta · error: raised when error_at deltas are left,
    or by `start` with refuses=True · events: of every strategy, an outcome at last
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        *,
        tokens_per_delta: int = 1,
        delay_s: float = 0.0,
        error: Exception | None = None,
        error_at: int = 1,
        refuses: bool = False,
        events: Sequence[Progress | Outcome] = (),
    ):
        self.card = ModelCard(
            "scripted", 1 << 16, tokenizer.vocab_size, SamplingParams(), tokenizer
        )
        self.delay_s = delay_s
        self.error = error
        self.error_at = error_at
        self.jobs: list[Job] = []
        self.streams: list[ScriptedStream] = []
        self.num_read = 0
        self._texts = list(texts)
        self._tokens_per_delta = tokens_per_delta
        self._refuses = refuses
        self.events = list(events)
        self.runs: list[ScriptedRun] = []

    async def start(self, job: Job) -> ScriptedStream:
        if self._refuses and self.error is not None:
            raise self.error
        text = self._texts[min(len(self.jobs), len(self._texts) - 1)]
        self.jobs.append(job)
        stream = ScriptedStream(self, job, text)
        self.streams.append(stream)
        return stream

    def deltas_of(self, job: Job, text: str) -> list[StreamDelta]:
        samples = [self._sample(job, text, i) for i in range(job.params.n)]
        outputs = tuple(output for _, output in samples)
        num_tokens = sum(len(output.token_ids) for output in outputs)
        timings = Timings(len(job.token_ids), num_tokens, 0.0, 0.01, 0.1)
        whole = RequestOutput(job.request_id, job.prompt, tuple(job.token_ids), outputs, timings)
        deltas = [delta for parts in zip(*(d for d, _ in samples), strict=True) for delta in parts]
        last = deltas[-1]
        fields = {name: getattr(last, name) for name in StreamDelta.__slots__}
        return [*deltas[:-1], StreamDelta(**{**fields, "output": whole})]

    def _sample(
        self, job: Job, text: str, index: int
    ) -> tuple[list[StreamDelta], CompletionOutput]:
        tokenizer = self.card.tokenizer
        assert tokenizer is not None, "it was given one"
        tags = tokenizer.think_tags
        is_open = tags is not None and prompt_opens_thinking(job.prompt or "", *tags)
        assembler = OutputAssembler(tokenizer, job.params, think_tags=tags, thinking=is_open)
        limit = job.params.max_tokens
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        reason: FinishReason = "length" if limit is not None and limit < len(token_ids) else "stop"
        token_ids = token_ids[:limit]
        step, deltas = self._tokens_per_delta, []
        for begin in range(0, max(1, len(token_ids)), step):
            ids = token_ids[begin : begin + step]
            pieces = [assembler.push(i) for i in ids]
            is_last = begin + step >= len(token_ids)
            if is_last:
                pieces.append(assembler.flush())
            deltas.append(
                StreamDelta(
                    job.request_id,
                    index,
                    text=assembler.take_text(),
                    reasoning="".join(p[0] for p in pieces),
                    content="".join(p[1] for p in pieces),
                    token_ids=tuple(ids),
                    finish_reason=reason if is_last else None,
                    tool_markers=assembler.take_markers(),
                )
            )
        output = CompletionOutput(
            index,
            assembler.text,
            assembler.reasoning,
            assembler.content,
            tuple(token_ids),
            reason,
            num_reasoning_tokens=assembler.num_reasoning_tokens,
        )
        return deltas, output

    async def solve(self, job: SolveJob) -> ScriptedRun:
        if self._refuses and self.error is not None:
            raise self.error
        self.runs.append(ScriptedRun(self, job))
        return self.runs[-1]

    async def score(self, token_ids: list[int], num_top: int = 0) -> list[TokenLogprobs]:
        return [TokenLogprobs(token_id, -1.0) for token_id in token_ids[1:]]

    def progress(self, request_id: str) -> tuple[int, int, int] | None:
        return None

    async def end_thinking(self, request_id: str) -> bool:
        return any(job.request_id == request_id for job in self.jobs)

    async def abort(self, request_id: str) -> bool:
        for job, stream in zip(self.jobs, self.streams, strict=True):
            if job.request_id == request_id and not stream.is_closed:
                stream.close()
                return True
        return False

    def health(self) -> dict[str, Any]:
        return {"alive": True, "state": "running"}

    def counters(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        pass
