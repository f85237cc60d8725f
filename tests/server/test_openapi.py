"""The OpenAPI document: it names every endpoint, answers are what it says, and random requests get no other ones."""

import asyncio
from collections import Counter
from dataclasses import replace

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS

from moejet import AsyncLLM
from moejet.server import asgi_app
from moejet.server.backend import LocalBackend
from moejet.server.protocol.fields import HARMLESS, ApiModel
from moejet.server.protocol.messages import CountTokensRequest
from moejet.server.reasoning_controls import REASONING_FIELDS
from moejet.testing.scripted_backend import ScriptedBackend
from moejet.ticket import EngineDeadError, EngineStepError, QueueFullError

# The last test counts what the others have seen.
pytestmark = pytest.mark.xdist_group("openapi")

LLM = AsyncLLM()
APP = asgi_app(LLM, max_n=2)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"host": "localhost"})
WANTED = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method"),
)
MESSAGES_HARMLESS = tuple(CountTokensRequest.harmless)
# These are checked against each other, or against the model's vocabulary.
NOT_RANDOM = (
    *("top_logprobs", "logprobs", "stop_token_ids", "prompt", "content", "chat_template", "stop"),
    *("previous_response_id", "conversation", "include", "stream_options", "max_completion_tokens"),
)
# Answers may be as long as the context, which says nothing new.
MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

TURNS = [{"role": "user", "content": "Start with 17."}]
GENERATING = {
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 3},
    "/v1/completions": {"prompt": "Start", "max_tokens": 3},
    "/v1/responses": {"input": "Start with 17.", "max_output_tokens": 3},
    "/v1/messages": {"messages": TURNS, "max_tokens": 3},
}
READING = {
    "/v1/messages/count_tokens": {"messages": TURNS},
    "/tokenize": {"messages": TURNS},
    "/detokenize": {"tokens": [5, 6]},
}
GETTING = (
    *("/v1/models", "/v1/models/tiny-reasoner", "/version", "/props", "/tokenizer_info"),
    *("/health", "/ready"),
)


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    asyncio.run(LLM.close(drain=False))


NUMBERS: Counter[str] = Counter()  # well-formed random requests, by path
SENSIBLE: Counter[str] = Counter()  # those of them that were made sensible and sent
ANSWERED: Counter[str] = Counter()  # and those of these that got an answer


def _sensible(path, body):
    """The same random request with what has to make sense, and not to be long, made so: it may be answered."""
    fixed = ("tools", "tool_choice", "response_format", "structured_outputs", "text", "system")
    unknown = {*HARMLESS, *MESSAGES_HARMLESS, *REASONING_FIELDS, *NOT_RANDOM, *fixed}
    kept = {name: value for name, value in body.items() if name not in unknown}
    return {**kept, **GENERATING.get(path, {}), **READING.get(path, {}), "model": None}


@SCHEMA.parametrize()
@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_random_requests_get_documented_answers(case):
    checks = [CHECKS.get_one(name) for name in WANTED]
    headers = {"host": "localhost"}
    is_object = isinstance(case.body, dict)
    for name in MAX_TOKENS if is_object else ():
        if isinstance(case.body.get(name), int):
            case.body[name] = min(case.body[name], 4)
    is_sensible = False
    if is_object and case.meta.generation.mode.is_positive:
        number = NUMBERS[case.path]
        NUMBERS[case.path] += 1
        if number % 3:  # there may be hundreds, much alike
            return
        is_sensible = number % 2 == 0
        if (
            is_sensible
        ):  # the first with nothing random in it: how many there are is not ours to say
            case.body = _sensible(case.path, case.body if number else {})
    reply = case.call_and_validate(checks=checks, headers=headers)
    SENSIBLE[case.path] += is_sensible
    ANSWERED[case.path] += is_sensible and reply.status_code == 200


def test_random_requests_reach_the_engine():
    """Of the test before, whose requests would say little if all of them were refused."""
    if not SENSIBLE:
        pytest.skip("the random requests were not sent here")
    for path in (*GENERATING, *READING):
        assert 0 < SENSIBLE[path] <= 2 * ANSWERED[path], (path, NUMBERS, SENSIBLE, ANSWERED)


def _documented(path, method, status):
    """The schema of an answer, with what it refers to."""
    document = APP.openapi()
    names = [p for p in document["paths"] if p == path or ("{" in p and path.startswith(p[:10]))]
    answer = document["paths"][names[0]][method]["responses"][str(status)]
    return {**answer["content"]["application/json"]["schema"], "components": document["components"]}


def _check(reply, path, method):
    jsonschema.validate(reply.json, _documented(path, method, reply.status))
    return reply


