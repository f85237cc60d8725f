"""Errors as clients see them, in OpenAI's and in Anthropic's shape."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from moejet.ticket import EngineClosedError, EngineDeadError, EngineStepError, QueueFullError

logger = logging.getLogger(__name__)

Dialect = Literal["openai", "anthropic"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """What a client did wrong, or what the server cannot do now. param: the request's field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, dialect: Dialect) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "api_error")
        if dialect == "anthropic":
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """What to tell the client of an exception; one that nobody expected is logged and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        seconds = max(1, math.ceil(error.retry_after_s))
        return ApiError(503, str(error), code="queue_full", headers={"retry-after": str(seconds)})
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="closing", headers={"retry-after": "5"})
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead", headers={"retry-after": "10"})
    if isinstance(error, EngineStepError):
        code = "nonfinite_logits" if "logits" in str(error) else "engine_error"
        return ApiError(500, str(error), code=code)
    if isinstance(error, ValueError):
        return wrong(str(error), param_of(str(error)))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why", code="internal")


def param_of(message: str) -> str | None:
    """The field that a message begins with, as in 'top_p=2 must be ...' or 'tools[0].name=...'."""
    match = re.match(
        r"([a-z][a-z0-9_]*(?:\[\d+\]|\.[a-z_]+)*)(?:=|\[| is | must | has | holds )", message
    )
    return match[1] if match else None


def dialect_of(path: str) -> Dialect:
    return "anthropic" if "/v1/messages" in path else "openai"
