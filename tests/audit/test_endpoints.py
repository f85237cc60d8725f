"""Every endpoint with wrong values for every field, header and part of its path, made from the OpenAPI document."""

import asyncio
import json
import re
from urllib.parse import quote

import httpx
import pytest

from moejet import AsyncLLM
from moejet.server import asgi_app
from moejet.testing.bad_values import REMEDY, faults_of, sampled

TURNS = [{"role": "user", "content": "Start with 17."}]
# What makes the rest of a body right.
BASE = {
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 1},
    "/v1/completions": {"prompt": "Start", "max_tokens": 1},
    "/v1/responses": {"input": "Start with 17.", "max_output_tokens": 1},
    "/v1/messages": {"messages": TURNS, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": TURNS},
    "/tokenize": {"prompt": "Start"},
    "/detokenize": {"tokens": [5, 6]},
}
# Given with another one, the two contradict each other.
CONTRARY = {
    "max_completion_tokens": ("max_tokens",),
    "content": ("prompt",),
    "messages": ("prompt",),
}
HUGE, LONG = 10**30, "x" * 20_000
DEEP: list = []
for _ in range(40):
    DEEP = [DEEP]
OF_TYPE = {
    "string": ["", "nonsense", LONG, "\0", "7"],
    "integer": [-7, 0, HUGE, -HUGE],
    "number": [-7.5, 1e300, 0.0],
    "boolean": [True, False],
    "array": [[], [None], [{}], ["nonsense"], [-7], [[]], DEEP],
    "object": [{}, {"nonsense": 5}, {"type": "nonsense"}, {"type": 5}, {"nonsense": {"x": []}}],
    "null": [None],
}
# Other types' values that show that the type was looked at.
STRANGE = {"string": "nonsense", "integer": 7, "number": 1.5, "boolean": True, "array": [5]}
STRANGE["object"] = {"nonsense": 5}


def _types(schema):
    """Types that a field may have; of one of which nothing is said, all."""
    if "$ref" in schema:
        return {"object"}
    if "anyOf" in schema:
        return set().union(*(_types(part) for part in schema["anyOf"]))
    return {schema["type"]} if "type" in schema else set(OF_TYPE)


def _may_be(value, schema, is_required):
    """Whether the document allows a value, as far as type and range go."""
    if value is None:
        return not is_required
    if "anyOf" in schema:
        return any(_may_be(value, part, is_required) for part in schema["anyOf"])
    if not (kind := schema.get("type")):
        return True
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "number" or kind == "integer":
        low, high = schema.get("minimum", -HUGE), schema.get("maximum", HUGE)
        low = schema.get("exclusiveMinimum", low)
        fits = is_number and low <= value <= high
        return fits and (kind == "number" or isinstance(value, int))
    python = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, python[kind])


def _bodies(path, schema):
    """(field, value, body, whether it must be refused)."""
    for name, field in schema["properties"].items():
        kinds, is_required = _types(field), name in schema.get("required", ())
        values = [value for kind in sorted(kinds) for value in OF_TYPE[kind]]
        values += [value for kind, value in STRANGE.items() if kind not in kinds]
        if is_required:
            values.append(None)
            rest = {key: value for key, value in BASE[path].items() if key != name}
            yield name, None, rest, True
        for value in values:
            rest = {
                k: v
                for k, v in BASE[path].items()
                if value is None or k not in CONTRARY.get(name, ())
            }
            yield name, value, {**rest, name: value}, not _may_be(value, field, is_required)
        typo = name[:-2] + name[-1] if len(name) > 5 else f"{name}_x"
        yield typo, 5, {**BASE[path], typo: 5}, True
    for name, value in (("no_such_field", None), ("x" * 300, 5), ("ü", {}), ("", 1), ("a.b", 1)):
        yield name[:40], value, {**BASE[path], name: 5 if value is None else value}, True


