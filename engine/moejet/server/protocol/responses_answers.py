"""Answers of /v1/responses, whole and in typed events."""

from __future__ import annotations

import uuid
from typing import Any

from moejet.server.errors import ApiError
from moejet.server.generation import ChoiceEnd, Piece, Progress, StrategyStep, Totals
from moejet.server.protocol.answers import Answer
from moejet.server.protocol.common import (
    chat_logprobs,
)
from moejet.server.protocol.responses import ResponsesPlan, ResponsesRequest
from moejet.server.protocol.strategies import candidate_list, step_note, strategy_note
from moejet.server.sse import KEEP_ALIVE, event
from moejet.server.strategies import engine_usage
from moejet.server.tool_calls import (
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from moejet.tokenizer import Tokenizer


class ResponsesRenderer:
    """Typed, numbered events; every item of the output is begun, filled and ended."""

    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        prepared: ResponsesPlan,
        request: ResponsesRequest,
        *,
        model: str,
        tokenizer: Tokenizer | None,
    ):
        self._plan = prepared.plan
        self._effort = prepared.effort
        self._request = request
        self._model = model
        self._tokenizer = tokenizer
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None  # the one that is being filled
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._end: ChoiceEnd | None = None

    def begin(self) -> list[bytes]:
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def event(self, event: Piece | ChoiceEnd | Progress | StrategyStep) -> list[bytes]:
        if isinstance(event, StrategyStep):
            options = self._request.stream_options
            if options is None or not options.include_progress:
                return [KEEP_ALIVE]
            return [self._event("response.moejet.progress", **step_note(self._plan, event))]
        if isinstance(event, Progress):
            return []
        if isinstance(event, ChoiceEnd):
            self._end = event
            return self._close("incomplete" if event.finish_reason != "stop" else "completed")
        match event.event:
            case ReasoningDelta(text):
                opened = self._open("reasoning")
                self._text.append(text)
                return [*opened, self._part_event("response.reasoning_text.delta", delta=text)]
            case ContentDelta(text):
                opened = self._open("message")
                self._text.append(text)
                found = self._found_logprobs(event)
                return [
                    *opened,
                    self._part_event("response.output_text.delta", delta=text, logprobs=found),
                ]
            case ToolCallStart(_, id, name):
                return [*self._close(), *self._open("function_call", call_id=id, name=name)]
            case ToolCallArguments(_, fragment):
                self._text.append(fragment)
                return [self._item_event("response.function_call_arguments.delta", delta=fragment)]
        return self._close()

    def end(self, totals: Totals) -> list[bytes]:
        assert self._end is not None, "the choice has ended"
        status = _status(self._end.finish_reason)
        response = self._response(status, totals)
        kind = "completed" if status == "completed" else "incomplete"
        return [self._event(f"response.{kind}", response=response)]

    def failure(self, error: ApiError) -> list[bytes]:
        response = self._response("failed")
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return [self._event("response.failed", response=response)]

    def body(self, answers: list[Answer], totals: Totals) -> dict[str, Any]:
        answer = answers[0]
        status = "completed" if answer.finish_reason == "stop" else "incomplete"
        if answer.reasoning:
            self._open("reasoning")
            self._text = answer.reasoning
        if answer.content:
            self._close()
            self._open("message")
            self._text = answer.content
            if self._plan.jobs[0].params.logprobs is not None:
                self._logprobs = chat_logprobs(self._tokenizer, tuple(answer.logprobs))
        for call in answer.calls:
            self._close()
            self._open("function_call", call_id=call.id, name=call.name)
            self._text = [call.arguments]
        self._close(status)
        return self._response(_status(answer.finish_reason), totals)

    def _open(self, kind: str, **fields: str) -> list[bytes]:
        """Begins an item of another kind, if that is not open."""
        if self._item is not None and self._item["type"] == kind and kind != "function_call":
            return []
        closed = self._close()
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind}
        if kind == "reasoning":
            item |= {"summary": [], "content": []}
        elif kind == "message":
            item |= {"role": "assistant", "content": []}
        else:
            item |= {**fields, "arguments": ""}
        self._item = {**item, "status": "in_progress"}
        self._text, self._logprobs = [], []
        events = [
            *closed,
            self._event(
                "response.output_item.added", output_index=len(self._output), item=self._item
            ),
        ]
        if kind != "function_call":
            events.append(self._part_event("response.content_part.added", part=self._part("")))
        return events

    def _close(self, status: str = "completed") -> list[bytes]:
        if self._item is None:
            return []
        text, kind = "".join(self._text), self._item["type"]
        if kind == "function_call":
            events = [
                self._item_event(
                    "response.function_call_arguments.done", arguments=text, name=self._item["name"]
                )
            ]
            filled: dict[str, Any] = {"arguments": text}
        else:
            part = self._part(text)
            is_message = kind == "message"
            name = "output_text" if is_message else "reasoning_text"
            more: dict[str, Any] = {"logprobs": self._logprobs} if is_message else {}
            events = [
                self._part_event(f"response.{name}.done", text=text, **more),
                self._part_event("response.content_part.done", part=part),
            ]
            filled = {"content": [part]}
        done = {**self._item, **filled, "status": status}
        events.append(
            self._event("response.output_item.done", output_index=len(self._output), item=done)
        )
        self._output.append(done)
        self._item = None
        return events

    def _part(self, text: str) -> dict[str, Any]:
        assert self._item is not None, "an item is open"
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _found_logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        found = chat_logprobs(self._tokenizer, piece.tokens.logprobs)
        self._logprobs += found
        return found

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event(data, kind)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._item is not None, "an item is open"
        place = {"item_id": self._item["id"], "output_index": len(self._output)}
        return self._event(kind, **place, **fields)

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _response(self, status: str, totals: Totals | None = None) -> dict[str, Any]:
        request, job = self._request, self._plan.jobs[0]
        limit = {"reason": "max_output_tokens"} if status == "incomplete" else None
        told: dict[str, Any] = {}
        if totals is not None and (outcome := totals.outcome) is not None:
            told["reasoning_strategy"] = strategy_note(self._plan, outcome)
            if self._plan.returns_candidates:
                told["reasoning_candidates"] = candidate_list(self._plan, outcome)
        return {
            "id": self._plan.request_id,
            "object": "response",
            "created_at": self._plan.created,
            "status": status,
            "error": None,
            "incomplete_details": limit,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self._model,
            "output": list(self._output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self._effort, "summary": None},
            "store": False,
            "temperature": job.params.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": job.params.top_p,
            "truncation": "disabled",
            **told,
            "usage": _usage(totals) if totals is not None else None,
            "metadata": (request.model_extra or {}).get("metadata") or {},
        }


def _status(finish_reason: str) -> str:
    return {"stop": "completed", "length": "incomplete"}.get(finish_reason, "cancelled")


def _usage(totals: Totals) -> dict[str, Any]:
    engine = {} if totals.outcome is None else {"engine": engine_usage(totals.outcome)}
    return {
        "input_tokens": totals.prompt_tokens,
        "input_tokens_details": {"cached_tokens": totals.cached_tokens},
        "output_tokens": totals.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": totals.reasoning_tokens},
        "total_tokens": totals.prompt_tokens + totals.completion_tokens,
        **engine,
    }
