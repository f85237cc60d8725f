"""The OpenAPI document, and random requests made from it."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS

from moejet import AsyncLLM
from moejet.server import asgi_app
from moejet.server.protocol.common import ApiModel

LLM = AsyncLLM()
APP = asgi_app(LLM, max_n=2)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"host": "localhost"})
WANTED = ("not_a_server_error", "status_code_conformance", "content_type_conformance")


@pytest.fixture(scope="module", autouse=True)
def _close():
    import asyncio

    yield
    asyncio.run(LLM.close(drain=False))


@SCHEMA.parametrize()
@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_random_requests_get_documented_answers(case):
    if isinstance(case.body, dict):
        # Answers may be as long as the context, which says nothing new.
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(case.body.get(name, 0), int) and case.body.get(name, 99) > 4:
                case.body[name] = 4
    checks = [CHECKS.get_one(name) for name in WANTED]
    case.call_and_validate(checks=checks, headers={"host": "localhost"})


def test_the_document_describes_every_body():
    document = APP.openapi()
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method in methods.values():
            if "requestBody" in method:
                reference = method["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                assert reference.rpartition("/")[2] in schemas, path
    assert {m.__name__ for m in APP.state.body_models} <= set(schemas)
    assert all(issubclass(m, ApiModel) for m in APP.state.body_models)
