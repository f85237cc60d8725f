"""Grammars: whatever a random model writes under one fits it, and hostile ones are refused quickly."""

import json
import random
import re
import sys
import time

import pytest
import torch

from moejet import LLM, Grammar, SamplingParams
from moejet.policy import Inject, Keep, TokenPolicy
from moejet.testing.checkpoints import tiny_checkpoint

pytest.importorskip("llguidance")

OPTIONS = {
    "expert_format": "bf16",
    "dense_format": "fp32",
    "cache_dtype": "fp32",
    "max_context": 512,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", dtype=torch.bfloat16)
    with LLM(path, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reasoner():
    with LLM(num_threads=1, deterministic=True) as llm:
        yield llm


def _contents(llm, grammar, prompt="abc", **options):
    options = {"seed": 1, "max_tokens": 400, "n": 4, **options}
    # The opening tag may come first; here it must not.
    bias = {llm.tokenizer.token_to_id("<think>"): -100.0}
    params = SamplingParams(grammar=grammar, logit_bias=bias, **options)
    return llm.generate(prompt, params)[0].outputs


def _random_schema(rng: random.Random, depth: int = 3) -> dict:
    kinds = ["integer", "number", "string", "boolean", "null", "enum", "pattern", "const"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * 2 if depth else kinds)
    if kind == "integer":
        return {"type": "integer", "minimum": (low := rng.randint(-99, 99)), "maximum": low + 50}
    if kind == "number":
        return {"type": "number", "minimum": -1, "maximum": 1}
    if kind == "string":
        return {"type": "string", "minLength": (low := rng.randint(0, 3)), "maxLength": low + 5}
    if kind == "pattern":
        return {"type": "string", "pattern": "^[a-c]{2}-[0-9]{1,3}$"}
    if kind == "enum":
        return {"enum": rng.sample(["x", "ä\n", 3, True, None, [1], "</think>"], 3)}
    if kind == "const":
        return {"const": {"k": [1, "two"]}}
    if kind == "object":
        names = rng.sample(["name", "age", "grüße", "a b", 'q"'], rng.randint(0, 3))
        return {
            "type": "object",
            "properties": {name: _random_schema(rng, depth - 1) for name in names},
            "required": names[: rng.randint(0, len(names))],
            "additionalProperties": False,
        }
    if kind == "array":
        items = _random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": 1, "maxItems": 3}
    if kind == "anyOf":
        return {"anyOf": [_random_schema(rng, depth - 1) for _ in range(2)]}
    return {"type": kind}


def _fits(value, schema) -> bool:
    """A validator of its own for the schemas above."""
    if "anyOf" in schema:
        return any(_fits(value, s) for s in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(e) and value == e for e in schema["enum"])
    if "const" in schema:
        return value == schema["const"]
    kind = schema["type"]
    if kind in ("integer", "number"):
        is_kind = isinstance(value, int if kind == "integer" else int | float)
        is_kind = is_kind and not isinstance(value, bool)
        return is_kind and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        if "pattern" in schema:
            return isinstance(value, str) and re.fullmatch(schema["pattern"], value) is not None
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "null":
        return value is None
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(_fits(v, schema["items"]) for v in value)
        )
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= set(value) <= set(schema["properties"])
        and all(_fits(v, schema["properties"][k]) for k, v in value.items())
    )


def test_the_validator_refuses():
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}
    assert _fits([True], schema)
    assert not _fits([], schema)
    assert not _fits([1], schema)


@pytest.mark.parametrize("seed", range(25))
def test_random_schemas_at_temperature_one(llm, seed):
    schema = _random_schema(random.Random(seed))
    grammar = Grammar.json_schema(schema, compact=bool(seed % 2))
    for output in _contents(llm, grammar, seed=seed):
        assert output.finish_reason == "stop", (schema, output.text)
        assert _fits(json.loads(output.content), schema), (schema, output.text)


