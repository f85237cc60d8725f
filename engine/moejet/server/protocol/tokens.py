"""POST /tokenize and /detokenize: what the model makes of a text."""

from __future__ import annotations

from typing import Any

from moejet.server.errors import wrong
from moejet.server.protocol.chat import Message, chat_messages, check_tools
from moejet.server.protocol.common import Context, token_text
from moejet.server.protocol.fields import ApiModel
from moejet.server.reasoning_controls import REASONING_FIELDS, normalise_reasoning
from moejet.server.tool_calls import parse_tools
from moejet.validation import short


class TokenizeRequest(ApiModel):
    """A text (`prompt`, or `content` as llama.cpp calls it) or a conversation."""

    passed_on = frozenset(REASONING_FIELDS)

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ApiModel):
    model: str | None = None
    tokens: list[int]


def tokenize(request: TokenizeRequest, context: Context) -> dict[str, Any]:
    context.check_model(request.model)
    given = [v for v in (request.prompt, request.content, request.messages) if v is not None]
    if len(given) != 1:
        names = [n for n in ("prompt", "content", "messages") if getattr(request, n) is not None]
        what = f"{' and '.join(names)} are given" if names else "prompt is missing"
        raise wrong(
            f"{what}: send one of prompt (a text), content (the same) and messages (a conversation)",
            names[-1] if names else "prompt",
        )
    if request.messages is not None:
        fields = {k: v for k, v in (request.model_extra or {}).items() if k in REASONING_FIELDS}
        kwargs = dict(normalise_reasoning(fields, context.tokenizer).template_kwargs)
        if request.tools:
            check_tools(context)
            kwargs["tools"] = [tool.for_template() for tool in parse_tools(request.tools)]
        ids = context.prompts.of_chat(chat_messages(request.messages), kwargs, is_checked=False)[1]
    else:
        specials = request.add_special_tokens is not False
        ids = context.tokenizer.encode(str(given[0]), specials)
    result: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": context.card.max_context,
        "tokens": ids,
    }
    if request.return_token_strs:
        result["token_strs"] = [token_text(context.tokenizer, i) for i in ids]
    return result


def tokenizer_info(context: Context) -> dict[str, Any]:
    """In vLLM's form, which lm-eval reads to tokenise through a server."""
    tokenizer = context.tokenizer
    templates = tokenizer.chat_template_sources
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": context.card.max_context,
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template or next(iter(templates), None),
        **tokenizer.special_tokens,
    }


def detokenize(request: DetokenizeRequest, context: Context) -> dict[str, Any]:
    context.check_model(request.model)
    vocab_size = context.card.vocab_size
    bad = next((t for t in request.tokens if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise wrong(
            f"tokens holds {short(bad)}: token ids must be between 0 and {vocab_size - 1}", "tokens"
        )
    text = context.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return {"prompt": text, "content": text}
