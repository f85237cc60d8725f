"""litellm and lm-eval against a real server: `pip install '.[test,clients]'`, without which these tests are skipped."""

import asyncio
import json
import os
from importlib.resources import files

import pytest

from moejet.server import asgi_app
from moejet.testing.scripted_backend import ScriptedBackend
from moejet.ticket import QueueFullError

MODEL = "tiny-reasoner"
MESSAGES = [{"role": "user", "content": "Start with 17, add 25."}]
CALLING = (
    'I should add.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 17}}\n</tool_call>'
)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]


@pytest.fixture(scope="module")
def litellm():
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    found = pytest.importorskip("litellm", reason="litellm is not installed: the extra clients")
    found.suppress_debug_info = True
    return found


@pytest.fixture(scope="module")
def lm_eval():
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: the extra clients")


def _options(server, provider="hosted_vllm", key="-"):
    base = server.url if provider == "anthropic" else f"{server.url}/v1"
    return {
        "model": f"{provider}/{MODEL}",
        "api_base": base,
        "api_key": key,
        "num_retries": 0,
        "max_retries": 0,
    }


@pytest.fixture(scope="module")
def calling(serve, tool_tokenizer):
    """A server whose model calls a tool."""
    return serve(asgi_app(ScriptedBackend([CALLING], tool_tokenizer, tokens_per_delta=4)))


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_litellm_completes(litellm, served, provider):
    options = _options(served, provider)
    reply = litellm.completion(messages=MESSAGES, temperature=0, max_tokens=200, **options)
    message = reply.choices[0].message
    assert message.content == "The answer is 42."
    assert "042" in message.reasoning_content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == 36
    assert reply.usage.completion_tokens_details.reasoning_tokens == 26


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_litellm_streams(litellm, served, provider):
    async def main():
        stream = await litellm.acompletion(
            messages=MESSAGES,
            temperature=0,
            max_tokens=200,
            stream=True,
            stream_options={"include_usage": True},
            **_options(served, provider),
        )
        return [chunk async for chunk in stream]

    chunks = asyncio.run(main())
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(d.content or "" for d in deltas) == "The answer is 42."
    assert "042" in "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert chunks[-1].usage.completion_tokens == 36
    reasons = {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices}
    assert reasons == {None, "stop"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_litellm_sees_tool_calls(litellm, calling, provider, stream):
    reply = litellm.completion(
        messages=MESSAGES,
        tools=TOOLS,
        stream=stream,
        max_tokens=100,
        **{**_options(calling, provider), "model": f"{provider}/scripted"},
    )
    if stream:
        reply = litellm.stream_chunk_builder(list(reply), messages=MESSAGES)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 17}


def test_litellm_sends_results_of_tools_back(litellm, calling):
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "add", "arguments": '{"a": 17}'}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": "42"},
    ]
    options = {**_options(calling), "model": "hosted_vllm/scripted"}
    assert litellm.completion(messages=turns, tools=TOOLS, **options).choices[0].message


def test_litellm_completes_text_and_responds(litellm, served):
    options = _options(served, "text-completion-openai")
    reply = litellm.text_completion(prompt="Start with 17", max_tokens=4, temperature=0, **options)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 4
    reply = litellm.responses(
        input=MESSAGES[0]["content"], temperature=0, **_options(served, "openai")
    )
    assert [item.type for item in reply.output] == ["reasoning", "message"]
    assert reply.output[1].content[0].text == "The answer is 42."


