"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect.

Its content blocks become turns of a conversation as chat templates know them: tool results come before the text of the
turn that they stand in, and thinking goes back where the template puts it. Signatures are not checked.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moejet.server.errors import ApiError, wrong
from moejet.server.generation import ChoiceEnd, Piece, Plan, Progress, StrategyStep, Totals
from moejet.server.protocol.answers import Answer
from moejet.server.protocol.chat import answer_grammar, conversation_plan
from moejet.server.protocol.common import Context, response_grammar, sampling_params, string_field
from moejet.server.protocol.fields import (
    ApiModel,
    Count,
    Salt,
    SamplingFields,
    Temperature,
    TopK,
    TopP,
    anything,
    one_of,
)
from moejet.server.reasoning_controls import REASONING_FIELDS, normalise_reasoning
from moejet.server.sse import event
from moejet.server.tool_calls import (
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    parse_tool_choice,
    parse_tools,
)
from moejet.validation import short

_SIGNATURE = "moejet"  # clients drop thinking without one


def _keeps_all(value: Any) -> bool:
    """Whether a context_management changes nothing."""
    edits = value.get("edits", []) if isinstance(value, dict) else None
    return isinstance(edits, list) and all(
        isinstance(edit, dict) and edit.get("keep") == "all" for edit in edits
    )


_HARMLESS = {
    "metadata": anything,
    "service_tier": anything,
    "cache_control": anything,
    "inference_geo": anything,
    "container": one_of(),
    "mcp_servers": one_of([]),
    "context_management": _keeps_all,
    "speed": one_of("standard"),
    "diagnostics": anything,
    "user_profile_id": anything,
    "workspace_id": anything,
    "cache_salt": anything,  # where tokens are only counted
}


