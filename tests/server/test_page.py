"""The chat page as it is served: complete, cached by content, and with nothing in it that comes from elsewhere."""

import gzip
import hashlib
import re
from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx
from fastapi import FastAPI
from starlette.testclient import TestClient

from moejet.server.config import ServerConfig
from moejet.server.page import CONTENT_SECURITY_POLICY, PAGE_PATHS, load_assets, page_router

PAGE = Path(str(resources.files("moejet.server"))) / "page"
OWN = sorted(p for p in PAGE.iterdir() if p.suffix in (".html", ".js", ".css", ".svg"))
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_router(ServerConfig()))
    return TestClient(app)


def _links(html: str) -> list[str]:
    return re.findall(r"""\b(?:src|href)="([^"#]+)\"""", html)


def _imports(text: str) -> list[str]:
    return re.findall(r"""^import\b[^'"\n]*['"]([^'"]+)['"]""", text, re.MULTILINE)


def test_index_is_small_and_has_all_headers(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert len(response.content) < 12_000
    assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"
    assert "{base}" not in response.text


def test_policy_allows_nothing_inline_and_nothing_foreign() -> None:
    rules = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert rules["form-action"] == "'none'"
    for name in ("script-src", "style-src", "connect-src", "font-src"):
        assert rules[name] == "'self'", name
    assert rules["img-src"] == "'self' data:"
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "http" not in CONTENT_SECURITY_POLICY
    assert "*" not in CONTENT_SECURITY_POLICY


def test_index_has_no_inline_script_style_or_handler(client: TestClient) -> None:
    html = client.get("/").text
    assert re.findall(r"<script\b(?![^>]*\bsrc=)", html) == []
    assert "<style" not in html
    assert re.findall(r"\s(?:on\w+|style)=", html) == []


def test_every_file_that_is_named_is_served(client: TestClient) -> None:
    """From the index through all imports and style sheets."""
    queue, seen = _links(client.get("/").text), set()
    assert len(queue) >= 6
    while queue:
        url = queue.pop()
        if url in seen:
            continue
        seen.add(url)
        response = client.get("/" + url)
        assert response.status_code == 200, url
        assert "immutable" in response.headers["cache-control"], url
        assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        named = _imports(response.text) if url.endswith(".js") else []
        if url.endswith(".css"):
            named = re.findall(r"url\(['\"]?([^'\"):#%]+)['\"]?\)", response.text)
        base = httpx.URL("http://page/" + url)
        queue += [base.join(name).path.lstrip("/") for name in named]
    _, tag, assets = load_assets()
    code = {f"page/{tag}/{name}" for name in assets if not re.search(r"LICENSE|README", name)}
    assert seen == code, "files that nothing uses, or that are missing"


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.name)
def test_own_files_name_no_foreign_address(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for namespace in NAMESPACES:
        text = text.replace(f'"{namespace}"', "")
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text) == []
    assert "innerHTML" not in text
    assert not re.search(r"\beval\(|new Function\b|document\.write", text)


def test_vendored_code_loads_nothing() -> None:
    loads = re.compile(
        r"""(?:import\(|from\s*|fetch\(|url\(|importScripts\(|src\s*=)\s*['"]https?:"""
    )
    for path in PAGE.glob("vendor/*/*"):
        if path.suffix in (".js", ".css"):
            assert not loads.search(path.read_text(encoding="utf-8")), path.name


def test_vendored_files_are_those_listed_with_their_licences() -> None:
    listing = (PAGE / "vendor" / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", listing, re.MULTILINE))
    files = {p for p in PAGE.glob("vendor/*/*") if "LICENSE" not in p.name}
    found = {
        p.relative_to(PAGE / "vendor").as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
    }
    assert {name: digest for digest, name in ((d, n) for d, n in listed.items())} == found
    for folder in (PAGE / "vendor").iterdir():
        assert folder.is_file() or (folder / "LICENSE").is_file(), folder.name
    assert sum(p.stat().st_size for p in PAGE.glob("vendor/**/*") if p.is_file()) < 600_000


def test_index_and_files_are_revalidated_by_content(client: TestClient) -> None:
    for url in ("/", "/" + _links(client.get("/").text)[0]):
        for encoding in ("gzip", "identity"):
            headers = {"accept-encoding": encoding}
            first = client.get(url, headers=headers)
            again = client.get(url, headers={**headers, "if-none-match": first.headers["etag"]})
            assert again.status_code == 304
            assert again.content == b""
            other = client.get(url, headers={**headers, "if-none-match": '"another"'})
            assert other.status_code == 200


def test_files_are_packed_for_those_who_take_it(client: TestClient) -> None:
    url = "/" + next(u for u in _links(client.get("/").text) if u.endswith("app.js"))
    plain = client.get(url, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    refused = client.get(url, headers={"accept-encoding": "gzip;q=0, identity"})
    assert "content-encoding" not in refused.headers
    with client.stream("GET", url, headers={"accept-encoding": "gzip"}) as packed:
        assert packed.headers["content-encoding"] == "gzip"
        raw = b"".join(packed.iter_raw())
    assert gzip.decompress(raw) == plain.content
    assert packed.headers["etag"] != plain.headers["etag"]


@pytest.mark.parametrize(
    "name", ["../page.py", "..%2fpage.py", "%2e%2e/config.py", "index.html", "nothing.js", ""]
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    _, tag, _ = load_assets()
    assert client.get(f"/page/{tag}/{name}").status_code == 404
    assert client.get("/page/0123456789abcdef/app.js").status_code == 404


def test_page_works_below_another_path() -> None:
    inner = FastAPI()
    inner.include_router(page_router(ServerConfig()))
    outer = FastAPI()
    outer.mount("/llm", inner)
    client = TestClient(outer)
    html = client.get("/llm/").text
    for url in _links(html):
        assert not url.startswith("/")
        assert client.get(f"/llm/{url}").status_code == 200


def test_public_paths_cover_the_page() -> None:
    router = page_router(ServerConfig())
    paths = [getattr(route, "path", "") for route in router.routes]
    assert paths
    for path in paths:
        assert path in PAGE_PATHS or any(path.startswith(p) for p in PAGE_PATHS if p != "/")
