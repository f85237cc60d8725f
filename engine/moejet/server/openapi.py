"""The OpenAPI document: bodies are read by the server itself, so FastAPI has to be told what they look like."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from moejet.server.answer_schemas import ANSWERS

_PREFIX = "#/components/schemas/"
_REFUSALS: dict[int, str] = {
    400: "wrong request",
    401: "no valid key",
    403: "not for this host or origin",
    404: "no such model, request or path",
    431: "the headers are too large",
    500: "the engine failed",
    503: "too much is waiting, or the engine is being started; see Retry-After",
}
_REFUSALS_OF_BODIES: dict[int, str] = {
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not JSON",
}
_KEYS: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra` of a route whose body is one of the server's own models."""
    schema = {"$ref": f"{_PREFIX}{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(
    name: str,
    *,
    error: str = "Error",
    has_body: bool = True,
    is_streamed: bool = False,
) -> dict[int | str, dict[str, Any]]:
    """For `responses` of a route. name, error: of its answers, in `ANSWERS`."""
    content = _json(name)
    if is_streamed:
        content["text/event-stream"] = {"itemSchema": {"$ref": f"{_PREFIX}Event"}}
    statuses = _REFUSALS | (_REFUSALS_OF_BODIES if has_body else {})
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": _json(error)} for status, text in statuses.items()
    }
    return {200: {"description": "the answer", "content": content}, **refusals}


def _json(name: str) -> dict[str, Any]:
    assert name in ANSWERS, f"{name=}"
    return {"application/json": {"schema": {"$ref": _PREFIX + name}}}


def describe(app: FastAPI) -> None:
    """Replaces app.openapi by one whose document also holds the models behind `body_of`, answers and keys."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title, version="1", description=app.description, routes=app.routes
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in app.state.body_models],
                ref_template=_PREFIX + "{model}",
            )
            for methods in found["paths"].values():
                for operation in methods.values():
                    # FastAPI's own, for a check that it does not make here.
                    operation["responses"].pop("422", None)
            parts = found.setdefault("components", {})
            parts["schemas"] = {**definitions["$defs"], **ANSWERS}
            parts["securitySchemes"] = _KEYS
            # None, where the server asks for none.
            found["security"] = [{}, *({name: []} for name in _KEYS)]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