@pytest.fixture(scope="module")
def llm():
    llm = AsyncLLM(num_threads=1)
    yield llm
    asyncio.run(llm.close(drain=False))


@pytest.fixture(scope="module")
def app(llm):
    return asgi_app(llm, max_prompts=3)


def _ask_all(app, requests):
    """Answers to (method, path, options), one after the other."""

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(m, path, **options) for m, path, options in requests]

    return asyncio.run(ask())


@pytest.mark.parametrize("path", BASE)
def test_wrong_fields_are_refused_by_name(app, path):
    document = app.openapi()
    operation = document["paths"][path]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    cases = sampled(list(_bodies(path, schema)), 80)
    requests = [("POST", path, {"json": body}) for _, _, body, _ in cases]
    problems = []
    for (name, value, _, must_fail), reply in zip(cases, _ask_all(app, requests), strict=True):
        where = f"{name}={json.dumps(value)[:50]}: {reply.status_code}"
        if reply.status_code == 200:
            problems += [f"{where}: accepted"] if must_fail else []
            continue
        problems += [f"{where}: {fault}" for fault in _faults(app, path, reply, name, value)]
    assert not problems, f"{len(problems)} of {len(cases)}:\n" + "\n".join(problems)


def _documented(app, path, method="post"):
    return {int(status) for status in app.openapi()["paths"][path][method]["responses"]}


def _faults(app, path, reply, name, value):
    if reply.status_code not in _documented(app, path) or reply.status_code >= 500:
        return [f"not documented: {reply.text[:200]}"]
    error = reply.json()["error"]
    message, param = error["message"], error.get("param", name)
    is_unknown = message.startswith("unknown field")  # whose name is what is wrong
    faults = faults_of(message, name, name if is_unknown else value)
    if "is missing" in message or "=None" in message:
        faults = [fault for fault in faults if fault != "value"]
    # Found while the body is read or rendered, where fields are not known, or too long to be shown.
    is_extreme = value is DEEP or value is LONG or value in (HUGE, -HUGE)
    if is_extreme and re.search("nested|too large|maximum context length", message):
        return [f"lacks remedy: {message!r}"] if "remedy" in faults else []
    if not (param or "").startswith(name[:80]):
        faults.append(f"param={param!r}")
    return [f"lacks {', '.join(faults)}: {message[:300]!r}"] if faults or "\n" in message else []


def _raw(content, **headers):
    return {"content": content, "headers": {"content-type": "application/json", **headers}}


# What is wrong about a request besides its fields: how it is sent, the status, and what the message shows.
BROKEN = {
    "not JSON": (_raw(b"{nonsense"), 400, "JSON"),
    "no object": (_raw(b"[5]"), 400, "array"),
    "a number": (_raw(b"5"), 400, "number"),
    "null": (_raw(b"null"), 400, "null"),
    "nothing": (_raw(b""), 400, "JSON"),
    "not UTF-8": (_raw(b'{"model": "\xff"}'), 400, "byte 11"),
    "half a character": (_raw(b'{"model": "\\ud800"}'), 400, "surrogate"),
    "NaN": (_raw(b'{"model": NaN}'), 400, "NaN"),
    "infinity": (_raw(b'{"model": 1e999}'), 400, "1e999"),
    "digits": (_raw(b'{"model": ' + b"9" * 99 + b"}"), 400, "999"),
    "twice": (_raw(b'{"model": null, "model": "x"}'), 400, "'model'"),
    "deep": (_raw(b"[" * 5000), 400, "nested"),
    "a form": (_raw(b"{}", **{"content-type": "text/plain"}), 415, "text/plain"),
    "no type": (_raw(b"{}", **{"content-type": ""}), 415, "''"),
    "another charset": (
        _raw(b"{}", **{"content-type": "application/json; charset=latin-1"}),
        415,
        "latin-1",
    ),
    "length": (_raw(b"{}", **{"content-length": "9" * 20}), 413, "max_body_bytes"),
    "no length": (_raw(b"{}", **{"content-length": "x"}), 413, "max_body_bytes"),
    "host": (_raw(b"{}", host="evil.example"), 403, "evil.example"),
    "origin": (_raw(b"{}", origin="http://evil.example"), 403, "evil.example"),
    "header": (_raw(b"{}", **{"x-long": "y" * 70_000}), 431, "bytes"),
    "no key": (_raw(b"{}", authorization=""), 401, "Authorization"),
    "wrong key": (_raw(b"{}", authorization="Bearer wrong"), 401, "Authorization"),
    "no bearer": (_raw(b"{}", authorization="Basic wrong"), 401, "Authorization"),
    "a key of bytes": (_raw(b"{}", **{"x-api-key": b"\xff", "authorization": b"\xff"}), 401, "key"),
}


