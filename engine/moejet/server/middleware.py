"""What every request has to pass before an endpoint sees it, and the strict reading of its body.

A page at a foreign origin can make a browser send requests to this machine. Two checks stand against that: the Host
header must be a name under which this server is known (DNS rebinding would bring another), and an Origin header must be
the server's own or one that was allowed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moejet.server.config import ServerConfig
from moejet.server.errors import ApiError, dialect_of, wrong
from moejet.server.sse import error_response

logger = logging.getLogger("moejet.server.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OFF_LOOP_BYTES = 64 << 10  # of a body, from which on it is parsed on another thread
_CORS_HEADERS = "authorization, content-type, x-api-key, anthropic-version, anthropic-beta"
_SURROGATE = re.compile(rb"\\u[dD][89abAB]")


class Guard:
    """Pure ASGI, so that streams pass through it unbuffered.

    public: paths that need no key; one that ends with / stands for all below it
    """

    def __init__(self, app: ASGIApp, *, config: ServerConfig, public: Sequence[str] = ()):
        self._app = app
        self._config = config
        self._digests = [_digest(key) for key in config.api_keys]
        self._public = frozenset(p for p in public if not p.endswith("/") or p == "/")
        self._public_prefixes = tuple(p for p in public if p.endswith("/") and p != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        wanted_id = headers.get("x-request-id", "")
        request_id = wanted_id if _REQUEST_ID.fullmatch(wanted_id) else uuid.uuid4().hex
        begin, status = time.perf_counter(), 0
        origin = headers.get("origin")
        is_foreign = origin is not None and not self._is_own_origin(origin, headers)

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["x-request-id"] = own["request-id"] = request_id
                own.setdefault("x-content-type-options", "nosniff")
                if is_foreign and origin in self._config.cors_origins:
                    own["access-control-allow-origin"] = origin
                    own["access-control-expose-headers"] = "x-request-id, retry-after"
                    own.add_vary_header("origin")
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        try:
            self._check_headers(scope)
            self._check_host(headers)
            if is_foreign and origin not in self._config.cors_origins:
                raise ApiError(
                    403,
                    f"origin={origin[:80] if origin else ''!r} may not use this server: start it "
                    "with that origin in cors_origins",
                    code="origin_not_allowed",
                )
            if is_foreign and _is_preflight(scope, headers):
                await _answer_preflight(guarded_send)
                return
            key_salt = self._check_key(path, headers)
            self._check_length(headers)
        except ApiError as error:
            await error_response(error, dialect_of(path))(scope, receive, guarded_send)
        else:
            limited = _LimitedBody(receive, self._config)
            state = scope.setdefault("state", {})
            state["request_id"] = request_id
            state["cache_salt"] = key_salt
            await self._app(scope, limited, guarded_send)
        finally:
            seconds = time.perf_counter() - begin
            logger.info(
                "%s %s %d %.3f s %s", scope["method"], _printable(path), status, seconds, request_id
            )

    def _check_headers(self, scope: Scope) -> None:
        config, headers = self._config, scope["headers"]
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        num_bytes += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if len(headers) > config.max_header_count or num_bytes > config.max_header_bytes:
            raise ApiError(
                431,
                f"{len(headers)} headers with {num_bytes} bytes; {config.max_header_count} with "
                f"{config.max_header_bytes} are allowed",
                code="headers_too_large",
            )

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host")
        if host is None or self._is_known_host(_host_name(host)):
            return
        raise ApiError(
            403,
            f"host={host[:80]!r} is no name of this server: use its address, or start it with that "
            "name in allowed_hosts",
            code="host_not_allowed",
        )

    def _is_known_host(self, name: str) -> bool:
        if self._config.allowed_hosts is not None:
            return name in self._config.allowed_hosts
        if name in ("localhost", self._config.host.lower()) or name.endswith(".localhost"):
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True

    def _is_own_origin(self, origin: str, headers: Headers) -> bool:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""

    def _check_key(self, path: str, headers: Headers) -> str | None:
        """Raises ApiError without a valid key. Returns what sets its cached prefixes apart from those of other keys."""
        if not self._digests or path in self._public or path.startswith(self._public_prefixes):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        given = _digest(key.strip())
        # All are compared, in a time that does not depend on how much of them fits.
        if sum([hmac.compare_digest(given, digest) for digest in self._digests]) == 0:
            raise ApiError(
                401,
                "a valid API key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if self._config.share_cache or len(self._digests) < 2:
            return None
        # Not the digest itself, which is as good as the key for whoever compares digests.
        return hashlib.sha256(b"cache salt" + given).hexdigest()

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._config.max_body_bytes:
            raise _too_large(self._config)


class _LimitedBody:
    """Receives a request's body within the limits of size and time."""

    def __init__(self, receive: Receive, config: ServerConfig):
        self._receive = receive
        self._config = config
        self._num_bytes = 0
        self._until_s = time.perf_counter() + config.body_timeout_s
        self._is_read = False

    async def __call__(self) -> Message:
        if self._is_read:
            return await self._receive()
        try:
            left = max(0.0, self._until_s - time.perf_counter())
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._config.body_timeout_s:g} s",
                code="body_timeout",
                headers={"connection": "close"},
            ) from None
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._config.max_body_bytes:
            raise _too_large(self._config)
        self._is_read = not message.get("more_body", False)
        return message


