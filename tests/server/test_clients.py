"""The official clients against a real server."""

import asyncio
import json

import anthropic
import openai
import pytest

from moejet.server import asgi_app
from moejet.testing.scripted_backend import ScriptedBackend

QUESTION = "Start with 17, add 25."
MESSAGES = [{"role": "user", "content": QUESTION}]
MODEL = "tiny-reasoner"
GREEDY = {"extra_body": {"temperature": 0}}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": 25}}\n</tool_call>'
CALLING = f"I should add.\n</think>\n\nWait. {CALL}"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(served):
    with anthropic.Anthropic(base_url=served.url, api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def caller(serve, tool_tokenizer):
    """A server whose model calls a tool."""
    return serve(asgi_app(ScriptedBackend([CALLING], tool_tokenizer, tokens_per_delta=4)))


@pytest.fixture(scope="module")
def calling_client(caller):
    with openai.OpenAI(base_url=f"{caller.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_openai_lists_the_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_openai_chats(client):
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    assert reply.choices[0].message.content == "The answer is 42."
    assert "042" in reply.choices[0].message.reasoning_content
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    assert reply._request_id


def test_openai_streams(client):
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, temperature=0, stream_options={"include_usage": True}
    ) as stream:
        content = [e.delta for e in stream if e.type == "content.delta"]
        final = stream.get_final_completion()
    # How many pieces there are depends on how fast they are read: what waits is merged.
    assert "".join(content) == final.choices[0].message.content == "The answer is 42."
    assert final.usage.completion_tokens == 36


def test_openai_parses_a_schema(client):
    from pydantic import BaseModel, Field

    class Sum(BaseModel):
        value: int = Field(ge=0, le=99)

    reply = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Sum, temperature=0
    )
    assert 0 <= reply.choices[0].message.parsed.value <= 99


def test_openai_sees_tool_calls(calling_client):
    function = {"name": "add", "parameters": PARAMETERS}
    body = {"model": "scripted", "messages": MESSAGES}
    tools = [{"type": "function", "function": function}]
    reply = calling_client.chat.completions.create(**body, tools=tools)
    call = reply.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 17, "b": 25})
    with calling_client.chat.completions.stream(**body, tools=tools) as stream:
        final = stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls[0]
    assert json.loads(streamed.function.arguments) == {"a": 17, "b": 25}
    assert final.choices[0].finish_reason == "tool_calls"


def test_openai_completes(client):
    reply = client.completions.create(
        model=MODEL, prompt=["Start with 17", "x"], max_tokens=2, logprobs=2, echo=True
    )
    assert [c.index for c in reply.choices] == [0, 1]
    assert reply.choices[0].text.startswith("Start with 17")
    assert reply.choices[0].logprobs.token_logprobs[0] is None
    parts = list(client.completions.create(model=MODEL, prompt="x", max_tokens=3, stream=True))
    assert parts[-1].choices[0].finish_reason == "length"


def test_openai_responds(client):
    reply = client.responses.create(model=MODEL, input=QUESTION, temperature=0, store=False)
    assert reply.output_text == "The answer is 42."
    assert [item.type for item in reply.output] == ["reasoning", "message"]
    assert reply.usage.output_tokens_details.reasoning_tokens > 0
    short = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=3)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_openai_streams_responses(client):
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert [e.sequence_number for e in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == final.output_text == "The answer is 42."
    for opened, closed in (("output_item.added", "output_item.done"),):
        assert kinds.count(f"response.{opened}") == kinds.count(f"response.{closed}") == 2


def test_openai_responds_with_calls_and_takes_their_results(calling_client):
    tools = [{"type": "function", "name": "add", "parameters": PARAMETERS, "strict": False}]
    body = {"model": "scripted", "tools": tools}
    reply = calling_client.responses.create(input=QUESTION, **body)
    call = reply.output[-1]
    assert (call.type, call.name) == ("function_call", "add")
    assert json.loads(call.arguments) == {"a": 17, "b": 25}
    with calling_client.responses.stream(input=QUESTION, **body) as stream:
        final = stream.get_final_response()
    assert json.loads(final.output[-1].arguments) == {"a": 17, "b": 25}
    history = [
        {"role": "user", "content": QUESTION},
        *[item.model_dump(exclude_none=True) for item in reply.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "42"},
    ]
    assert calling_client.responses.create(input=history, **body).status == "completed"


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"background": True},
        {"store": True},
        {"truncation": "auto"},
        {"prompt": {"id": "pmpt_1"}},
    ],
)
def test_openai_hears_that_nothing_is_remembered(client, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="hi", **fields)
    assert caught.value.param == next(iter(fields))


def test_openai_hears_of_mistakes(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="top_p=0") as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, top_p=0)
    assert caught.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="did you mean"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"sead": 1})


def test_openai_cancels_a_stream(client, llm, eventually):
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert llm.health()["requests"] == 1
    stream.close()
    eventually(lambda: llm.health()["requests"] == 0)


