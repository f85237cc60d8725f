"""/v1/chat/completions, by the bytes that it sends."""

import json

import pytest

from moejet.server import asgi_app
from moejet.testing.scripted_backend import ScriptedBackend

MESSAGES = [{"role": "user", "content": "Start with 17, add 25."}]
PATH = "/v1/chat/completions"


def test_an_answer_has_thinking_and_content_apart(ask):
    reply = ask(PATH, {"messages": MESSAGES, "temperature": 0}).json
    message = reply["choices"][0]["message"]
    assert message["content"] == "The answer is 42."
    assert message["reasoning_content"] == message["reasoning"]
    assert "017 + 025 = 042" in message["reasoning"]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["object"] == "chat.completion"
    assert reply["usage"]["total_tokens"] == 16 + 36


def test_a_stream_says_the_same_in_order(ask):
    whole = ask(PATH, {"messages": MESSAGES, "temperature": 0}).json["choices"][0]["message"]
    body = {"messages": MESSAGES, "temperature": 0, "stream": True}
    reply = ask(PATH, {**body, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")
    *chunks, last = reply.events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [
        "stop"
    ]
    assert not any("reasoning" in d and "content" in d for d in deltas)
    assert "".join(d.get("reasoning_content", "") for d in deltas) == whole["reasoning_content"]
    assert "".join(d.get("content", "") for d in deltas) == whole["content"]
    kinds = ["content" if "content" in d else "reasoning" for d in deltas[1:-1]]
    assert kinds == sorted(kinds, reverse=True)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 36
    assert len({chunk["id"] for chunk in reply.events}) == 1
    assert "usage" not in ask(PATH, body).text


def test_usage_counts_thinking_and_cached_tokens(ask, llm):
    body = {"messages": [{"role": "user", "content": "Start with 17, add 25. " * 9}]}
    first = ask(PATH, {**body, "temperature": 0, "max_tokens": 40}).json
    again = ask(PATH, {**body, "temperature": 0, "max_tokens": 40}).json
    prompt_tokens = first["usage"]["prompt_tokens"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < prompt_tokens
    assert again["timings"]["cache_n"] == cached
    assert again["timings"]["prompt_n"] == prompt_tokens - cached
    reply = ask(PATH, {"messages": MESSAGES, "temperature": 0}).json
    thinking = reply["choices"][0]["message"]["reasoning_content"]
    # Between the prompt's opening tag and the answer: the thinking, a newline and the closing tag.
    tokens = llm.tokenizer.encode(thinking + "\n</think>", add_special_tokens=False)
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(tokens)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_the_thinking_has_the_name_that_the_server_was_given(llm, ask_app, field):
    ask = ask_app(asgi_app(llm, reasoning_field=field))
    message = ask(PATH, {"messages": MESSAGES, "temperature": 0}).json["choices"][0]["message"]
    assert {"reasoning_content", "reasoning"} & set(message) == {field}


def test_thinking_can_be_left_out_switched_off_and_limited(ask):
    body = {"messages": MESSAGES, "temperature": 0}
    hidden = ask(PATH, {**body, "include_reasoning": False}).json
    assert "reasoning_content" not in hidden["choices"][0]["message"]
    assert hidden["choices"][0]["message"]["content"] == "The answer is 42."
    assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    off = ask(PATH, {**body, "chat_template_kwargs": {"enable_thinking": False}}).json
    assert "reasoning_content" not in off["choices"][0]["message"]
    short = ask(PATH, {**body, "thinking_token_budget": 3}).json
    used = short["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert used <= 6
    assert short["choices"][0]["message"]["content"]


def test_samples_have_numbers_and_a_seed_repeats_them(ask):
    body = {"messages": MESSAGES, "n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 12}
    first, again = ask(PATH, body).json, ask(PATH, body).json
    assert [c["index"] for c in first["choices"]] == [0, 1, 2]
    texts = [c["message"].get("reasoning") for c in first["choices"]]
    assert texts == [c["message"].get("reasoning") for c in again["choices"]]
    assert first["usage"]["prompt_tokens"] == 16
    streamed = ask(PATH, {**body, "stream": True}).events
    joined = ["", "", ""]
    for chunk in streamed:
        for choice in chunk["choices"]:
            joined[choice["index"]] += choice["delta"].get("reasoning", "")
    assert joined == [text or "" for text in texts]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_cover_every_token(ask, llm, stream):
    body = {"messages": MESSAGES, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    reply = ask(PATH, {**body, "stream": stream})
    choices = [c["choices"][0] for c in reply.events] if stream else reply.json["choices"]
    found = [entry for c in choices for entry in (c["logprobs"] or {"content": []})["content"]]
    assert len(found) == 36
    text = b"".join(bytes(entry["bytes"]) for entry in found).decode()
    assert text.endswith("The answer is 42.<|eos|>")
    for entry in found:
        assert entry["logprob"] <= 0
        # Two tokens follow a grammar's or a budget's hand only; here the likeliest one was taken.
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert len(entry["top_logprobs"]) == 2


def test_stop_strings_biases_and_penalties_count(ask):
    body = {"messages": MESSAGES, "temperature": 0}
    stopped = ask(PATH, {**body, "stop": " is"}).json["choices"][0]
    assert stopped["message"]["content"] == "The answer"
    assert stopped["stop_reason"] == " is"
    plan = ask("/tokenize", {"prompt": "Plan"}).json["tokens"][0]
    biased = ask(PATH, {**body, "logit_bias": {str(plan): -100}}).json["choices"][0]
    assert not biased["message"]["reasoning"].startswith("Plan")
    length = ask(PATH, {**body, "max_completion_tokens": 5}).json["choices"][0]
    assert length["finish_reason"] == "length"
    assert length["message"]["content"] is None


def test_a_schema_is_kept_to(ask):
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    reply = ask(PATH, {"messages": MESSAGES, "temperature": 0, "response_format": format})
    assert 0 <= json.loads(reply.json["choices"][0]["message"]["content"])["sum"] <= 99
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    reply = ask(PATH, {"messages": MESSAGES, **choice})
    assert reply.json["choices"][0]["message"]["content"] in ("yes", "no")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            },
        },
    }
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": 25}}\n</tool_call>'


@pytest.mark.parametrize("tokens_per_delta", [1, 3, 1000])
def test_tool_calls_come_whole_and_in_parts(tool_tokenizer, ask_app, tokens_per_delta):
    text = f"I should add.\n</think>\n\nWait a moment. {CALL}"
    backend = ScriptedBackend([text], tool_tokenizer, tokens_per_delta=tokens_per_delta)
    ask = ask_app(asgi_app(backend))
    body = {"messages": MESSAGES, "tools": TOOLS}
    choice = ask(PATH, body).json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning"] == "I should add."
    call = choice["message"]["tool_calls"][0]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 17, "b": 25}
    deltas = [c["choices"][0]["delta"] for c in ask(PATH, {**body, "stream": True}).events]
    parts = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    assert parts[0]["id"]
    assert parts[0]["function"]["name"] == "add"
    assert {part["index"] for part in parts} == {0}
    arguments = "".join(part["function"]["arguments"] for part in parts)
    assert json.loads(arguments) == {"a": 17, "b": 25}
    assert all(len(d.keys() & {"reasoning", "content", "tool_calls"}) <= 1 for d in deltas)


def test_a_required_tool_is_called_by_the_real_model(tool_app, ask_app):
    choice = {"type": "function", "function": {"name": "add"}}
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "temperature": 0}
    reply = ask_app(tool_app)(PATH, {**body, "max_tokens": 300, "thinking_token_budget": 5}).json
    call = reply["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "add"
    assert reply["choices"][0]["finish_reason"] in ("tool_calls", "length")


def test_a_call_and_its_result_go_back_to_the_model(tool_tokenizer, ask_app):
    backend = ScriptedBackend(["</think>\n\n42"], tool_tokenizer)
    function = {"name": "add", "arguments": '{"a": 17, "b": 25}'}
    messages = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "x", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "x", "content": "42"},
    ]
    reply = ask_app(asgi_app(backend))(PATH, {"messages": messages, "tools": TOOLS})
    assert reply.json["choices"][0]["message"]["content"] == "42"
    prompt = backend.jobs[0].prompt
    assert '{"name": "add", "arguments": {"a": 17, "b": 25}}</tool_call><|user|>42' in prompt


