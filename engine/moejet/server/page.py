"""The chat page: files of the package, held in memory, under a policy that lets them talk to this server only.

The index is checked anew at every visit; everything else has the hash of all files in its path and is kept for good.
Model output reaches the page as text; should its sanitiser ever fail, the policy still runs no script of it and loads
nothing for it.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from starlette.responses import Response

from moejet.server.config import ServerConfig

# What has to be reachable without an API key: the page is where it is asked for.
PAGE_PATHS = ("/", "/page/")

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "vary": "accept-encoding",
}
_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "md": "text/plain; charset=utf-8",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}
_BASE = b"{base}"  # in the index, where the path of the other files belongs


@dataclass(frozen=True, slots=True)
class Asset:
    """A file to be sent. etag: quoted"""

    body: bytes
    media_type: str
    packed: bytes = field(init=False)  # gzip
    etag: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "packed", gzip.compress(self.body, mtime=0))
        object.__setattr__(self, "etag", f'"{hashlib.sha256(self.body).hexdigest()[:32]}"')

    def respond(self, request: Request, cache_control: str) -> Response:
        is_packed = len(self.packed) < len(self.body) and _takes_gzip(request)
        # The packed form is other bytes, so it has a tag of its own.
        etag = f'{self.etag[:-1]}-gzip"' if is_packed else self.etag
        headers = {**_HEADERS, "cache-control": cache_control, "etag": etag}
        if _matches(request.headers.get("if-none-match", ""), etag):
            return Response(status_code=304, headers=headers)
        if is_packed:
            headers["content-encoding"] = "gzip"
        body = self.packed if is_packed else self.body
        return Response(body, media_type=self.media_type, headers=headers)


def load_assets() -> tuple[Asset, str, dict[str, Asset]]:
    """The index, the digest of all other files, and those by their path below `page/`."""
    files = _read(resources.files("moejet.server").joinpath("page"))
    index = files.pop("index.html")
    digest = hashlib.sha256()
    for name, body in sorted(files.items()):
        digest.update(f"{name}\0{len(body)}\0".encode() + body)
    tag = digest.hexdigest()[:16]
    assets = {name: Asset(body, _media_type(name)) for name, body in files.items()}
    base = f"page/{tag}".encode()
    return Asset(index.replace(_BASE, base), _TYPES["html"]), tag, assets


def page_router(config: ServerConfig) -> APIRouter:
    """GET / and /page/... Addresses in the page are relative, so that it works wherever the application is mounted.

    config: holds nothing yet that the page depends on; what it needs it asks the API
    """
    del config
    index, tag, assets = load_assets()
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return index.respond(request, "no-cache")

    @router.api_route("/page/{digest}/{name:path}", methods=["GET", "HEAD"])
    async def page_file(request: Request, digest: str, name: str) -> Response:
        asset = assets.get(name) if digest == tag else None
        if asset is None:
            return Response("no such file\n", 404, _HEADERS, "text/plain; charset=utf-8")
        return asset.respond(request, "public, max-age=31536000, immutable")

    return router


def _read(folder: Traversable, prefix: str = "") -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            files |= _read(entry, f"{prefix}{entry.name}/")
        else:
            files[prefix + entry.name] = entry.read_bytes()
    return files


def _media_type(name: str) -> str:
    return _TYPES.get(name.rpartition("/")[2].rpartition(".")[2], "text/plain; charset=utf-8")


def _takes_gzip(request: Request) -> bool:
    offered = request.headers.get("accept-encoding", "").lower().replace(" ", "").split(",")
    return any(o == "gzip" or (o.startswith("gzip;q=") and o[7:].strip("0.")) for o in offered)


def _matches(tags: str, etag: str) -> bool:
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in tags.split(","))