def test_schema_as_text_and_any_json(llm):
    text = '{"type": "array", "items": {"type": "null"}, "maxItems": 2}'
    for output in _contents(llm, Grammar.json_schema(text)):
        assert json.loads(output.content) in ([], [None], [None, None])
    assert Grammar.json_schema(text) == Grammar.json_schema(json.loads(text))
    compact = Grammar.json_schema({"const": {"a": 1, "b": [2, 3]}}, compact=True)
    assert {o.content for o in _contents(llm, compact)} == {'{"a":1,"b":[2,3]}'}


@pytest.mark.parametrize(
    "pattern", ["[0-9]{3}-[a-z]{1,5}", "(yes|no), (maybe|never)!?", "ä{2,4}€", r"\d+\.\d{2}"]
)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0, "n": 1}, {"presence_penalty": 2.0}])
def test_regular_expressions(llm, pattern, options):
    for output in _contents(llm, Grammar.regex(pattern), **options):
        if output.finish_reason == "stop":
            assert re.fullmatch(pattern, output.content), output.content
        else:
            assert pattern.startswith(r"\d+")  # which has no longest match
            assert re.fullmatch(r"[\d.]*", output.content)


def test_choices(llm):
    choices = ["yes", "no", "no idea", 'quo"te', "new\nline", "back\\slash", "日本"]
    seen = set()
    for seed in range(12):
        seen |= {o.content for o in _contents(llm, Grammar.choice(choices), seed=seed, n=8)}
    assert seen <= set(choices)
    assert len(seen) > 3
    only = _contents(llm, Grammar.choice(["certainly"]), n=1, logprobs=0)[0]
    assert only.content == "certainly"
    assert only.finish_reason == "stop"


def test_lark(llm):
    grammar = Grammar.lark('start: "(" start ")" | "x"')
    for output in _contents(llm, grammar, max_tokens=60):
        depth = output.content.count("(")
        assert output.content == "(" * depth + "x" + ")" * (depth if "x" in output.content else 0)


def test_forced_tokens_are_injected(llm):
    grammar = Grammar.json_schema({"const": {"temperature": "a long constant"}}, compact=True)
    before = llm.engine.counters.steps
    output = _contents(llm, grammar, n=1, logprobs=0, temperature=0.0)[0]
    assert json.loads(output.content) == {"temperature": "a long constant"}
    assert sum(e.is_injected for e in output.logprobs) >= len(output.token_ids) - 2
    assert llm.engine.counters.steps - before < 4


def test_limits_and_ends(llm):
    schema = {"type": "string", "minLength": 100}
    for output in _contents(llm, Grammar.json_schema(schema), max_tokens=10):
        assert (output.finish_reason, len(output.token_ids)) == ("length", 10)
    digits = Grammar.regex("[0-9]{1,3}")
    for output in _contents(llm, digits, ignore_eos=True, n=8):
        assert output.finish_reason == "stop"
        assert re.fullmatch("[0-9]{1,3}", output.content)


def test_samples_with_and_without_grammar_side_by_side(llm):
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    expected = llm.generate("abc", params)[0].outputs[0].token_ids
    both = llm.generate(
        ["abc", "abc"], [params, SamplingParams(grammar=Grammar.choice(["a", "b"]), seed=1)]
    )
    assert both[0].outputs[0].token_ids == expected