def test_tools_are_not_offered_where_they_may_not_be_called(tool_tokenizer, ask_app):
    backend = ScriptedBackend([f"</think>\n\n{CALL}"], tool_tokenizer)
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none"}
    message = ask_app(asgi_app(backend))(PATH, body).json["choices"][0]["message"]
    assert message["content"] == CALL
    assert "Tools:" not in backend.jobs[0].prompt


def test_fields_that_say_nothing_about_the_answer_are_taken(ask):
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "logit_bias": {},
        "best_of": None,
        "unknown": None,
    }
    assert ask(PATH, {"messages": MESSAGES, "max_tokens": 1, **harmless}).status == 200


def test_prompt_progress_and_signs_of_life_are_sent(tool_tokenizer, ask_app):
    backend = ScriptedBackend(["</think>\n\nhi"], tool_tokenizer, delay_s=0.12)
    done = iter((4, 8, 12, 12, 12))
    backend.progress = lambda _: (next(done, 12), 99, 4)
    ask = ask_app(asgi_app(backend, keep_alive_s=0.05))
    quiet = ask(PATH, {"messages": MESSAGES, "stream": True})
    assert quiet.text.count(": keep-alive\n\n") >= 1
    backend.delay_s = 0.3
    ask = ask_app(asgi_app(backend, keep_alive_s=20.0))
    told = ask(
        PATH, {"messages": MESSAGES, "stream": True, "return_progress": True, "max_tokens": 1}
    )
    found = [c["prompt_progress"] for c in told.events if "prompt_progress" in c]
    assert all(progress["cache"] == 4 for progress in found)
    steps = [progress["processed"] for progress in found]
    assert steps
    assert steps == sorted(set(steps))
