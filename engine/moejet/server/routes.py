"""The endpoints."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import Response

import moejet
from moejet.server.errors import ApiError
from moejet.server.openapi import answers, body_of
from moejet.server.protocol.chat import ChatRequest, chat_plan
from moejet.server.protocol.chat_answers import ChatRenderer
from moejet.server.protocol.common import Context
from moejet.server.protocol.completions import (
    CompletionPlan,
    CompletionRenderer,
    CompletionRequest,
    completion_plan,
)
from moejet.server.protocol.messages import (
    CountTokensRequest,
    MessagesRenderer,
    MessagesRequest,
    count_tokens,
    messages_plan,
)
from moejet.server.protocol.responses import ResponsesPlan, ResponsesRequest, responses_plan
from moejet.server.protocol.responses_answers import ResponsesRenderer
from moejet.server.protocol.tokens import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
)
from moejet.server.sse import JsonResponse
from moejet.validation import short

if TYPE_CHECKING:
    from moejet.server.app import Server


def add_routes(app: FastAPI, server: Server) -> None:
    app.state.body_models = (
        *(ChatRequest, CompletionRequest, MessagesRequest, CountTokensRequest),
        *(ResponsesRequest, TokenizeRequest, DetokenizeRequest),
    )
    _add_generation(app, server)
    _add_tokens(app, server)
    _add_information(app, server)
    _add_control(app, server)


def _add_generation(app: FastAPI, server: Server) -> None:
    context, model = server.context, server.context.card.name
    tokenizer = context.card.tokenizer

    @app.post(
        "/v1/chat/completions",
        openapi_extra=body_of(ChatRequest),
        responses=answers("ChatCompletion", is_streamed=True),
    )
    async def chat_completions(request: Request) -> Response:
        body = await server.read(request, ChatRequest)
        return server.respond(
            request,
            lambda: chat_plan(body, context, _new_id("chatcmpl")),
            lambda plan: ChatRenderer(
                plan,
                body,
                model=model,
                tokenizer=tokenizer,
                reasoning_field=server.config.reasoning_field,
            ),
            is_streamed=bool(body.stream),
        )

    @app.post(
        "/v1/completions",
        openapi_extra=body_of(CompletionRequest),
        responses=answers("TextCompletion", is_streamed=True),
    )
    async def completions(request: Request) -> Response:
        body = await server.read(request, CompletionRequest)

        def renderer(completion: CompletionPlan) -> CompletionRenderer:
            return CompletionRenderer(completion, body, model=model, tokenizer=tokenizer)

        return server.respond(
            request,
            lambda: completion_plan(body, context, _new_id("cmpl")),
            renderer,
            is_streamed=bool(body.stream),
            plan_of=lambda completion: completion.plan,
            before=lambda completion: completion.score(server.backend),
        )

    @app.post(
        "/v1/responses",
        openapi_extra=body_of(ResponsesRequest),
        responses=answers("Response", is_streamed=True),
    )
    async def responses(request: Request) -> Response:
        body = await server.read(request, ResponsesRequest)

        def renderer(prepared: ResponsesPlan) -> ResponsesRenderer:
            return ResponsesRenderer(prepared, body, model=model, tokenizer=tokenizer)

        return server.respond(
            request,
            lambda: responses_plan(body, context, _new_id("resp")),
            renderer,
            is_streamed=bool(body.stream),
            plan_of=lambda prepared: prepared.plan,
        )

    @app.post(
        "/v1/messages",
        openapi_extra=body_of(MessagesRequest),
        responses=answers("AnthropicMessage", error="AnthropicError", is_streamed=True),
    )
    async def messages(request: Request) -> Response:
        body = await server.read(request, MessagesRequest)
        return server.respond(
            request,
            lambda: messages_plan(body, context, _new_id("msg")),
            lambda plan: MessagesRenderer(plan, model=model),
            is_streamed=bool(body.stream),
        )


def _add_tokens(app: FastAPI, server: Server) -> None:
    context = server.context

    @app.post(
        "/v1/messages/count_tokens",
        openapi_extra=body_of(CountTokensRequest),
        responses=answers("TokenCount", error="AnthropicError"),
    )
    async def count(request: Request) -> Response:
        body = await server.read(request, CountTokensRequest)
        return JsonResponse(await server.prepared(count_tokens, body, context))

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest), responses=answers("Tokens"))
    async def tokenize_text(request: Request) -> Response:
        body = await server.read(request, TokenizeRequest)
        return JsonResponse(await server.prepared(tokenize, body, context))

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), responses=answers("Text"))
    async def detokenize_ids(request: Request) -> Response:
        body = await server.read(request, DetokenizeRequest)
        return JsonResponse(await server.prepared(detokenize, body, context))

    @app.get("/tokenizer_info", responses=answers("TokenizerInfo", has_body=False))
    async def describe_tokenizer() -> Response:
        return JsonResponse(tokenizer_info(context))


def _add_information(app: FastAPI, server: Server) -> None:
    context = server.context
    created = int(time.time())

    @app.get("/v1/models", responses=answers("Models", has_body=False))
    async def models() -> Response:
        card = _model(context, created)
        # The last three are Anthropic's; `models` is what Codex reads.
        return JsonResponse(
            {
                "object": "list",
                "data": [card],
                "models": [card],
                "has_more": False,
                "first_id": card["id"],
                "last_id": card["id"],
            }
        )

    @app.get("/v1/models/{model_id:path}", responses=answers("Model", has_body=False))
    async def model(model_id: str) -> Response:
        context.check_model(model_id)
        return JsonResponse(_model(context, created))

    @app.get("/version", responses=answers("Version", has_body=False))
    async def version() -> Response:
        return JsonResponse({"version": moejet.__version__})

    @app.get("/props", responses=answers("Props", has_body=False))
    async def props() -> Response:
        return JsonResponse(_props(context))


def _add_control(app: FastAPI, server: Server) -> None:
    @app.post(
        "/v1/requests/{request_id}/end_thinking", responses=answers("Controlled", has_body=False)
    )
    async def end_thinking(request_id: str) -> Response:
        """Makes a running request answer now, or all branches of a strategy."""
        return _controlled(request_id, await server.backend.end_thinking(request_id), "thinks")

    @app.post("/v1/requests/{request_id}/abort", responses=answers("Controlled", has_body=False))
    async def abort(request_id: str) -> Response:
        """Ends a running request; its answer so far is returned with finish_reason "abort".

        A strategy returns the best of what it has.
        """
        is_ended = await server.backend.abort(request_id)
        for i in range(0 if is_ended else server.config.max_prompts):
            # The prompts of one completion request are numbered; some may have ended by themselves.
            if await server.backend.abort(f"{request_id}-{i}"):
                is_ended = True
        return _controlled(request_id, is_ended, "runs")


def _controlled(request_id: str, is_done: bool, state: str) -> Response:
    if not is_done:
        raise ApiError(
            404,
            f"request_id={short(request_id)}: no such request {state} now; use the id in an answer "
            "that is under way",
            param="request_id",
            code="request_not_found",
        )
    return JsonResponse({"id": request_id, "object": "request", "ok": True})


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}" if prefix != "msg" else f"msg_{uuid.uuid4().hex}"


def _model(context: Context, created: int) -> dict[str, Any]:
    name = context.card.name
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "moejet",
        "root": name,
        "max_model_len": context.card.max_context,
        "type": "model",
        "display_name": name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created)),
        "slug": name,
        "context_window": context.card.max_context,
    }


def _props(context: Context) -> dict[str, Any]:
    """What a page or a tool may want to know of model and limits."""
    card, config = context.card, context.config
    sampling = card.default_sampling
    tokenizer = card.tokenizer
    return {
        "model": card.name,
        "version": moejet.__version__,
        "max_context": card.max_context,
        "vocab_size": card.vocab_size,
        "has_chat_template": tokenizer is not None and tokenizer.has_chat_template,
        "thinks": tokenizer is not None and tokenizer.think_tags is not None,
        "tool_format": context.tool_format.name if context.tool_format is not None else None,
        "strategies": card.strategies if config.strategies else (),
        "default_sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
        },
        "limits": {
            "n": config.max_n,
            "stop": config.max_stop,
            "prompts": config.max_prompts,
            "strategy_samples": config.max_strategy_samples,
            "body_bytes": config.max_body_bytes,
        },
    }
