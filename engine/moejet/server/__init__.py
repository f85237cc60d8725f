"""The HTTP server: OpenAI's and Anthropic's dialects over one engine. `asgi_app` mounts it in another application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejet.server.app import asgi_app
    from moejet.server.config import ServerConfig

__all__ = ["ServerConfig", "asgi_app"]


def __getattr__(name: str) -> Any:
    if name == "asgi_app":
        from moejet.server.app import asgi_app

        return asgi_app
    if name == "ServerConfig":
        from moejet.server.config import ServerConfig

        return ServerConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
