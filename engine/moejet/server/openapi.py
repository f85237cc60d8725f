"""The OpenAPI document: bodies are read by the server itself, so FastAPI has to be told what they look like."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_PREFIX = "#/components/schemas/"
_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_REFUSALS: dict[int, str] = {
    400: "wrong request",
    401: "no valid key",
    403: "not for this host or origin",
} | {
    404: "no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not JSON",
    431: "the headers are too large",
    500: "the engine failed",
    503: "too much is waiting; see Retry-After",
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra` of a route whose body is one of the server's own models."""
    schema = {"$ref": f"{_PREFIX}{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(*, is_streamed: bool = False) -> dict[int | str, dict[str, Any]]:
    """For `responses` of a route."""
    content: dict[str, Any] = dict(_OBJECT)
    if is_streamed:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": _OBJECT} for status, text in _REFUSALS.items()
    }
    return {200: {"description": "the answer", "content": content}, **refusals}


def describe(app: FastAPI, *models: type[BaseModel]) -> None:
    """Replaces app.openapi by one whose document also holds the models behind `body_of`."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title, version="1", description=app.description, routes=app.routes
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in app.state.body_models],
                ref_template=_PREFIX + "{model}",
            )
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            schemas |= definitions["$defs"]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