def test_anthropic_converses(claude):
    reply = claude.messages.create(
        model=MODEL, messages=MESSAGES, max_tokens=200, system="Count.", **GREEDY
    )
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert reply.stop_reason == "end_turn"
    assert reply.usage.output_tokens > 10
    again = claude.messages.create(
        model=MODEL,
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": [b.model_dump() for b in reply.content]},
            *MESSAGES,
        ],
        max_tokens=2,
    )
    assert again.stop_reason == "max_tokens"


def test_anthropic_streams(claude):
    with claude.messages.stream(model=MODEL, messages=MESSAGES, max_tokens=200, **GREEDY) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert final.content[-1].text == "The answer is 42."
    assert "042" in final.content[0].thinking
    text = "".join(e.text for e in events if e.type == "text")
    assert text == "The answer is 42."
    assert final.usage.output_tokens == 36
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == 16


def test_anthropic_switches_the_thinking_and_limits_it(claude):
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 200, **GREEDY}
    off = claude.messages.create(**body, thinking={"type": "disabled"})
    assert [block.type for block in off.content] == ["text"]
    short = claude.messages.create(**body, thinking={"type": "enabled", "budget_tokens": 2})
    assert len(short.content[0].thinking) < 12


def test_anthropic_stops_where_it_is_told(claude):
    reply = claude.messages.create(
        model=MODEL, messages=MESSAGES, max_tokens=99, stop_sequences=[" is"], **GREEDY
    )
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", " is")
    assert reply.content[-1].text == "The answer"


def test_anthropic_keeps_to_a_schema(claude):
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "maximum": 9}}}
    closed = {**schema, "required": ["sum"], "additionalProperties": False}
    format = {"type": "json_schema", "schema": closed}
    reply = claude.messages.create(
        model=MODEL, messages=MESSAGES, max_tokens=200, output_config={"format": format}
    )
    assert json.loads(reply.content[-1].text)["sum"] <= 9


def test_anthropic_sees_tool_calls(caller):
    tools = [{"name": "add", "input_schema": PARAMETERS}]
    body = {"model": "scripted", "messages": MESSAGES, "max_tokens": 500, "tools": tools}
    with anthropic.Anthropic(base_url=caller.url, api_key="-", max_retries=0) as claude:
        reply = claude.messages.create(**body)
        assert reply.stop_reason == "tool_use"
        call = reply.content[-1]
        assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 17, "b": 25})
        with claude.messages.stream(**body) as stream:
            final = stream.get_final_message()
        assert final.content[-1].input == {"a": 17, "b": 25}
        assert [b.type for b in final.content] == ["thinking", "text", "tool_use"]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
        history = [
            *MESSAGES,
            {"role": "assistant", "content": [b.model_dump() for b in reply.content]},
            {"role": "user", "content": [result]},
        ]
        assert claude.messages.create(**{**body, "messages": history}).content


def test_anthropic_counts_tokens_and_lists_models(claude):
    assert claude.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens == 16
    assert [model.id for model in claude.models.list()] == [MODEL]


def test_anthropic_hears_of_mistakes(claude):
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(
            model=MODEL, messages=MESSAGES, max_tokens=9, extra_body={"top_k": -5}
        )
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.body["type"] == "error"
    ending = [*MESSAGES, {"role": "assistant", "content": "The"}]
    with pytest.raises(anthropic.BadRequestError, match="ends with the assistant"):
        claude.messages.create(model=MODEL, messages=ending, max_tokens=9)


def test_a_running_request_answers_now_or_ends_by_its_id(client, llm):
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "temperature": 0}
    # Thinks on for as long as it may, since the closing tag is forbidden.
    close = llm.tokenizer.token_to_id("</think>")
    stream = client.chat.completions.create(**body, logit_bias={str(close): -100})
    first = next(stream)
    client.post(f"/requests/{first.id}/end_thinking", cast_to=object)
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert text
    stream = client.chat.completions.create(**body, extra_body={"ignore_eos": True})
    first = next(stream)
    client.post(f"/requests/{first.id}/abort", cast_to=object)
    assert list(stream)[-1].choices[0].finish_reason == "abort"
    with pytest.raises(openai.NotFoundError):
        client.post(f"/requests/{first.id}/abort", cast_to=object)


def test_many_clients_at_once_get_their_own_answers(served):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="-") as client:

            async def one(i: int) -> None:
                question = [{"role": "user", "content": f"Start with {i}, add 25."}]
                stream = await client.chat.completions.create(
                    model=MODEL, messages=question, stream=True, temperature=0
                )
                thinking = ""
                async for chunk in stream:
                    thinking += getattr(chunk.choices[0].delta, "reasoning", None) or ""
                assert f"{i:03d}" in thinking

            await asyncio.gather(*[one(i) for i in range(10, 34)])

    asyncio.run(main())
