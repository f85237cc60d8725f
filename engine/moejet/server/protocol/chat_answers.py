"""Answers of /v1/chat/completions, whole and in chunks."""

from __future__ import annotations

from typing import Any

from moejet.server.config import ReasoningField
from moejet.server.errors import ApiError
from moejet.server.generation import ChoiceEnd, Piece, Plan, Progress, StrategyStep, Tokens, Totals
from moejet.server.protocol.answers import Answer
from moejet.server.protocol.chat import ChatRequest
from moejet.server.protocol.common import (
    chat_logprobs,
    progress,
    timings,
    usage,
)
from moejet.server.protocol.strategies import candidate_list, step_note, strategy_note
from moejet.server.sse import DONE, KEEP_ALIVE
from moejet.server.sse import event as _event
from moejet.server.strategies import Outcome
from moejet.server.tool_calls import (
    ContentDelta,
    OutputEvent,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from moejet.tokenizer import Tokenizer


def finish_reason(reason: str, num_calls: int) -> str:
    return "tool_calls" if reason == "stop" and num_calls else reason


class ChatRenderer:
    """OpenAI's chunks: the role first, then text, then the finish reason, then usage if it was asked for."""

    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        plan: Plan,
        request: ChatRequest,
        *,
        model: str,
        tokenizer: Tokenizer | None,
        reasoning_field: ReasoningField,
    ):
        self._plan = plan
        self._model = model
        self._tokenizer = tokenizer
        self._n = plan.jobs[0].params.n
        self._wants_logprobs = plan.jobs[0].params.logprobs is not None
        options = request.stream_options
        self._wants_usage = bool(options and options.include_usage)
        self._wants_steps = bool(options and options.include_progress)
        both = ("reasoning_content", "reasoning")
        self._reasoning_keys = both if reasoning_field == "both" else (reasoning_field,)

    def begin(self) -> list[bytes]:
        role = {"role": "assistant", "content": ""}
        return [self._chunk(i, dict(role)) for i in range(self._n)]

    def event(self, event: Piece | ChoiceEnd | Progress | StrategyStep) -> list[bytes]:
        if isinstance(event, StrategyStep):
            if not self._wants_steps:
                return [KEEP_ALIVE]
            choice = {"index": 0, "delta": {}, "finish_reason": None}
            note = step_note(self._plan, event)
            return [_event({**self._head(), "choices": [choice], "moejet": note})]
        if isinstance(event, Progress):
            return [_event({**self._head(), "choices": [], **progress(event)})]
        if isinstance(event, ChoiceEnd):
            reason = finish_reason(event.finish_reason, event.num_calls)
            delta, more = self._told(event.outcome)
            return [
                self._chunk(
                    event.choice,
                    delta,
                    event.tokens,
                    reason,
                    stop_reason=event.stop_reason,
                    **more,
                )
            ]
        delta = self._delta(event.event)
        return [self._chunk(event.choice, delta, event.tokens)] if delta else []

    def end(self, totals: Totals) -> list[bytes]:
        last = {**self._head(), "choices": [], "timings": timings(totals)}
        if self._wants_usage:
            return [_event({**last, "usage": usage(totals)}), DONE]
        return [DONE]

    def failure(self, error: ApiError) -> list[bytes]:
        return [_event(error.body("openai")), DONE]

    def body(self, answers: list[Answer], totals: Totals) -> dict[str, Any]:
        head = {**self._head(), "object": "chat.completion"}
        return {
            **head,
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage(totals),
            "timings": timings(totals),
        }

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._plan.request_id,
            "object": "chat.completion.chunk",
            "created": self._plan.created,
            "model": self._model,
        }

    def _delta(self, event: OutputEvent) -> dict[str, Any]:
        match event:
            case ReasoningDelta(text):
                return dict.fromkeys(self._reasoning_keys, text)
            case ContentDelta(text):
                return {"content": text}
            case ToolCallStart(index, id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case ToolCallArguments(index, fragment):
                return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}
        return {}

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        tokens: Tokens | None = None,
        reason: str | None = None,
        stop_reason: str | int | None = None,
        **more: Any,
    ) -> bytes:
        entry: dict[str, Any] = {"index": choice, "delta": delta, "finish_reason": reason, **more}
        if stop_reason is not None:
            entry["stop_reason"] = stop_reason
        if self._wants_logprobs:
            found = chat_logprobs(self._tokenizer, tokens.logprobs) if tokens else []
            entry["logprobs"] = {"content": found, "refusal": None} if found else None
        return _event({**self._head(), "choices": [entry]})

    def _told(self, outcome: Outcome | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of a strategy: fields of the message, and of the choice."""
        if outcome is None:
            return {}, {}
        candidates = candidate_list(self._plan, outcome) if self._plan.returns_candidates else None
        more = {} if candidates is None else {"reasoning_candidates": candidates}
        return {"reasoning_strategy": strategy_note(self._plan, outcome)}, more

    def _choice(self, answer: Answer) -> dict[str, Any]:
        told, more = self._told(answer.outcome)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(answer.content)
            or (None if answer.calls or answer.reasoning else ""),
            "refusal": None,
            **told,
        }
        if answer.reasoning:
            message |= dict.fromkeys(self._reasoning_keys, "".join(answer.reasoning))
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        logprobs = None
        if self._wants_logprobs:
            found = chat_logprobs(self._tokenizer, tuple(answer.logprobs))
            logprobs = {"content": found, "refusal": None}
        return {
            "index": answer.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason(answer.finish_reason, len(answer.calls)),
            "stop_reason": answer.stop_reason,
            **more,
        }
