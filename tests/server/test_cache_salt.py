"""Cached prefixes are found by those who may know that they are there: by salt and by key."""

import pytest

from moejet.server import asgi_app

WORDS = "Start with 17, add 25, then multiply by 3, and tell nobody. " * 3
TURNS = [{"role": "user", "content": WORDS}]
PROMPT = "You are terse. " + WORDS


def _cached(reply):
    assert reply.status == 200, reply.text
    used = reply.json["usage"]
    for name in ("prompt_tokens_details", "input_tokens_details"):
        if name in used:
            return used[name]["cached_tokens"]
    return used["cache_read_input_tokens"]


@pytest.fixture
def cached(llm, ask_app):
    """How much of a question was cached, asked with a key at a server with options."""

    def ask(path, body, key=None, **options):
        app = asgi_app(llm, api_keys=("first", "second"), **options)
        headers = {"authorization": f"Bearer {key or 'first'}"}
        return _cached(ask_app(app)(path, body, headers=headers))

    return ask


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": TURNS, "max_tokens": 1}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 1}),
        ("/v1/responses", {"input": "Be kind. " + WORDS, "max_output_tokens": 1}),
        ("/v1/messages", {"messages": TURNS, "system": "Be brief.", "max_tokens": 1}),
    ],
)
def test_keys_share_no_prefixes_and_a_key_finds_its_own(cached, path, body):
    assert cached(path, body, "first") == 0
    assert cached(path, body, "second") == 0
    again = cached(path, body, "first")
    assert again >= 32
    assert cached(path, body, "second") == again
    # A salt of the request's own sets it apart within its key.
    salted = {**body, "cache_salt": "mine"}
    assert cached(path, salted, "first") == 0
    assert cached(path, salted, "second") == 0
    assert cached(path, salted, "first") == again


def test_keys_may_share_where_that_is_wanted(cached):
    body = {"prompt": "Shared. " + PROMPT, "max_tokens": 1}
    assert cached("/v1/completions", body, "first", share_cache=True) == 0
    again = cached("/v1/completions", body, "second", share_cache=True)
    assert again >= 32
    # Who has a salt by its key does not find what was computed without one.
    assert cached("/v1/completions", body, "first") == 0
    salted = {**body, "cache_salt": "x"}
    assert cached("/v1/completions", salted, "first", share_cache=True) == 0
    assert cached("/v1/completions", salted, "second", share_cache=True) == again


def test_one_key_or_none_needs_no_salt(llm, ask_app):
    body = {"prompt": "Alone. " + PROMPT, "max_tokens": 1}
    assert _cached(ask_app(asgi_app(llm))("/v1/completions", body)) == 0
    alone = ask_app(asgi_app(llm, api_keys=("only",)))
    assert _cached(alone("/v1/completions", body, headers={"x-api-key": "only"})) >= 32


@pytest.mark.parametrize("salt", ["", "x" * 129, 5, ["a"]])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_impossible_salts_are_refused(ask, path, salt):
    reply = ask(path, {"messages": TURNS, "max_tokens": 1, "cache_salt": salt})
    assert reply.status == 400
    assert "cache_salt" in reply.json["error"]["message"]


def test_a_salt_is_not_logged(llm, ask_app, caplog):
    with caplog.at_level("DEBUG"):
        body = {"messages": TURNS, "max_tokens": 1, "cache_salt": "secret-salt"}
        assert ask_app(asgi_app(llm, log_prompts=True))("/v1/chat/completions", body).status == 200
    assert "secret-salt" not in caplog.text