CHAT = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"seed": 2}, {"seed": 2, "max_thinking_tokens": 5}]
)
def test_thinking_is_free(reasoner, options):
    free = reasoner.chat(CHAT, SamplingParams(max_tokens=300, **options))[0].outputs[0]
    schema = {
        "type": "object",
        "properties": {"result": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["result"],
        "additionalProperties": False,
    }
    # Compact: white space between the tokens of JSON has no longest form, and this model may like it.
    grammar = Grammar.json_schema(schema, compact=True)
    params = SamplingParams(max_tokens=300, grammar=grammar, **options)
    output = reasoner.chat(CHAT, params)[0].outputs[0]
    assert output.reasoning == free.reasoning
    assert 0 <= json.loads(output.content)["result"] <= 999
    assert "</think>\n\n" in output.text
    assert output.finish_reason == "stop"


def test_thinking_that_fills_max_tokens(reasoner):
    params = SamplingParams(temperature=0.0, max_tokens=10, grammar=Grammar.choice(["a"]))
    output = reasoner.chat(CHAT, params)[0].outputs[0]
    assert (output.content, output.finish_reason) == ("", "length")


def test_a_model_may_open_its_thinking_itself(llm):
    opening = llm.tokenizer.token_to_id("<think>")
    closing = llm.tokenizer.token_to_id("</think>")

    class Think(TokenPolicy):
        """Opens the thinking, and closes it after ten tokens of anything."""

        needs_logits = True

        def on_logits(self, state, row):
            if state.num_output_tokens in (0, 10):
                row[opening if state.num_output_tokens == 0 else closing] += 1000.0
            elif state.is_thinking:
                row[closing] = -torch.inf
            return row

    params = SamplingParams(
        seed=3, n=4, grammar=Grammar.regex("[0-9]{4}"), policy=Think, max_tokens=40
    )
    for output in llm.generate("abc", params)[0].outputs:
        assert output.token_ids[0] == opening
        assert len(output.reasoning) > 0
        assert re.fullmatch("[0-9]{4}", output.content)


def test_streams_and_branches(llm):
    grammar = Grammar.regex("[a-f]{5},[0-9]{5}")
    bias = {llm.tokenizer.token_to_id("<think>"): -100.0}
    params = SamplingParams(seed=1, grammar=grammar, logit_bias=bias)
    text = "".join(d.content for d in llm.stream("abc", params))
    assert re.fullmatch(grammar.text, text)
    with llm.branch("abc") as root:
        forks = root.fork(3)
        llm.advance(forks, until=",", params=params)
        assert all(re.fullmatch("[a-f]{5},", f.text) for f in forks)
        llm.advance(forks, params=params)
        assert all(re.fullmatch(grammar.text, f.text) for f in forks)


def test_injected_text_must_fit(llm):
    class Push(TokenPolicy):
        def on_token(self, state, token_id):
            return Inject(state.encode("zzz")) if state.num_output_tokens == 2 else Keep()

    params = SamplingParams(seed=1, grammar=Grammar.regex("[0-9]{40}"), policy=Push)
    with pytest.raises(ValueError, match="cannot be followed"):
        llm.generate("abc", params)
    assert not llm.engine.has_work


def _nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _cyclic() -> dict:
    schema: dict = {"type": "array"}
    schema["items"] = schema
    return schema


def _bushy() -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(30):
        schema = {"anyOf": [schema, schema]}
    return schema


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grammar.json_schema(_nested(100)), "nested deeper"),
        (lambda: Grammar.json_schema(_cyclic()), "nested deeper"),
        (lambda: Grammar.json_schema(_bushy()), "more than"),
        (lambda: Grammar.json_schema("[" * 100_000), "must be JSON"),
        (lambda: Grammar.json_schema("{"), "must be JSON"),
        (lambda: Grammar.json_schema("3"), "must be a dict"),
        (lambda: Grammar.json_schema(3), "must be a dict"),
        (lambda: Grammar.json_schema({"const": {1, 2}}), "must be writable"),
        (lambda: Grammar.json_schema({"const": float("nan")}), "must be writable"),
        (lambda: Grammar.json_schema({"enum": ["x" * 1000] * 1000}), "characters"),
        (
            lambda: Grammar.json_schema({"properties": {str(i): {} for i in range(2001)}}),
            "2001 mem",
        ),
        (lambda: Grammar.regex(""), "pattern=''"),
        (lambda: Grammar.regex("a" * 10**6), "characters"),
        (lambda: Grammar.regex("(a{1000}){1000}"), "1000000 times"),
        (lambda: Grammar.regex("(x|(?:a{9}b{30,}){40}){50}"), "60000 times"),
        (lambda: Grammar.lark("start: /a{1000}{1,1000}/"), "1000000 times"),
        (lambda: Grammar.json_schema({"pattern": "((a{99}){99}){99}"}), "970299 times"),
        (lambda: Grammar.choice([]), "choices"),
        (lambda: Grammar.choice("abc"), "choices"),
        (lambda: Grammar.choice(["a", ""]), "choices"),
        (lambda: Grammar.choice([str(i) for i in range(5000)]), "5000 choices"),
        (lambda: Grammar.lark("  "), "non-empty"),
        (lambda: SamplingParams(grammar="[0-9]"), "must be a Grammar"),
    ],
)
def test_refused_when_made(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.json_schema({"type": "foo"}), "foo"),
        (Grammar.json_schema({"not": {"type": "integer"}}), "not"),
        (Grammar.json_schema({"not": {}, "x-guidance": {"lenient": True}}), "not"),
        (Grammar.json_schema({"$ref": "http://example.com/schema"}), "example.com"),
        (Grammar.json_schema({"$ref": "#"}), "cannot be used"),
        (Grammar.json_schema({"type": "string", "pattern": "a(?=b)"}), "look-around"),
        (Grammar.json_schema(_nested(60)), None),
        (Grammar.json_schema({"enum": [f"x{i}" for i in range(20_000)]}), None),
        (Grammar.json_schema({"type": "string", "pattern": "(a{100}){100}"}), None),
        (Grammar.json_schema({"type": "string", "maxLength": 10**7}), None),
        (Grammar.json_schema({"type": "array", "minItems": 10**6}), None),
        (Grammar.regex("("), "unclosed group"),
        (Grammar.regex("(a{140}){140}"), None),
        (Grammar.regex("(a{100}b{90}){90}|\\\\(x{99}"), None),
        (Grammar.regex("(x+x+)+y"), None),
        (Grammar.regex("(.*a){50}.{5000}"), None),
        (Grammar.regex("[xb](a{140}){140}"), None),
        (Grammar.lark("start: nowhere"), "nowhere"),
        (Grammar.lark("start: a*\na: b*\nb: a*"), None),
    ],
)
def test_hostile_grammars_end_quickly(llm, grammar, words):
    """Either refused with a reason, or followed; never for long."""
    begin, refusal = time.process_time(), ""
    try:
        _contents(llm, grammar, n=1, max_tokens=5)
    except ValueError as error:
        refusal = str(error)
    assert time.process_time() - begin < 5
    assert "\n" not in refusal
    assert re.search(words, refusal) if words else not refusal or "cannot be" in refusal
    assert not llm.engine.has_work


def test_compiled_grammars_are_kept(llm):
    compiler = llm.engine.rules._grammars
    grammar = Grammar.regex("[0-9]{2}")
    first = compiler.compile(grammar)
    compiled = compiler._cache[grammar]
    first.consume_tokens(compiler.tokenize("12"))
    again = compiler.compile(Grammar.regex("[0-9]{2}"))
    assert compiler._cache[grammar] is compiled
    assert not again.is_stopped()
    for i in range(100):
        compiler.compile(Grammar.choice([f"c{i}"]))
    assert len(compiler._cache) == 64
    assert grammar not in compiler._cache


def test_what_a_grammar_needs(llm, monkeypatch):
    params = SamplingParams(grammar=Grammar.choice(["a"]))
    with (
        LLM.synthetic(llm.model_config, max_context=64) as synthetic,
        pytest.raises(ValueError, match="needs a model with a tokenizer"),
    ):
        synthetic.generate([1], params)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with LLM(num_threads=1) as fresh, pytest.raises(ValueError, match=r"pip install 'moejet\[gr"):
        fresh.generate("a", params)
