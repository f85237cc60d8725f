"""Every field that the official clients can send: it counts, says nothing about the answer, or is refused by name."""

import json
from importlib import import_module
from typing import Any

import pytest

TURNS = [{"role": "user", "content": "Start with 17."}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"name": "f", "parameters": SCHEMA}
OK, NO = 200, 400

# By field: values, and whether a request with each is answered. What a field does is tested elsewhere.
SAMPLING: dict[str, list[tuple[Any, int]]] = {
    "frequency_penalty": [(0.5, OK), (3, NO)],
    "logit_bias": [({"5": -100, "6": 100}, OK), ({"5": 101}, NO), ({}, OK)],
    "n": [(2, OK), (0, NO)],
    "presence_penalty": [(-2, OK), (-2.1, NO)],
    "seed": [(-(2**63), OK), (2**63, NO)],
    "stop": [("x", OK), (["x", "\u00e9"], OK), ("", NO)],
    "stream_options": [({"include_usage": True}, OK), ({"include": True}, NO)],
    "temperature": [(0, OK), (1.5, OK), (-0.1, NO)],
    "top_p": [(0.01, OK), (0, NO)],
    "user": [("me", OK)],
}
NOTES: dict[str, list[tuple[Any, int]]] = {
    "metadata": [({"a": "b"}, OK)],
    "prompt_cache_key": [("k", OK)],
    "prompt_cache_options": [({}, OK)],
    "prompt_cache_retention": [("24h", OK)],
    "safety_identifier": [("me", OK)],
    "service_tier": [("auto", OK)],
}
TOOLS: dict[str, list[tuple[Any, int]]] = {
    "parallel_tool_calls": [(True, OK), ("yes", NO)],
    "tool_choice": [("none", OK), ("auto", OK), ("some", NO)],
}
CHAT = {
    **SAMPLING,
    **NOTES,
    **TOOLS,
    "audio": [({"voice": "x"}, NO)],
    "function_call": [("none", OK), ({"name": "f"}, NO)],
    "functions": [([], OK), ([FUNCTION], NO)],
    "logprobs": [(True, OK), (1, NO)],
    "max_completion_tokens": [(2, OK), (0, NO)],
    "max_tokens": [(2, OK), (0, NO)],
    "messages": [(TURNS, OK), ([], NO)],
    "modalities": [(["text"], OK), (["audio"], NO)],
    "model": [("tiny-reasoner", OK), ("gpt-5", 404)],
    "moderation": [({}, NO)],
    "prediction": [({"type": "content", "content": "x"}, OK)],
    "reasoning_effort": [("high", OK), ("none", OK), ("some", NO)],
    "response_format": [({"type": "text"}, OK), ({"type": "json_object"}, OK), ({"type": "x"}, NO)],
    "store": [(False, OK), (True, NO)],
    "tools": [([], OK), ([{"type": "function", "function": FUNCTION}], NO)],  # knows none
    "top_logprobs": [(21, NO)],
    "verbosity": [("medium", OK), ("low", NO)],
    "web_search_options": [({}, NO)],
}
COMPLETIONS = {
    **SAMPLING,
    "best_of": [(1, OK), (2, NO)],
    "echo": [(True, OK)],
    "logprobs": [(2, OK), (-1, NO)],
    "max_tokens": [(1, OK), (0, NO)],
    "model": [("tiny-reasoner", OK), ("gpt-5", 404)],
    "prompt": [("x", OK), ([[5], [6, 7]], OK), ("", NO)],
    "suffix": [("", OK), ("x", NO)],
}
RESPONSES = {
    **NOTES,
    **TOOLS,
    "access_programs": [([], NO)],
    "background": [(False, OK), (True, NO)],
    "background_options": [({}, NO)],
    "context_management": [([], NO)],
    "conversation": [("c", NO)],
    "image": [({}, NO)],
    "include": [(["reasoning.encrypted_content"], OK)],
    "input": [("x", OK), (TURNS, OK), ("", NO)],
    "instructions": [("Be brief.", OK), (5, NO)],
    "max_output_tokens": [(2, OK), (0, NO)],
    "max_tool_calls": [(3, OK)],
    "model": [("tiny-reasoner", OK), ("gpt-5", 404)],
    "moderation": [({}, NO)],
    "previous_response_id": [("resp_1", NO)],
    "prompt": [({"id": "p"}, NO)],
    "reasoning": [({"effort": "low"}, OK), ({"effort": "x"}, NO)],
    "store": [(False, OK), (True, NO)],
    "stream_options": [({"include_obfuscation": False}, OK), ({"x": 1}, NO)],
    "temperature": [(0, OK), (-1, NO)],
    "text": [({"format": {"type": "json_object"}}, OK), ({"x": 1}, NO)],
    "tools": [([], OK), ([{"type": "web_search"}], NO)],
    "top_logprobs": [(2, OK), (21, NO)],
    "top_p": [(0.5, OK), (2, NO)],
    "truncation": [("disabled", OK), ("auto", NO)],
    "user": [("me", OK)],
}
COUNT_TOKENS = {
    "cache_control": [({"type": "ephemeral"}, OK)],
    "messages": [(TURNS, OK), ([], NO)],
    "model": [("tiny-reasoner", OK), ("claude", 404)],
    "output_config": [({"effort": "low"}, OK), ({"x": 1}, NO)],
    "speed": [("standard", OK), ("fast", NO)],
    "system": [("Be brief.", OK), ([{"type": "text", "text": "x"}], OK), ([{"type": "image"}], NO)],
    "thinking": [({"type": "enabled", "budget_tokens": 1024}, OK), ({"type": "x"}, NO)],
    "tool_choice": [({"type": "none"}, OK), ({"type": "x"}, NO)],
    "tools": [([], OK), ([{"name": "f", "input_schema": SCHEMA}], NO)],
    "user_profile_id": [("me", OK)],
    "workspace_id": [("w", OK)],
}
MESSAGES = {
    **COUNT_TOKENS,
    "container": [("c", NO)],
    "diagnostics": [({}, OK)],
    "inference_geo": [("eu", OK)],
    "max_tokens": [(2, OK), (0, NO)],
    "metadata": [({"user_id": "me"}, OK)],
    "service_tier": [("auto", OK)],
    "stop_sequences": [(["x"], OK), ([""], NO)],
    "temperature": [(0.5, OK), (-1, NO)],
    "top_k": [(5, OK), (-2, NO)],
    "top_p": [(0.5, OK), (0, NO)],
}
# Path: what is sent beside the field, its table, and where the client declares its fields.
DIALECTS: dict[str, tuple[dict[str, Any], dict[str, list[tuple[Any, int]]], str]] = {
    "/v1/chat/completions": (
        {"messages": TURNS, "max_tokens": 1},
        CHAT,
        "openai.types.chat.completion_create_params:CompletionCreateParamsBase",
    ),
    "/v1/completions": (
        {"prompt": "Start", "max_tokens": 1},
        COMPLETIONS,
        "openai.types.completion_create_params:CompletionCreateParamsBase",
    ),
    "/v1/responses": (
        {"input": "Start with 17.", "max_output_tokens": 1},
        RESPONSES,
        "openai.types.responses.response_create_params:ResponseCreateParamsBase",
    ),
    "/v1/messages": (
        {"messages": TURNS, "max_tokens": 1},
        MESSAGES,
        "anthropic.types.message_create_params:MessageCreateParamsBase",
    ),
    "/v1/messages/count_tokens": (
        {"messages": TURNS},
        COUNT_TOKENS,
        "anthropic.types.message_count_tokens_params:MessageCountTokensParams",
    ),
}
CASES = [
    pytest.param(path, name, value, status, id=f"{path} {name}={json.dumps(value)[:40]}")
    for path, (_, table, _) in DIALECTS.items()
    for name, values in table.items()
    for value, status in values
]


@pytest.mark.parametrize("path", DIALECTS)
def test_no_field_of_the_official_client_is_forgotten(path):
    _, table, place = DIALECTS[path]
    module, _, name = place.partition(":")
    fields = set(getattr(import_module(module), name).__annotations__)
    known = {*table, "stream"}
    # Clients of other versions declare others; these are those that were there when the tables were written.
    missing = fields - known
    assert not missing, f"decide what becomes of {sorted(missing)}"


@pytest.mark.parametrize(("path", "name", "value", "status"), CASES)
def test_a_field_counts_or_is_refused_by_name(ask, path, name, value, status):
    body = {**DIALECTS[path][0], name: value}
    if name == "max_completion_tokens":
        del body["max_tokens"]
    reply = ask(path, body)
    assert reply.status == status, reply.text
    if status != OK:
        assert name in reply.json["error"]["message"]
