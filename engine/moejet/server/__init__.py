"""The HTTP server: OpenAI's and Anthropic's dialects over one engine.

`asgi_app` makes the application, to be mounted in another one or given to any ASGI server; `serve_in_thread` runs an
application beside a script.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejet.server.app import asgi_app
    from moejet.server.config import ServerConfig
    from moejet.server.thread import serve_in_thread

__all__ = ["ServerConfig", "asgi_app", "serve_in_thread"]

_EXPORTS = {
    "ServerConfig": "moejet.server.config",
    "asgi_app": "moejet.server.app",
    "serve_in_thread": "moejet.server.thread",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
