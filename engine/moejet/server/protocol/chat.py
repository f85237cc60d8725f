"""POST /v1/chat/completions: OpenAI's Chat, with the fields for thinking that DeepSeek, vLLM and llama.cpp added."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moejet.request import MAX_LOGPROBS, SamplingParams
from moejet.server.backend import Job
from moejet.server.errors import wrong
from moejet.server.generation import Plan
from moejet.server.protocol.common import (
    Context,
    response_grammar,
    sampling_params,
    structured_grammar,
)
from moejet.server.protocol.fields import HARMLESS, Count, NumLogprobs, Part, SamplingFields
from moejet.server.protocol.strategies import StrategyFields, with_strategy
from moejet.server.reasoning_controls import (
    REASONING_FIELDS,
    ReasoningControls,
    normalise_reasoning,
)
from moejet.server.strategies import Conversation
from moejet.server.tool_calls import (
    OutputParser,
    Tool,
    ToolChoice,
    parse_tool_choice,
    parse_tools,
    tool_grammar,
)
from moejet.validation import short

_MESSAGE_NOTES = {
    "annotations",
    "audio",
    "cache_control",
    "function_call",
    "id",
    "provider_specific_fields",
    "reasoning_details",
    "refusal",
}


class FunctionCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str | dict[str, Any] = "{}"


class MessageCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None


class ChatRequest(SamplingFields, StrategyFields):
    """A conversation to be continued."""

    harmless = HARMLESS
    passed_on = frozenset(REASONING_FIELDS)

    model: str | None = None
    messages: list[Message]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None


def chat_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """The conversation as chat templates know it. Raises ApiError for turns that make no sense."""
    if not messages:
        raise wrong("messages is empty: it needs at least one message", "messages")
    known_calls: set[str] = set()
    result = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        for name, value in (message.model_extra or {}).items():
            if value and name not in _MESSAGE_NOTES:
                raise wrong(
                    f"{where}.{name[:80]} is not supported: leave it out", f"{where}.{name[:80]}"
                )
        turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        content = text_of(message.content, f"{where}.content")
        if content is None and not message.tool_calls:
            if message.role != "assistant" or not (message.reasoning or message.reasoning_content):
                raise wrong(f"{where}.content is missing: it must be a text", f"{where}.content")
            content = ""
        turn["content"] = content
        if message.name is not None:
            turn["name"] = message.name
        thinking = message.reasoning_content or message.reasoning
        if message.role == "assistant":
            if thinking:
                turn["reasoning_content"] = thinking
            if message.tool_calls:
                turn["tool_calls"] = [
                    _call(call, f"{where}.tool_calls[{j}]")
                    for j, call in enumerate(message.tool_calls)
                ]
                known_calls |= {call.id for call in message.tool_calls if call.id}
        elif message.tool_calls:
            raise wrong(
                f"{where}.tool_calls: only the assistant calls tools", f"{where}.tool_calls"
            )
        if message.role == "tool":
            if message.tool_call_id not in known_calls:
                raise wrong(
                    f"{where}.tool_call_id={short(message.tool_call_id)} answers no earlier call of "
                    "the assistant",
                    f"{where}.tool_call_id",
                )
            turn["tool_call_id"] = message.tool_call_id
        result.append(turn)
    return result


def text_of(content: str | list[Part] | None, where: str) -> str | None:
    """The text of a message; parts of other kinds are refused."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for j, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise wrong(
                f"{where}[{j}].type={short(part.type)} is not supported: this model reads text only",
                f"{where}[{j}].type",
            )
        texts.append(part.text)
    return "\n".join(texts)