def _too_large(config: ServerConfig) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than max_body_bytes={config.max_body_bytes}: shorten it",
        code="body_too_large",
        headers={"connection": "close"},
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _host_name(host: str) -> str:
    """'[::1]:8000' -> '::1', 'Localhost:8000' -> 'localhost'."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _printable(path: str) -> str:
    return path[:200].encode("ascii", "backslashreplace").decode().replace("\n", "\\n")


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


async def _answer_preflight(send: Send) -> None:
    headers = {
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": _CORS_HEADERS,
        "access-control-max-age": "600",
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 204, "headers": raw})
    await send({"type": "http.response.body", "body": b""})


async def read_json(request: Request, config: ServerConfig) -> Any:
    """The body as JSON without doubtful parts. Raises ApiError 400 or 415."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise ApiError(
            415,
            f"content-type={kind[:80]!r} is not supported: send application/json",
            code="unsupported_media_type",
        )
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters, re.IGNORECASE)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(
            415, f"content-type's charset={charset[1][:40]!r} is not supported: send UTF-8"
        )
    body = await request.body()
    if len(body) < _OFF_LOOP_BYTES:
        return strict_json(body, config.max_json_depth)
    return await asyncio.to_thread(strict_json, body, config.max_json_depth)


def strict_json(body: bytes, max_depth: int) -> Any:
    """Refuses what parsers read differently: double keys, NaN, numbers beyond fp64, lone surrogates, deep nesting."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise wrong(
            f"the body is not valid UTF-8 (byte {error.start}): send it as UTF-8",
            code="invalid_utf8",
        ) from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except json.JSONDecodeError as error:
        raise wrong(
            f"the body is not valid JSON: {error}; send an object", code="invalid_json"
        ) from None
    except RecursionError:
        raise _too_deep(max_depth) from None
    _check_depth(value, max_depth)
    if _SURROGATE.search(body) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise wrong(
                "the body holds half of a surrogate pair, which is no character: send both, or neither",
                code="invalid_json",
            ) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        double = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise wrong(
            f"the key {double[:80]!r} occurs twice in one object: send it once",
            double[:80],
            "invalid_json",
        )
    return found


def _refuse_constant(name: str) -> float:
    raise wrong(f"{name} is not JSON: send a number", code="invalid_json")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise wrong(
            f"the number {text[:40]} is too large: numbers must fit into 64 bits",
            code="invalid_json",
        )
    return value


def _integer(text: str) -> int:
    if len(text) > 40:
        raise wrong(
            f"the number {text[:40]}... is too large: numbers must fit into 64 bits",
            code="invalid_json",
        )
    return int(text)


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth + 1):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise _too_deep(max_depth)


def _too_deep(max_depth: int) -> ApiError:
    return wrong(
        f"the body is nested deeper than {max_depth} levels: send a flatter one",
        code="invalid_json",
    )
