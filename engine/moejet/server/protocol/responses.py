"""POST /v1/responses: OpenAI's Responses, without a memory: what it would have to remember for a client is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moejet.request import MAX_LOGPROBS
from moejet.server.errors import wrong
from moejet.server.generation import Plan
from moejet.server.protocol.chat import answer_grammar, conversation_plan
from moejet.server.protocol.common import Context, response_grammar, sampling_params, string_field
from moejet.server.protocol.fields import (
    HARMLESS,
    ApiModel,
    Count,
    NumLogprobs,
    Salt,
    SamplingFields,
    StreamOptions,
    Temperature,
    TopP,
    anything,
    one_of,
)
from moejet.server.protocol.strategies import StrategyFields, with_strategy
from moejet.server.reasoning_controls import REASONING_FIELDS, normalise_reasoning
from moejet.server.tool_calls import (
    parse_tool_choice,
    parse_tools,
)
from moejet.validation import short

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


class ResponsesRequest(ApiModel, StrategyFields):
    """A conversation to be continued."""

    harmless = _HARMLESS
    passed_on = frozenset((*REASONING_FIELDS, *_REMEMBERED))

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: NumLogprobs | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Salt | None = None


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
        {k: v for k, v in extra.items() if k in REASONING_FIELDS},
        context.tokenizer,
        effort_budgets=context.effort_budgets,
    )
    grammar = answer_grammar(context, tools, choice, _text_grammar(request.text))
    params = sampling_params(
        SamplingFields(
            temperature=request.temperature, top_p=request.top_p, cache_salt=request.cache_salt
        ),
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
    calls_tools = bool(tools) and choice.mode != "none"
    plan = with_strategy(plan, request, context, effort=controls.effort, calls_tools=calls_tools)
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
        arguments = string_field(item, "arguments", where) or "{}"
        if not _is_object(arguments):
            raise wrong(
                f"{where}.arguments must be the text of a JSON object", f"{where}.arguments"
            )
        function = {"name": string_field(item, "name", where), "arguments": arguments}
        call_id = string_field(item, "call_id", where)
        calls.add(call_id)
        turn = _assistant(turns)
        call = {"id": call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        call_id = string_field(item, "call_id", where)
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
        texts.append(string_field(part, "text", f"{where}[{j}]"))
    return "\n".join(texts)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