def test_broken_requests_are_refused_with_a_remedy(llm):
    app = asgi_app(llm, api_keys=("right",))
    right = {"authorization": "Bearer right"}
    cases = [(path, *case) for path in BASE for case in BROKEN.items()]
    requests = [
        ("POST", path, {**how, "headers": {**right, **how["headers"]}})
        for path, _, (how, _, _) in cases
    ]
    problems = []
    for (path, name, (_, status, shown)), reply in zip(cases, _ask_all(app, requests), strict=True):
        error = reply.json()["error"]
        is_well = reply.status_code == status and status in _documented(app, path)
        if not is_well or shown not in error["message"] or not REMEDY.search(error["message"]):
            problems.append(f"{path} {name}: {reply.status_code} {error['message'][:200]}")
        if "right" in reply.text:
            problems.append(f"{path} {name}: tells a key")
    assert not problems, "\n".join(problems)


def test_wrong_paths_methods_and_queries_are_refused(llm):
    app = asgi_app(llm)
    document = app.openapi()["paths"]
    problems, requests = [], []
    for path, methods in document.items():
        if "{" in path:
            method = next(iter(methods))
            for bad in ("nonsense", LONG[:5000], "a\0b", "ü", "%", "a b", "7"):
                name = path[path.index("{") + 1 : path.index("}")]
                filled = path.replace(f"{{{name}}}", quote(bad, safe=""))
                requests.append((method.upper(), filled, name, bad, _documented(app, path, method)))
            continue
        requests += [
            (verb, path, verb, path, {405})
            for verb in ("GET", "POST", "PUT", "DELETE", "PATCH", "BREW")
            if verb.lower() not in methods
        ]
        requests.append(("POST", f"{path}x", "at", f"{path}x", {404}))
    replies = _ask_all(app, [(method, path, {}) for method, path, *_ in requests])
    for (method, path, name, value, statuses), reply in zip(requests, replies, strict=True):
        message = reply.json()["error"]["message"] if reply.status_code != 200 else ""
        faults = faults_of(message, (name, name.removesuffix("_id"), "at"), value)
        if reply.status_code not in statuses - {200} or reply.status_code >= 500 or faults:
            problems.append(f"{method} {path[:60]}: {reply.status_code} {faults} {message[:200]!r}")
    # Nothing here reads a query; what a client adds does no harm.
    queries = ["x=1", "model=nonsense", "%ff=%00", "&&==", "a" * 500]
    for reply in _ask_all(app, [("GET", f"/version?{query}", {}) for query in queries]):
        problems += [] if reply.status_code == 200 else [f"{reply.url}: {reply.status_code}"]
    ids = ["", "x" * 129, "a b", "a\tb", "ü".encode(), b"\xff"]
    replies = _ask_all(app, [("GET", "/version", {"headers": {"x-request-id": i}}) for i in ids])
    for wanted, reply in zip(ids, replies, strict=True):
        given = reply.headers["x-request-id"]
        if reply.status_code != 200 or not given.isascii() or given == wanted:
            problems.append(f"x-request-id={wanted!r}: {reply.status_code} {given!r}")
    assert not problems, "\n".join(problems)