def _call(call: MessageCall, where: str) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            is_object = isinstance(json.loads(arguments or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise wrong(
                f"{where}.function.arguments={short(arguments)} must be the text of a JSON object",
                f"{where}.function.arguments",
            )
    else:
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call.function.name, "arguments": arguments or "{}"}
    return {"id": call.id or "", "type": "function", "function": function}


def conversation_plan(
    context: Context,
    messages: list[dict[str, Any]],
    *,
    request_id: str,
    dialect: str,
    controls: ReasoningControls,
    tools: tuple[Tool, ...],
    choice: ToolChoice,
    params: SamplingParams,
    priority: int = 0,
    wants_progress: bool = False,
    template: str | None = None,
) -> Plan:
    """What all dialects of conversations have in common: rendered, tokenised, and with a parser for the answer."""
    offered = tools if choice.mode != "none" else ()
    if offered:
        check_tools(context)
    kwargs: dict[str, Any] = dict(controls.template_kwargs)
    if offered:
        kwargs["tools"] = [tool.for_template() for tool in offered]
    if template is not None:
        if not context.config.trust_request_template:
            raise wrong(
                f"chat_template={short(template)} is not trusted here: leave it out, or start the "
                "server with trust_request_template",
                "chat_template",
            )
        kwargs["chat_template"] = template
    prompt, token_ids = context.prompts.of_chat(
        messages, kwargs, field="input" if dialect == "responses" else "messages"
    )
    job = Job(request_id, token_ids, params, prompt=prompt, priority=priority)
    return Plan(
        request_id=request_id,
        dialect=dialect,
        jobs=[job],
        conversation=Conversation([dict(message) for message in messages], kwargs),
        make_parser=lambda: OutputParser(context.tool_format if offered else None, offered),
        include_reasoning=controls.include_reasoning,
        wants_progress=wants_progress,
        is_logged=context.config.log_prompts,
    )


def chat_plan(request: ChatRequest, context: Context, request_id: str) -> Plan:
    """Blocks for as long as tokenising takes."""
    context.check_model(request.model)
    messages = chat_messages(request.messages)
    tools = parse_tools(request.tools)
    choice = parse_tool_choice(request.tool_choice, tools, parallel=request.parallel_tool_calls)
    fields = {k: v for k, v in (request.model_extra or {}).items() if k in REASONING_FIELDS}
    controls = normalise_reasoning(fields, context.tokenizer, effort_budgets=context.effort_budgets)
    grammar = answer_grammar(
        context,
        tools,
        choice,
        response_grammar(request.response_format, "response_format")
        or structured_grammar(request.structured_outputs),
    )
    wants = [v for v in (request.max_tokens, request.max_completion_tokens) if v is not None]
    if len(set(wants)) > 1:
        raise wrong(
            f"max_tokens={wants[0]} and max_completion_tokens={wants[1]} differ: send one of them",
            "max_tokens",
        )
    params = sampling_params(
        request,
        context,
        max_tokens=wants[0] if wants else None,
        max_tokens_field="max_tokens"
        if request.max_tokens is not None
        else "max_completion_tokens",
        logprobs=_num_logprobs(request),
        grammar=grammar,
        max_thinking_tokens=controls.max_thinking_tokens,
    )
    plan = conversation_plan(
        context,
        messages,
        request_id=request_id,
        dialect="chat",
        controls=controls,
        tools=tools,
        choice=choice,
        params=params,
        priority=request.priority or 0,
        wants_progress=bool(request.return_progress),
        template=request.chat_template,
    )
    calls_tools = bool(tools) and choice.mode != "none"
    return with_strategy(plan, request, context, effort=controls.effort, calls_tools=calls_tools)


def check_tools(context: Context) -> None:
    """Raises ApiError where tools would be ignored."""
    if context.tool_format is None:
        raise wrong(
            "tools need a model whose chat template knows them, and this one's does not: leave "
            "tools out, or send tool_choice='none'",
            "tools",
        )


def answer_grammar(context: Context, tools: Any, choice: ToolChoice, wanted: Any) -> Any:
    """The grammar of the answer: tool calls that are required, or the form that the request asks for."""
    if not tools or choice.mode == "none":
        return wanted
    if wanted is not None:
        raise wrong(
            "response_format cannot be combined with tools that may be called: send "
            "tool_choice='none', or leave one of the two out",
            "response_format",
        )
    if context.tool_format is None:
        return None
    return tool_grammar(context.tool_format, tools, choice)


def _num_logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MAX_LOGPROBS:
        raise wrong(
            f"top_logprobs={request.top_logprobs} must be between 0 and {MAX_LOGPROBS}",
            "top_logprobs",
        )
    if request.top_logprobs and not request.logprobs:
        raise wrong(f"top_logprobs={request.top_logprobs} needs logprobs=true", "top_logprobs")
    return request.top_logprobs or 0 if request.logprobs else None