class Turn(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountTokensRequest(ApiModel):
    """A conversation whose tokens are to be counted."""

    harmless = _HARMLESS
    passed_on = frozenset(REASONING_FIELDS)

    model: str | None = None
    messages: list[Turn]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """A conversation to be continued."""

    max_tokens: Count
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    cache_salt: Salt | None = None


def messages_plan(request: MessagesRequest, context: Context, request_id: str) -> Plan:
    """Blocks for as long as tokenising takes."""
    format = (request.model_extra or {}).get("output_config")
    wanted = format.get("format") if isinstance(format, dict) else None
    if wanted is not None and not isinstance(wanted, dict):
        raise wrong(f"output_config.format={short(wanted)} must be an object", "output_config")
    for i, text in enumerate(request.stop_sequences or ()):
        if not text or i >= context.config.max_stop:
            limit = f"at most {context.config.max_stop} texts that are not empty"
            raise wrong(f"stop_sequences[{i}]={short(text)}: send {limit}", "stop_sequences")
    return _plan(
        request,
        context,
        request_id,
        fields=SamplingFields(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop=request.stop_sequences,
            cache_salt=request.cache_salt,
        ),
        max_tokens=request.max_tokens,
        wanted=response_grammar(wanted, "output_config.format"),
    )


def count_tokens(request: CountTokensRequest, context: Context) -> dict[str, Any]:
    plan = _plan(request, context, "count", fields=SamplingFields(), max_tokens=None, wanted=None)
    return {"input_tokens": plan.num_prompt_tokens}


def _plan(
    request: CountTokensRequest,
    context: Context,
    request_id: str,
    *,
    fields: SamplingFields,
    max_tokens: int | None,
    wanted: Any,
) -> Plan:
    context.check_model(request.model)
    turns = _turns(request)
    tools = parse_tools(request.tools)
    choice = parse_tool_choice(request.tool_choice, tools)
    extra = {k: v for k, v in (request.model_extra or {}).items() if k in REASONING_FIELDS}
    controls = normalise_reasoning(extra, context.tokenizer, effort_budgets=context.effort_budgets)
    params = sampling_params(
        fields,
        context,
        max_tokens=max_tokens,
        logprobs=None,
        grammar=answer_grammar(context, tools, choice, wanted),
        max_thinking_tokens=controls.max_thinking_tokens,
    )
    return conversation_plan(
        context,
        turns,
        request_id=request_id,
        dialect="messages",
        controls=controls,
        tools=tools,
        choice=choice,
        params=params,
    )


def _turns(request: CountTokensRequest) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if request.system:
        turns.append({"role": "system", "content": _text(request.system, "system")})
    if not request.messages:
        raise wrong("messages is empty: it needs at least one message", "messages")
    if request.messages[-1].role == "assistant":
        raise wrong(
            "messages ends with the assistant's turn, and beginning an answer is not supported: let "
            "the user speak last",
            "messages",
        )
    known_calls: set[str] = set()
    for i, turn in enumerate(request.messages):
        where = f"messages[{i}].content"
        if isinstance(turn.content, str):
            turns.append({"role": turn.role, "content": turn.content})
        elif not turn.content:
            raise wrong(f"{where} is empty: it needs at least one block", where)
        elif turn.role == "assistant":
            turns.append(_assistant(turn.content, where, known_calls))
        else:
            turns += _user(turn.role, turn.content, where, known_calls)
    return turns


def _assistant(blocks: list[dict[str, Any]], where: str, known: set[str]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant"}
    texts, thoughts, calls = [], [], []
    for j, block in enumerate(blocks):
        at = f"{where}[{j}]"
        match block.get("type"):
            case "text":
                texts.append(string_field(block, "text", at))
            case "thinking":
                thoughts.append(string_field(block, "thinking", at))
            case "redacted_thinking":
                continue
            case "tool_use":
                if not isinstance(block.get("input"), dict):
                    raise wrong(f"{at}.input must be an object", f"{at}.input")
                call_id = string_field(block, "id", at)
                known.add(call_id)
                arguments = json.dumps(block["input"], ensure_ascii=False)
                function = {"name": string_field(block, "name", at), "arguments": arguments}
                calls.append({"id": call_id, "type": "function", "function": function})
            case kind:
                raise _unknown_block(kind, at)
    turn["content"] = "\n".join(texts)
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
        turn["content"] = turn["content"] or None
    return turn


def _user(
    role: str, blocks: list[dict[str, Any]], where: str, known: set[str]
) -> list[dict[str, Any]]:
    results, texts = [], []
    for j, block in enumerate(blocks):
        at = f"{where}[{j}]"
        match block.get("type"):
            case "text":
                texts.append(string_field(block, "text", at))
            case "tool_result":
                call_id = block.get("tool_use_id")
                if call_id not in known:
                    raise wrong(
                        f"{at}.tool_use_id={short(call_id)} answers no earlier tool_use",
                        f"{at}.tool_use_id",
                    )
                text = _text(block.get("content") or "", f"{at}.content")
                results.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case kind:
                raise _unknown_block(kind, at)
    return [*results, {"role": role, "content": "\n".join(texts)}] if texts else results


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"{where}={short(content)} must be a text or a list of blocks", where)
    texts = []
    for j, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            raise _unknown_block(
                block.get("type") if isinstance(block, dict) else block, f"{where}[{j}]"
            )
        texts.append(string_field(block, "text", f"{where}[{j}]"))
    return "\n".join(texts)


def _unknown_block(kind: Any, where: str) -> ApiError:
    return wrong(
        f"{where}.type={short(kind)} is not supported here: this model reads text only",
        f"{where}.type",
    )


def stop_reason(reason: str, num_calls: int, found: str | int | None) -> str:
    if reason == "length":
        return "max_tokens"
    if num_calls:
        return "tool_use"
    return "stop_sequence" if isinstance(found, str) else "end_turn"


class MessagesRenderer:
    """Anthropic's events: one block after the other, each begun and ended."""

    keep_alive = event({"type": "ping"}, "ping")

    def __init__(self, plan: Plan, *, model: str):
        self._plan = plan
        self._model = model
        self._index = -1
        self._open: str | None = None
        self._end: ChoiceEnd | None = None

    def begin(self) -> list[bytes]:
        used = {"input_tokens": self._plan.num_prompt_tokens, "output_tokens": 0}
        message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
        return [_event("message_start", message={**message, "usage": used})]

    def event(self, event: Piece | ChoiceEnd | Progress | StrategyStep) -> list[bytes]:
        if isinstance(event, Progress | StrategyStep):
            return [self.keep_alive]
        if isinstance(event, ChoiceEnd):
            self._end = event
            return self._close()
        match event.event:
            case ReasoningDelta(text):
                opened = self._switch("thinking", {"thinking": "", "signature": ""})
                return [*opened, self._delta("thinking_delta", thinking=text)]
            case ContentDelta(text):
                opened = self._switch("text", {"text": ""})
                return [*opened, self._delta("text_delta", text=text)]
            case ToolCallStart(_, id, name):
                return [
                    *self._close(),
                    *self._switch("tool_use", {"id": id, "name": name, "input": {}}),
                ]
            case ToolCallArguments(_, fragment):
                return [self._delta("input_json_delta", partial_json=fragment)]
        return self._close()

    def end(self, totals: Totals) -> list[bytes]:
        assert self._end is not None, "the choice has ended"
        delta = _stop(self._end.finish_reason, self._end.num_calls, self._end.stop_reason)
        return [
            _event("message_delta", delta=delta, usage=_usage(totals)),
            _event("message_stop"),
        ]

    def failure(self, error: ApiError) -> list[bytes]:
        return [event(error.body("anthropic"), "error")]

    def body(self, answers: list[Answer], totals: Totals) -> dict[str, Any]:
        answer = answers[0]
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            thinking = "".join(answer.reasoning)
            content.append({"type": "thinking", "thinking": thinking, "signature": _SIGNATURE})
        if answer.content:
            content.append({"type": "text", "text": "".join(answer.content)})
        for call in answer.calls:
            arguments = _object(call.arguments)
            content.append(
                {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}
            )
        stop = _stop(answer.finish_reason, len(answer.calls), answer.stop_reason)
        return {**self._head(), "content": content, **stop, "usage": _usage(totals)}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._plan.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
        }

    def _switch(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        """Begins a block of another kind, if that is not open."""
        if self._open == kind:
            return []
        closed = self._close()
        self._open = kind
        self._index += 1
        content = {"type": kind, **block}
        return [*closed, _event("content_block_start", index=self._index, content_block=content)]

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        ending = []
        if self._open == "thinking":
            ending.append(self._delta("signature_delta", signature=_SIGNATURE))
        self._open = None
        return [*ending, _event("content_block_stop", index=self._index)]

    def _delta(self, kind: str, **fields: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **fields})


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _stop(reason: str, num_calls: int, found: str | int | None) -> dict[str, Any]:
    kind = stop_reason(reason, num_calls, found)
    return {"stop_reason": kind, "stop_sequence": found if kind == "stop_sequence" else None}


def _usage(totals: Totals) -> dict[str, Any]:
    """input_tokens leaves out what was cached, as Anthropic counts."""
    return {
        "input_tokens": totals.prompt_tokens - totals.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": totals.cached_tokens,
        "output_tokens": totals.completion_tokens,
        "output_tokens_details": {"thinking_tokens": totals.reasoning_tokens},
    }


def _object(arguments: str) -> dict[str, Any]:
    """The input of a call; one that was cut off or is no object is kept as text, so that nothing is lost."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {"_invalid_json": arguments}
    return value if isinstance(value, dict) else {"_invalid_json": arguments}
