"""What answers look like, for the OpenAPI document: JSON schemas, with the fields that clients may rely on."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_NUMBERS: Schema = {"type": "object", "additionalProperties": {"type": "number"}}


def _record(**fields: Schema | str) -> Schema:
    """An object that has these fields, given as schemas or by their types, and perhaps others."""
    properties = {n: {"type": f} if isinstance(f, str) else f for n, f in fields.items()}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _one(*values: str | None) -> Schema:
    return {"enum": list(values)}


_FINISH = _one("stop", "length", "tool_calls", "abort")
_CALL = _record(id=_TEXT, type=_one("function"), function=_record(name=_TEXT, arguments=_TEXT))
_STRATEGY = _record(
    strategy=_TEXT,
    answer=_TEXT_OR_NULL,
    confidence={"type": ["number", "null"]},
    votes={"type": ["object", "null"], "additionalProperties": {"type": "number"}},
    num_candidates=_COUNT,
    is_exhausted="boolean",
)
_CANDIDATE = _record(
    text=_TEXT,
    reasoning=_TEXT_OR_NULL,
    answer=_TEXT_OR_NULL,
    score={"type": ["number", "null"]},
    tokens=_COUNT,
    is_chosen="boolean",
)
_MESSAGE = _record(role=_one("assistant"), content=_TEXT_OR_NULL)
_MESSAGE["properties"] |= {
    "reasoning_content": _TEXT,
    "reasoning": _TEXT,
    "tool_calls": _list(_CALL),
    "reasoning_strategy": _STRATEGY,
}
_USAGE = _record(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_record(cached_tokens=_COUNT),
    completion_tokens_details=_record(reasoning_tokens=_COUNT),
)
_USAGE["properties"] |= {"engine": _NUMBERS}  # of a strategy, all its branches together
_CHOICE = _record(index=_COUNT, message=_MESSAGE, finish_reason=_FINISH)
_CHOICE["properties"] |= {"reasoning_candidates": _list(_CANDIDATE)}
_MODEL = _record(
    id=_TEXT, object=_one("model"), created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT
)

# By the names under which the document lists them.
ANSWERS: dict[str, Schema] = {
    "Error": _record(
        error=_record(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)
    ),
    "AnthropicError": _record(type=_one("error"), error=_record(type=_TEXT, message=_TEXT)),
    # One of a stream; comments between them keep the connection alive.
    "Event": _record(data=_TEXT),
    "ChatCompletion": _record(
        id=_TEXT,
        object=_one("chat.completion"),
        created=_COUNT,
        model=_TEXT,
        choices=_list(_CHOICE),
        usage=_USAGE,
        timings=_NUMBERS,
    ),
    "TextCompletion": _record(
        id=_TEXT,
        object=_one("text_completion"),
        created=_COUNT,
        model=_TEXT,
        choices=_list(
            _record(index=_COUNT, text=_TEXT, finish_reason=_one("stop", "length", "abort"))
        ),
        usage=_USAGE,
        timings=_NUMBERS,
    ),
    "Response": _record(
        id=_TEXT,
        object=_one("response"),
        created_at=_COUNT,
        status=_one("completed", "incomplete", "cancelled"),
        model=_TEXT,
        output=_list(_record(id=_TEXT, type=_one("reasoning", "message", "function_call"))),
        usage=_record(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT),
    ),
    "AnthropicMessage": _record(
        id=_TEXT,
        type=_one("message"),
        role=_one("assistant"),
        model=_TEXT,
        content=_list(_record(type=_one("thinking", "text", "tool_use"))),
        stop_reason=_one("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        stop_sequence=_TEXT_OR_NULL,
        usage=_record(input_tokens=_COUNT, output_tokens=_COUNT, cache_read_input_tokens=_COUNT),
    ),
    "TokenCount": _record(input_tokens=_COUNT),
    "Tokens": _record(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT)),
    "Text": _record(prompt=_TEXT, content=_TEXT),
    "TokenizerInfo": _record(tokenizer_class=_TEXT, vocab_size=_COUNT, chat_template=_TEXT_OR_NULL),
    "Model": _MODEL,
    "Models": _record(object=_one("list"), data=_list(_MODEL), models=_list(_MODEL)),
    "Version": _record(version=_TEXT),
    "Props": _record(
        model=_TEXT,
        max_context=_COUNT,
        default_sampling=_NUMBERS,
        limits=_NUMBERS,
        thinks="boolean",
        strategies=_list(_TEXT),
    ),
    "Controlled": _record(id=_TEXT, object=_one("request"), ok="boolean"),
    "Health": _record(status=_TEXT, error=_TEXT_OR_NULL),
    "Ready": _record(ready="boolean", error=_TEXT_OR_NULL),
}
