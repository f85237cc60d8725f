"""The n samples of one prompt and what they report: deltas while they run, outputs when they end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moejet.commit import Gained
from moejet.output import OutputAssembler
from moejet.request import (
    CompletionOutput,
    Request,
    RequestOutput,
    StreamDelta,
    Timings,
    TokenLogprobs,
)


@dataclass(slots=True)
class Group:
    """Samples with their text so far. `outputs` fills up as they end.

    has_forked: the samples after the first have begun, which they do when the prompt has been computed
    """

    prompt: str | None
    samples: list[Request]
    assemblers: list[OutputAssembler]
    has_forked: bool = False
    outputs: dict[int, CompletionOutput] = field(default_factory=dict)

    def members(self) -> Iterator[tuple[Request, OutputAssembler]]:
        return zip(self.samples, self.assemblers, strict=True)

    @property
    def has_ended(self) -> bool:
        return len(self.outputs) == len(self.samples)

    def delta(self, request: Request, gained: Gained) -> StreamDelta:
        """What a sample that goes on has gained."""
        return StreamDelta(
            request.request_id,
            request.index,
            text=self.assemblers[request.index].take_text(),
            reasoning=gained.reasoning,
            content=gained.content,
            token_ids=tuple(gained.token_ids),
            tool_markers=self.assemblers[request.index].take_markers(),
            logprobs=_logprobs(request, gained),
        )

    def close(self, request: Request, gained: Gained) -> StreamDelta:
        """Builds the output of a sample that has ended and, if it is the last one, the request's."""
        assembler = self.assemblers[request.index]
        assert request.finish_reason is not None, f"{request.request_id=}"
        wants = request.params.logprobs is not None
        state = request.sample_state
        statistics = state.statistics if state is not None else None
        self.outputs[request.index] = CompletionOutput(
            index=request.index,
            text=assembler.text,
            reasoning=assembler.reasoning,
            content=assembler.content,
            token_ids=tuple(request.output_token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=tuple(request.logprobs) if wants else None,
            cumulative_logprob=request.cumulative_logprob if wants else None,
            statistics=statistics.copy() if statistics and request.params.statistics else None,
            num_reasoning_tokens=assembler.num_reasoning_tokens,
        )
        return StreamDelta(
            request.request_id,
            request.index,
            text=assembler.take_text(),
            reasoning=gained.reasoning,
            content=gained.content,
            token_ids=tuple(gained.token_ids),
            finish_reason=request.finish_reason,
            output=self._output() if self.has_ended else None,
            tool_markers=assembler.take_markers(),
            logprobs=_logprobs(request, gained),
            stop_reason=request.stop_reason,
        )

    def close_broken(self, request: Request, error: Exception) -> StreamDelta:
        """The end of a request whose text cannot be built: its outputs have the tokens only."""
        for sample in self.samples:
            output = CompletionOutput(
                index=sample.index,
                text="",
                reasoning=None,
                content="",
                token_ids=tuple(sample.output_token_ids),
                finish_reason="abort",
            )
            self.outputs.setdefault(sample.index, output)
        return StreamDelta(
            request.request_id,
            request.index,
            text="",
            reasoning="",
            content="",
            token_ids=(),
            finish_reason="abort",
            output=self._output(),
            error=error,
        )

    def _output(self) -> RequestOutput:
        first = self.samples[0]
        end = max(r.finished_s for r in self.samples)
        scheduled = min(
            (r.first_scheduled_s for r in self.samples if r.first_scheduled_s), default=end
        )
        first_token = min((r.first_token_s for r in self.samples if r.first_token_s), default=end)
        is_scored = first.scores is not None and first.finish_reason == "length"
        return RequestOutput(
            request_id=first.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=tuple(self.outputs[i] for i in range(len(self.samples))),
            timings=Timings(
                prompt_tokens=first.num_prompt_tokens,
                completion_tokens=sum(len(r.output_token_ids) for r in self.samples),
                queue_s=scheduled - first.arrival_s,
                prefill_s=first_token - scheduled,
                decode_s=end - first_token,
                cached_tokens=first.num_cached_tokens,
            ),
            prompt_logprobs=tuple(first.scores or ()) if is_scored else None,
            prompt_top=tuple(first.top) if is_scored and first.num_top else None,
        )


def _logprobs(request: Request, gained: Gained) -> tuple[TokenLogprobs, ...]:
    if request.params.logprobs is None or not gained.token_ids:
        return ()
    return tuple(request.logprobs[-len(gained.token_ids) :])