def test_litellm_maps_errors(litellm, served, serve, app, llm, tool_tokenizer):
    def raised(expected, server=served, key="-", **fields):
        with pytest.raises(expected) as caught:
            litellm.completion(**{**_options(server, key=key), "messages": MESSAGES, **fields})
        return str(caught.value)

    assert "temperature=-1" in raised(litellm.BadRequestError, temperature=-1)
    raised(litellm.NotFoundError, model="hosted_vllm/other")
    long = [{"role": "user", "content": "x " * 5000}]
    assert "2048" in raised(litellm.ContextWindowExceededError, messages=long)
    locked = serve(asgi_app(llm, api_keys=("right",)))
    raised(litellm.AuthenticationError, locked, key="wrong")
    full = ScriptedBackend(
        ["x"], tool_tokenizer, error=QueueFullError("5 requests wait", 2.2), refuses=True
    )
    options = {"model": "hosted_vllm/scripted"}
    assert "5 requests" in raised(litellm.ServiceUnavailableError, serve(asgi_app(full)), **options)


TASKS = {
    "sums_choice": """
output_type: multiple_choice
doc_to_text: "{{question}} The answer is"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "sums_generate": r"""
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n\n\n"], max_gen_toks: 300, temperature: 0}
filter_list:
  - name: last
    filter: [{function: regex, regex_pattern: "The answer is (-?[0-9]+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def evaluate(lm_eval, served, tmp_path_factory):
    """Runs tasks of a few sums; returns scores and samples by task."""
    from lm_eval.tasks import TaskManager

    root = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": f"Start with {a}, add {b}.", "answer": a + b, "choices": [f" {a + b}.", " x"]}
        for a, b in ((17, 25), (5, 9), (30, 12), (8, 8))
    ]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, documents)))
    data = f"dataset_path: json\ndataset_kwargs: {{cache_dir: {root}/cache, data_files: "
    for name, text in TASKS.items():
        source = f"{data}{{test: {root}/sums.jsonl}}}}\ntest_split: test\n"
        (root / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    manager = TaskManager(include_path=str(root), include_defaults=False)

    def run(kind, path, tasks, **options):
        given = {"model": MODEL, "base_url": f"{served.url}{path}", "max_retries": 1, **options}
        found = lm_eval.simple_evaluate(
            model=kind,
            model_args=",".join(f"{name}={value}" for name, value in given.items()),
            tasks=tasks,
            task_manager=manager,
            bootstrap_iters=0,
            apply_chat_template="generate" in tasks[0],
        )
        return found["results"], found["samples"]

    return run


@pytest.mark.parametrize("options", [{}, {"tokenized_requests": False}, {"num_concurrent": 4}])
def test_lm_eval_scores_what_the_engine_scores(evaluate, llm, options):
    """loglikelihood: echoed prompts with their log-probabilities, tokenised by the server."""
    results, samples = evaluate("local-completions", "/v1/completions", ["sums_choice"], **options)
    assert results["sums_choice"]["acc,none"] == 1.0
    num_compared = 0
    for sample in samples["sums_choice"]:
        for request, [(logprob, is_greedy)] in zip(
            sample["arguments"], sample["resps"], strict=True
        ):
            context, continuation = request
            ids = llm.tokenizer.encode(context + continuation, add_special_tokens=False)
            begin = len(llm.tokenizer.encode(context, add_special_tokens=False))
            scores = asyncio.run(llm.score_top(ids, 1))[begin - 1 :]
            assert logprob == pytest.approx(sum(s.logprob for s in scores), abs=0.05)
            assert is_greedy == all(s.token_id == s.top[0][0] for s in scores)
            num_compared += 1
    assert num_compared == 8


# lm-eval renders conversations for text completions itself, for which it wants the model's files.
FILES = {"tokenizer_backend": "huggingface", "tokenizer": files("moejet") / "assets/tiny_reasoner"}


@pytest.mark.parametrize(
    ("kind", "path", "options"),
    [
        ("local-completions", "/v1/completions", FILES),
        ("local-completions", "/v1/completions", {**FILES, "batch_size": 4}),
        ("local-chat-completions", "/v1/chat/completions", {"num_concurrent": 4}),
    ],
)
def test_lm_eval_generates(evaluate, kind, path, options):
    results, samples = evaluate(kind, path, ["sums_generate"], **options)
    assert len(samples["sums_generate"]) == 4
    assert results["sums_generate"]["exact_match,last"] == 1.0
