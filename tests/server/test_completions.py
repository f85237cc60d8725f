"""/v1/completions, as lm-eval and others use it, /tokenize and /detokenize."""

import asyncio
from dataclasses import replace

import pytest

from moejet import AsyncLLM
from moejet.presets import PRESETS
from moejet.server import asgi_app

PATH = "/v1/completions"


def test_text_goes_on_with_its_tags(ask):
    prompt = "<|bos|><|user|>Start with 17, add 25.<|assistant|><think>\n"
    choice = ask(PATH, {"prompt": prompt, "temperature": 0, "max_tokens": 60}).json["choices"][0]
    assert choice["text"].endswith("</think>\n\nThe answer is 42.")
    assert choice["finish_reason"] == "stop"
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 60, "stream": True}
    chunks = ask(PATH, body).events
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    assert ask(PATH, {"prompt": prompt}).json["usage"]["completion_tokens"] == 16


def test_lists_of_texts_and_of_tokens_make_a_choice_each(ask, llm):
    texts = ["Start with 17", "Start with 3", "x"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    body = {"temperature": 0, "max_tokens": 3, "n": 2}
    by_text = ask(PATH, {"prompt": texts, **body}).json
    by_ids = ask(PATH, {"prompt": ids, **body}).json
    assert [c["index"] for c in by_text["choices"]] == list(range(6))
    found = [c["text"] for c in by_text["choices"]]
    assert found == [c["text"] for c in by_ids["choices"]]
    assert found[0] == found[1]
    assert by_text["usage"]["prompt_tokens"] == sum(map(len, ids))
    streamed = [""] * 6
    for chunk in ask(PATH, {"prompt": texts, **body, "stream": True}).events:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == found


def test_echoed_prompts_are_scored_as_lm_eval_wants_it(ask, llm):
    """ctxlen tokens of context, then a continuation: its log-probability and whether it is the likeliest."""
    context = llm.tokenizer.encode(
        "<|bos|><|user|>Start with 17, add 25.<|assistant|><think>\n", False
    )
    greedy = ask(PATH, {"prompt": context, "temperature": 0, "max_tokens": 4, "logprobs": 1}).json
    goal = llm.tokenizer.encode(greedy["choices"][0]["text"], add_special_tokens=False)
    assert len(goal) == 4
    body = {"prompt": [context + goal], "temperature": 0, "max_tokens": 1, "logprobs": 1}
    choice = ask(PATH, {**body, "echo": True, "seed": 1234}).json["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    scored = logprobs["token_logprobs"][len(context) : -1]
    top = logprobs["top_logprobs"][len(context) : -1]
    assert len(scored) == 4
    # Computed in one pass and one by one.
    alone = greedy["choices"][0]["logprobs"]["token_logprobs"]
    assert scored == pytest.approx(alone, abs=2e-3)
    assert all(value == max(best.values()) for value, best in zip(scored, top, strict=True))
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert len(logprobs["tokens"]) == len(context) + 4 + 1


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_may_be_asked_for_with_echo_only(ask, stream):
    body = {"prompt": "Start with 17", "max_tokens": 0, "stream": stream}
    reply = ask(PATH, {**body, "echo": True, "logprobs": 0})
    choices = [c["choices"][0] for c in reply.events] if stream else reply.json["choices"]
    assert "".join(c["text"] for c in choices) == "Start with 17"
    assert len(choices[0]["logprobs"]["tokens"]) == 5
    assert choices[-1]["finish_reason"] == "length"
    assert ask(PATH, body).status == 400


def test_limits_of_the_server_are_kept(llm, ask_app):
    ask = ask_app(asgi_app(llm, max_prompts=2, max_n=2, max_stop=2))
    assert ask(PATH, {"prompt": ["a", "b", "c"]}).json["error"]["param"] == "prompt"
    assert ask(PATH, {"prompt": "a", "n": 3}).json["error"]["param"] == "n"
    assert ask(PATH, {"prompt": "a", "stop": ["a", "b", "c"]}).json["error"]["param"] == "stop"


def test_tokens_and_texts_are_translated(ask, llm):
    reply = ask("/tokenize", {"prompt": "Start with 17", "return_token_strs": True}).json
    assert reply["tokens"] == llm.tokenizer.encode("Start with 17")
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == llm.max_context
    assert ask("/detokenize", {"tokens": reply["tokens"]}).json["prompt"] == "Start with 17"
    messages = [{"role": "user", "content": "Start with 17"}]
    chat = ask("/tokenize", {"messages": messages}).json
    rendered = llm.tokenizer.apply_chat_template(messages)
    assert chat["tokens"] == llm.tokenizer.encode(rendered, add_special_tokens=False)
    assert ask("/tokenize", {"prompt": "a", "messages": messages}).status == 400
    assert ask("/detokenize", {"tokens": [10**6]}).status == 400


def test_the_tokenizer_is_described(ask, llm):
    info = ask("/tokenizer_info").json
    tokenizer = llm.tokenizer
    assert info["eos_token"] == tokenizer.special_tokens["eos_token"]
    assert info["chat_template"] == tokenizer.chat_template
    assert (info["vocab_size"], info["model_max_length"]) == (tokenizer.vocab_size, llm.max_context)


def test_the_model_is_described(ask, llm):
    models = ask("/v1/models").json
    assert [m["id"] for m in models["data"]] == ["tiny-reasoner"]
    assert models["data"][0]["max_model_len"] == llm.max_context
    assert ask("/v1/models/tiny-reasoner").json == models["data"][0]
    other = ask("/v1/models/gpt-4")
    assert (other.status, other.json["error"]["code"]) == (404, "model_not_found")
    assert ask("/version").json["version"]
    assert ask("/props").json["thinks"] is True


def test_a_model_without_a_tokenizer_serves_token_ids(ask_app):
    shape = replace(
        PRESETS["deepseek-v2-lite"], num_hidden_layers=2, vocab_size=500, hidden_size=256
    )
    llm = AsyncLLM.synthetic(shape, max_context=64)
    ask = ask_app(asgi_app(llm))
    body = {"prompt": [1, 2, 3], "max_tokens": 2, "logprobs": 1, "echo": True, "ignore_eos": True}
    reply = ask(PATH, body).json
    assert reply["usage"]["completion_tokens"] == 2
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == 5
    for path, wrong in (
        (PATH, {"prompt": "text"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "text"}),
        (PATH, {**body, "prompt": [1] * 64}),
    ):
        assert ask(path, wrong).status == 400
    asyncio.run(llm.close(drain=False))