@pytest.fixture(scope="module")
def tiny(ask_app):
    return ask_app(asgi_app(LLM))  # schemathesis ends the other one's lifespan


def test_every_endpoint_is_documented_and_every_body_described():
    document = APP.openapi()
    served = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in APP.routes
        for method in getattr(route, "methods", None) or ()
        if route.path.startswith(("/v1", "/tok", "/detok", "/health", "/ready", "/metrics", "/pr"))
    }
    documented = {(path, m) for path, methods in document["paths"].items() for m in methods}
    assert {one for one in served if one[1] != "head"} <= documented
    assert len(documented) == 17
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method in methods.values():
            assert "422" not in method["responses"], path
            if "requestBody" in method:
                reference = method["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                assert reference.rpartition("/")[2] in schemas, path
    assert {m.__name__ for m in APP.state.body_models} <= set(schemas)
    assert all(issubclass(m, ApiModel) for m in APP.state.body_models)
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", GETTING)
def test_what_is_told_is_as_documented(tiny, path):
    assert _check(tiny(path), path, "get").status == 200


@pytest.mark.parametrize(("path", "body"), [*GENERATING.items(), *READING.items()])
def test_answers_are_as_documented(tiny, path, body):
    assert _check(tiny(path, body), path, "post").status == 200


@pytest.mark.parametrize("path", GENERATING)
def test_answers_with_calls_are_as_documented(ask_app, tool_tokenizer, path):
    text = 'Yes.\n</think>\n\nNow <tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    ask = ask_app(asgi_app(ScriptedBackend([text], tool_tokenizer)))
    parameters = {"type": "object", "properties": {}}
    tool = {"name": "add", "input_schema": parameters} if "messages" in path else {
        "type": "function", "name": "add", "function": {"name": "add", "parameters": parameters}
    }  # fmt: skip
    tools = {} if path == "/v1/completions" else {"tools": [tool]}
    body = {**GENERATING[path], **tools}
    for name in MAX_TOKENS:
        if name in body:
            body[name] = 200
    assert _check(ask(path, body), path, "post").status == 200


async def _stalled():
    yield b"{"
    await asyncio.sleep(5)


JSON = {"content-type": "application/json"}
# A request that gets each status, and options of the server that it is sent to.
REFUSED = {
    400: ({}, {"json": {"top_p": 7}}),
    401: ({"api_keys": ("right",)}, {"headers": {"x-api-key": "wrong"}}),
    403: ({}, {"headers": {"host": "evil.example"}}),
    404: ({}, {"json": {"model": "other"}}),
    408: ({"body_timeout_s": 0.05}, {"content": _stalled, "headers": JSON}),
    413: ({"max_body_bytes": 9}, {}),
    415: ({}, {"content": b"{}", "headers": {"content-type": "text/plain"}}),
    431: ({"max_header_bytes": 900}, {"headers": {"x-long": "y" * 900}}),
}


@pytest.mark.parametrize("status", REFUSED)
@pytest.mark.parametrize("path", GENERATING)
def test_refusals_are_as_documented(ask_app, path, status):
    options, request = REFUSED[status]
    given = dict(request)
    if callable(given.get("content")):
        given["content"] = given["content"]()
    body = None if "content" in given else {**GENERATING[path], **given.pop("json", {})}
    reply = ask_app(asgi_app(LLM, **options))(path, body, **given)
    assert _check(reply, path, "post").status == status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineStepError("the logits are not finite"), 500),
        (KeyError("a mistake of ours"), 500),
        (QueueFullError("5 requests wait", 2.2), 503),
        (EngineDeadError("the engine is dead"), 503),
    ],
)
@pytest.mark.parametrize("path", GENERATING)
def test_failures_are_as_documented(ask_app, tool_tokenizer, path, error, status):
    is_late = isinstance(error, EngineStepError)
    backend = ScriptedBackend(["x"], tool_tokenizer, error=error, refuses=not is_late)
    reply = _check(ask_app(asgi_app(backend))(path, GENERATING[path]), path, "post")
    assert reply.status == status
    assert ("retry-after" in reply.headers) == (status == 503)
    assert "mistake of ours" not in reply.text


def test_a_model_without_a_tokenizer_refuses_what_needs_one(ask_app):
    backend = LocalBackend(LLM, name="bare")
    backend.card = replace(backend.card, tokenizer=None)
    ask = ask_app(asgi_app(backend))
    for path, body in {**GENERATING, **READING}.items():
        assert _check(ask(path, body), path, "post").status == 400
    assert _check(ask("/tokenizer_info"), "/tokenizer_info", "get").status == 400
