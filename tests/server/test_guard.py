"""Keys, hosts, origins and limits, before any endpoint is reached."""

import contextlib
import json
import logging
import socket

import pytest

from moejet.server import ServerConfig, asgi_app

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture
def guarded(llm, ask_app):
    return lambda **options: ask_app(asgi_app(llm, **options))


def test_every_path_but_health_needs_a_key(guarded, app):
    ask = guarded(api_keys=("right", "other"))
    for path in app.openapi()["paths"]:
        for key in (None, "wrong", "", "righ", "rightt"):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            reply = ask(path, headers=headers)
            if path in ("/health", "/ready"):
                assert reply.status != 401
                continue
            assert reply.status == 401
            assert "right" not in reply.text
    assert ask("/nothing").status == 401
    for headers in ({"authorization": "Bearer right"}, {"x-api-key": "other"}):
        assert ask("/v1/models", headers=headers).status == 200
    reply = ask("/v1/messages", HELLO)
    assert reply.json == {
        "type": "error",
        "error": {"type": "authentication_error", "message": reply.json["error"]["message"]},
    }


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("page.localhost", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
    ],
)
def test_only_own_names_are_answered(guarded, host, status):
    assert guarded()("/version", headers={"host": host}).status == status


def test_other_names_can_be_allowed(guarded):
    ask = guarded(allowed_hosts=("model.example",))
    assert ask("/version", headers={"host": "model.example:80"}).status == 200
    assert ask("/version", headers={"host": "localhost"}).status == 403


def test_foreign_pages_are_refused_unless_allowed(guarded):
    evil = {"origin": "https://evil.example"}
    ask = guarded()
    assert ask(CHAT, HELLO, headers={"origin": "http://localhost"}).status == 200
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", ""):
        reply = ask(CHAT, HELLO, headers={"origin": origin})
        assert reply.status == 403
        assert "access-control-allow-origin" not in reply.headers
    preflight = {**evil, "access-control-request-method": "POST"}
    assert ask(CHAT, method="OPTIONS", headers=preflight).status == 403
    ask = guarded(cors_origins=("https://evil.example",), api_keys=("k",))
    allowed = ask(CHAT, method="OPTIONS", headers=preflight)
    assert allowed.status == 204
    assert allowed.headers["access-control-allow-origin"] == "https://evil.example"
    assert "access-control-allow-credentials" not in allowed.headers
    reply = ask(CHAT, HELLO, headers={**evil, "authorization": "Bearer k"})
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "https://evil.example"
    assert "origin" in reply.headers["vary"].lower()
    assert ask(CHAT, HELLO, headers=evil).status == 401


def test_large_headers_and_bodies_are_refused(guarded):
    ask = guarded(max_body_bytes=2000, max_header_bytes=4000, max_header_count=20)
    assert ask(CHAT, HELLO, headers={"x": "y" * 5000}).status == 431
    assert ask(CHAT, HELLO, headers={f"x{i}": "y" for i in range(30)}).status == 431
    assert ask(f"/version?{'q' * 5000}").status == 431
    assert ask(CHAT, {**HELLO, "user": "x" * 3000}).status == 413

    async def parts():
        for _ in range(100):
            yield b" " * 100

    kind = {"content-type": "application/json"}
    reply = ask(CHAT, content=parts(), headers=kind)  # without content-length
    assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_large")
    assert ask(CHAT, HELLO).status == 200


def test_a_body_that_never_ends_is_given_up(llm, serve, eventually):
    server = serve(asgi_app(llm, body_timeout_s=0.3))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        connection.sendall(head + b"content-type: application/json\r\ncontent-length: 500\r\n\r\n{")
        connection.settimeout(10)
        assert b" 408 " in connection.recv(4096)


def test_an_enormous_header_is_refused_by_a_real_server(served):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.settimeout(20)
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: localhost\r\nx: ")
        answer = b""
        with contextlib.suppress(OSError):
            for _ in range(1000):
                connection.sendall(b"y" * 100_000)
        with contextlib.suppress(OSError):
            answer = connection.recv(4096)
        assert answer == b"" or b" 400 " in answer or b" 431 " in answer


def test_two_hundred_idle_connections_hold_up_nobody(served, ask):
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(200)]
    try:
        for connection in idle:
            connection.sendall(b"GET /version HTTP/1.1\r\nhost: local")
        import httpx

        assert httpx.get(f"{served.url}/version", timeout=60).status_code == 200
        for connection in idle:  # they are still waited for
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
    finally:
        for connection in idle:
            connection.close()


def test_requests_have_ids_that_clients_may_choose(guarded):
    ask = guarded()
    assert ask("/version", headers={"x-request-id": "my-1"}).headers["x-request-id"] == "my-1"
    for bad in ("a b", "x" * 200, ""):
        found = ask("/version", headers={"x-request-id": bad}).headers["x-request-id"]
        assert found != bad
        assert len(found) == 32


def test_logs_hold_no_prompts_and_no_keys(guarded, caplog):
    ask = guarded(api_keys=("secret-key",))
    body = {**HELLO, "messages": [{"role": "user", "content": "private words"}]}
    key = {"authorization": "Bearer secret-key"}
    with caplog.at_level(logging.DEBUG):
        assert ask(CHAT, body, headers=key).status == 200
        assert ask(CHAT, {**body, "n": 0}, headers=key).status == 400
        assert ask("/version?api_key=secret-key", headers=key).status == 200
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("moejet")]
    assert any(CHAT in line for line in ours)
    assert not any("private" in line or "secret" in line for line in ours)


def test_prompts_are_logged_where_that_is_asked_for(guarded, caplog):
    ask = guarded(log_prompts=True)
    with caplog.at_level(logging.INFO, logger="moejet"):
        assert ask(CHAT, {**HELLO, "messages": [{"role": "user", "content": "my words"}]}).status
    lines = [r.getMessage() for r in caplog.records]
    assert any("asks" in line and "my words" in line for line in lines)
    assert any("was answered" in line for line in lines)


def test_an_app_can_be_mounted_below_a_path(llm, ask_app):
    from fastapi import FastAPI

    outer = FastAPI()
    outer.mount("/llm", asgi_app(llm, api_keys=("k",)))
    ask = ask_app(outer)
    assert ask("/llm/v1/models").status == 401
    key = {"x-api-key": "k"}
    assert ask("/llm/v1/models", headers=key).status == 200
    assert ask("/llm" + CHAT, HELLO, headers=key).status == 200
    assert ask("/llm/v1/messages", {}, headers=key).json["type"] == "error"


def test_config_and_options_do_not_mix(llm):
    with pytest.raises(ValueError, match="max_n"):
        asgi_app(llm, ServerConfig(), max_n=1)


def test_nothing_is_there_and_wrong_methods_have_json_errors(guarded):
    ask = guarded()
    assert ask("/v2").json["error"]["code"] == "not_found"
    reply = ask(CHAT)
    assert reply.status == 405
    assert json.loads(reply.text)["error"]["message"]
