"""POST /v1/responses: OpenAI's Responses, without a memory: what it would have to remember for a client is refused."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from moejet.request import MAX_LOGPROBS
from moejet.server.errors import ApiError, wrong
from moejet.server.generation import ChoiceEnd, Piece, Plan, Progress, Totals
from moejet.server.protocol.answers import Answer
from moejet.server.protocol.chat import answer_grammar, conversation_plan
from moejet.server.protocol.common import (
    HARMLESS,
    ApiModel,
    Context,
    SamplingFields,
    StreamOptions,
    anything,
    chat_logprobs,
    one_of,
    response_grammar,
    sampling_params,
)
from moejet.server.reasoning_controls import REASONING_FIELDS, normalise_reasoning
from moejet.server.short import short
from moejet.server.sse import KEEP_ALIVE, event
from moejet.server.tool_calls import (
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    parse_tool_choice,
    parse_tools,
)
from moejet.tokenizer import Tokenizer

_HARMLESS = {
    **HARMLESS,
    "background": one_of(False),
    "truncation": one_of("disabled"),
    "max_tool_calls": anything,  # of tools that a server runs itself, and this one runs none
    "include": lambda value: isinstance(value, list),
}
_REMEMBERED = {
    "previous_response_id": "send the whole conversation in input",
    "conversation": "send the whole conversation in input",
    "prompt": "send its text in instructions",
}


class ResponsesRequest(ApiModel):
    """A conversation to be continued."""

    harmless = _HARMLESS
    passed_on = frozenset((*REASONING_FIELDS, *_REMEMBERED))

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class ResponsesPlan:
    plan: Plan
    effort: str | None


def responses_plan(request: ResponsesRequest, context: Context, request_id: str) -> ResponsesPlan:
    """Blocks for as long as tokenising takes."""
    context.check_model(request.model)
    extra = request.model_extra or {}
    for name, remedy in _REMEMBERED.items():
        if extra.get(name) is not None:
            raise wrong(
                f"{name}={short(extra[name])}: this server keeps no conversations; {remedy}",
                name,
                "unsupported_field",
            )
    tools = parse_tools(request.tools)
    choice = parse_tool_choice(request.tool_choice, tools, parallel=request.parallel_tool_calls)
    controls = normalise_reasoning(
        {k: v for k, v in extra.items() if k in REASONING_FIELDS}, context.tokenizer
    )
    grammar = answer_grammar(context, tools, choice, _text_grammar(request.text))
    params = sampling_params(
        SamplingFields(temperature=request.temperature, top_p=request.top_p),
        context,
        max_tokens=request.max_output_tokens,
        max_tokens_field="max_output_tokens",
        logprobs=_num_logprobs(request, extra.get("include") or []),
        grammar=grammar,
        max_thinking_tokens=controls.max_thinking_tokens,
    )
    plan = conversation_plan(
        context,
        _turns(request),
        request_id=request_id,
        dialect="responses",
        controls=controls,
        tools=tools,
        choice=choice,
        params=params,
    )
    return ResponsesPlan(plan, controls.effort)


def _text_grammar(text: dict[str, Any] | None) -> Any:
    for name, value in (text or {}).items():
        if name not in ("format", "verbosity") or (
            name == "verbosity" and value not in (None, "medium")
        ):
            raise wrong(f"text.{name[:80]}={short(value)} is not supported: leave it out", "text")
    format = (text or {}).get("format")
    if format is not None and not isinstance(format, dict):
        raise wrong(f"text.format={short(format)} must be an object", "text.format")
    return response_grammar(format, "text.format")


def _num_logprobs(request: ResponsesRequest, include: list[Any]) -> int | None:
    count = request.top_logprobs
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise wrong(f"top_logprobs={count} must be between 0 and {MAX_LOGPROBS}", "top_logprobs")
    return (count or 0) if "message.output_text.logprobs" in include or count else None


def _turns(request: ResponsesRequest) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if request.instructions:
        turns.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        if not request.input:
            raise wrong("input is empty: it needs a text", "input")
        return [*turns, {"role": "user", "content": request.input}]
    if not request.input:
        raise wrong("input is empty: it needs at least one item", "input")
    calls: set[str] = set()
    for i, item in enumerate(request.input):
        _add_item(turns, item, f"input[{i}]", calls)
    return turns


def _add_item(
    turns: list[dict[str, Any]], item: dict[str, Any], where: str, calls: set[str]
) -> None:
    """An answer is several items here and one turn in a template."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        text = _text(item.get("content"), f"{where}.content")
        if role == "assistant":
            turn = _assistant(turns)
            turn["content"] = f"{turn['content']}\n{text}" if turn["content"] else text
        elif role in ("user", "system", "developer"):
            turns.append({"role": "system" if role == "developer" else role, "content": text})
        else:
            raise wrong(
                f"{where}.role={short(role)} must be 'user', 'assistant', 'system' or 'developer'",
                f"{where}.role",
            )
    elif kind == "reasoning":
        _assistant(turns)["reasoning_content"] = _text(
            item.get("content") or item.get("summary") or "", f"{where}.content"
        )
    elif kind == "function_call":
        arguments = _string(item, "arguments", where) or "{}"
        if not _is_object(arguments):
            raise wrong(
                f"{where}.arguments must be the text of a JSON object", f"{where}.arguments"
            )
        function = {"name": _string(item, "name", where), "arguments": arguments}
        call_id = _string(item, "call_id", where)
        calls.add(call_id)
        turn = _assistant(turns)
        call = {"id": call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        call_id = _string(item, "call_id", where)
        if call_id not in calls:
            raise wrong(
                f"{where}.call_id={short(call_id)} answers no earlier function_call",
                f"{where}.call_id",
            )
        text = _text(item.get("output"), f"{where}.output")
        turns.append({"role": "tool", "tool_call_id": call_id, "content": text})
    else:
        raise wrong(f"{where}.type={short(kind)} is not supported here", f"{where}.type")


def _assistant(turns: list[dict[str, Any]]) -> dict[str, Any]:
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"{where}={short(content)} must be a text or a list of parts", where)
    kinds = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
    texts = []
    for j, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds:
            kind = part.get("type") if isinstance(part, dict) else part
            raise wrong(
                f"{where}[{j}].type={short(kind)} is not supported: this model reads text only",
                f"{where}[{j}].type",
            )
        texts.append(_string(part, "text", f"{where}[{j}]"))
    return "\n".join(texts)


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise wrong(f"{where}.{name}={short(value)} must be a string", f"{where}.{name}")
    return value


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


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

    def event(self, event: Piece | ChoiceEnd | Progress) -> list[bytes]:
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
            "usage": _usage(totals) if totals is not None else None,
            "metadata": (request.model_extra or {}).get("metadata") or {},
        }


def _status(finish_reason: str) -> str:
    return {"stop": "completed", "length": "incomplete"}.get(finish_reason, "cancelled")


def _usage(totals: Totals) -> dict[str, Any]:
    return {
        "input_tokens": totals.prompt_tokens,
        "input_tokens_details": {"cached_tokens": totals.cached_tokens},
        "output_tokens": totals.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": totals.reasoning_tokens},
        "total_tokens": totals.prompt_tokens + totals.completion_tokens,
    }
