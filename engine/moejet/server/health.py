"""Whether the server can do its work: /health for those who would restart it, /ready for those who send requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from moejet.server.openapi import answers

if TYPE_CHECKING:
    from moejet.server.backend import Backend

STALL_S = 120.0


def assess(health: dict[str, Any], stall_s: float = STALL_S) -> tuple[str, str | None]:
    """(status, reason) of what a backend says of itself; the status is "ok" or what is wrong.

    stall_s: a step, or a pause between steps while requests wait, that is longer counts as a stall.
    """
    if not health["alive"]:
        return str(health["state"]), health.get("error") or health.get("last_failure")
    step_s = health.get("step_running_s", 0.0)
    if step_s > stall_s:
        return "stalled", f"a step has been running for {step_s:.0f} s"
    # A prompt that is still being tokenised is no reason to step.
    has_work = health.get("running", 0) or health.get("waiting", 0)
    age_s = health.get("last_step_age_s", 0.0)
    if has_work and not step_s and age_s > stall_s:
        return "stalled", f"requests wait, and there was no step for {age_s:.0f} s"
    return "ok", None


def is_ready(health: dict[str, Any], stall_s: float = STALL_S) -> tuple[bool, str | None]:
    """Whether a request that came now would be accepted, and why not."""
    status, reason = assess(health, stall_s)
    if status != "ok":
        return False, reason or status
    if health.get("state", "running") != "running":
        return False, "the engine takes no new requests"
    queued, limit = health.get("queued_requests", 0), health.get("max_queued_requests")
    if limit is not None and queued >= limit:
        return False, f"the queue is full: {queued} requests wait"
    return True, None


def health_router(backend: Backend) -> APIRouter:
    """GET /health and /ready: 200, or 503 with the reason. They need no key and say nothing of requests."""
    router = APIRouter(tags=["health"])

    @router.get("/health", responses=_responses("Health"))
    async def health() -> JSONResponse:
        """Whether the engine works: its steps advance."""
        found = backend.health()
        status, reason = assess(found)
        body = {"status": status, "error": reason, **{n: found.get(n) for n in _SHOWN}}
        return _response(status == "ok", body)

    @router.get("/ready", responses=_responses("Ready"))
    async def ready() -> JSONResponse:
        """Whether a request would be accepted now."""
        can_accept, reason = is_ready(backend.health())
        return _response(can_accept, {"ready": can_accept, "error": reason})

    return router


_SHOWN = (
    *("state", "running", "waiting", "queued_requests", "max_queued_requests"),
    *("step_running_s", "last_step_age_s", "generated_tokens_per_s", "prompt_tokens_per_s"),
    *("restarts", "last_failure"),
)


def _responses(name: str) -> dict[int | str, dict[str, Any]]:
    found = answers(name, has_body=False)
    not_now = {**found[200], "description": "not now; the body says why"}
    return {200: found[200], 403: found[403], 431: found[431], 503: not_now}


def _response(is_well: bool, body: dict[str, Any]) -> JSONResponse:
    headers = {"cache-control": "no-store"} | ({} if is_well else {"retry-after": "5"})
    return JSONResponse(body, 200 if is_well else 503, headers=headers)
