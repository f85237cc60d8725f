"""Forced tool calls: what the grammars allow is what the parser understands, in every format."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from moejet import LLM, SamplingParams
from moejet.grammar import Grammar, GrammarCompiler
from moejet.server.tool_calls import (
    FORMATS,
    ContentDelta,
    OutputParser,
    ReasoningDelta,
    Tool,
    ToolCallArguments,
    ToolCallStart,
    ToolChoice,
    ToolFormat,
    detect_tool_format,
    tool_grammar,
)
from moejet.testing.checkpoints import tiny_checkpoint, write_tokenizer
from moejet.tokenizer import Tokenizer
from moejet.tool_markers import KNOWN_TOOL_MARKERS

pytest.importorskip("llguidance")

BY_NAME = {format.name: format for format in FORMATS}
ALL = pytest.mark.parametrize("name", sorted(BY_NAME))
TOOLS = (
    Tool(
        "pick",
        "Picks.",
        {
            "type": "object",
            "properties": {
                "color": {"type": "string", "enum": ["red", "blue"], "description": "which"},
                "size": {"$ref": "#/$defs/size"},
                "note": {"type": "string"},
            },
            "required": ["color", "size"],
            "additionalProperties": False,
            "$defs": {"size": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    ),
    Tool("stop"),
)
REQUIRED = ToolChoice("required")


@pytest.fixture(scope="module", params=["special", "added", "typed"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """Markers as special tokens, as ordinary added tokens, or not in the vocabulary."""
    path = tmp_path_factory.mktemp(request.param)
    write_tokenizer(path)
    if request.param != "typed":
        raw = RawTokenizer.from_file(str(path / "tokenizer.json"))
        is_special = request.param == "special"
        add = raw.add_special_tokens if is_special else raw.add_tokens
        add([AddedToken(marker, special=is_special) for marker in sorted(KNOWN_TOOL_MARKERS)])
        raw.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text('{"eos_token_id": 1}')
    return Tokenizer.from_path(path)


def _with_tokens(name: str, tokenizer: Tokenizer) -> ToolFormat:
    return replace(BY_NAME[name], tokens={m: i for i, m in tokenizer.tool_marker_ids.items()})


def _write(format: ToolFormat, name: str, arguments: dict[str, Any], number: int = 0) -> str:
    """A call as the format's patterns have it."""
    text = json.dumps(arguments)
    if format.fields is not None:
        text = ""
        for key, value in arguments.items():
            is_string = isinstance(value, str)
            field = format.fields.pattern.replace("$string", str(is_string).lower())
            value = value if is_string else json.dumps(value)
            text += field.replace("$key", key).replace("$value", value)
    call = format.pattern.replace("$name", name).replace("$number", str(number))
    return call.replace("$arguments", text)


def _fits(tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether the whole text is an answer under the grammar."""
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset([1]))
    matcher = compiler.compile(grammar)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if matcher.validate_tokens(ids) < len(ids):
        return False
    return bool(matcher.consume_tokens(ids) and matcher.is_accepting())


def _parse(format: ToolFormat, tokenizer: Tokenizer, text: str) -> list[tuple[str, Any]]:
    """(name, arguments) of the calls in a text whose markers all come as tokens."""
    places = [
        i
        for marker in tokenizer.tool_marker_ids.values()
        for i in range(len(text))
        if text.startswith(marker, i)
    ]
    parser = OutputParser(format, TOOLS, new_id=map(str, count()).__next__)
    events = [*parser.push(content=text, markers=places), *parser.flush()]
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            calls.append((event.name, ""))
        elif isinstance(event, ToolCallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.json_fragment)
    return [(name, json.loads(arguments)) for name, arguments in calls]


@ALL
def test_what_must_be_written_is_what_is_understood(name, tokenizer):
    format = _with_tokens(name, tokenizer)
    first = {"color": "red", "size": 3, "note": 'two\nlines </a> "x" \\ 1 < 2'}
    calls = [("pick", first), ("stop", {}), ("pick", {"color": "blue", "size": 9})]
    written = [_write(format, tool, arguments, i) for i, (tool, arguments) in enumerate(calls)]
    text = format.section.replace("$calls", format.separator.join(written))
    assert _parse(format, tokenizer, text) == calls
    grammar = tool_grammar(format, TOOLS, REQUIRED)
    assert grammar is not None
    assert _fits(tokenizer, grammar, text)
    only_one = tool_grammar(format, TOOLS, ToolChoice("required", parallel=False))
    assert only_one is not None
    assert not _fits(tokenizer, only_one, text)
    assert _fits(tokenizer, only_one, format.section.replace("$calls", written[0]))
    named = tool_grammar(format, TOOLS, ToolChoice("required", "stop", parallel=False))
    assert named is not None
    assert not _fits(tokenizer, named, format.section.replace("$calls", written[0]))
    assert _fits(tokenizer, named, format.section.replace("$calls", written[1]))


@ALL
@pytest.mark.parametrize(
    "call",
    [
        ("pick", {"color": "green", "size": 3}),
        ("pick", {"color": "red", "size": 30}),
        ("pick", {"color": "red"}),
        ("pick", {"color": "red", "size": 3, "more": 1}),
        ("drop", {}),
    ],
)
def test_what_does_not_fit_the_schema_is_not_allowed(name, call, tokenizer):
    format = _with_tokens(name, tokenizer)
    strict = tuple(replace(tool, strict=True) for tool in TOOLS)
    for tools in (TOOLS, strict):
        grammar = tool_grammar(format, tools, REQUIRED)
        assert grammar is not None
        text = format.section.replace("$calls", _write(format, *call))
        assert not _fits(tokenizer, grammar, text)
        assert not _fits(tokenizer, grammar, "Hello")


@ALL
def test_strict_tools_leave_the_text_free(name, tokenizer):
    format = _with_tokens(name, tokenizer)
    strict = tuple(replace(tool, strict=True) for tool in TOOLS)
    auto = ToolChoice("auto")
    assert tool_grammar(format, TOOLS, auto) is None
    assert tool_grammar(format, strict, ToolChoice("none")) is None
    assert tool_grammar(format, (), auto) is None
    grammar = tool_grammar(format, strict, auto)
    begin = format.section.replace("$calls", format.pattern)
    if not any(begin.startswith(token) for token in format.tokens):
        assert grammar is None  # a call could not be told from text
        return
    assert grammar is not None
    good = _write(format, "pick", {"color": "red", "size": 3})
    bad = _write(format, "pick", {"color": "pink", "size": 3})
    assert _fits(tokenizer, grammar, "It is\n\n{1: <2>} easy.")
    assert _fits(tokenizer, grammar, "")
    assert _fits(tokenizer, grammar, "I pick:\n" + format.section.replace("$calls", good))
    assert not _fits(tokenizer, grammar, "I pick:\n" + format.section.replace("$calls", bad))


def test_a_schema_cannot_switch_its_checks_off(tokenizer):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "multipleOf": 0.1, "nonsense": 1}},
        "x-guidance": {"lenient": True},
    }
    format = _with_tokens("deepseek_v31", tokenizer)
    grammar = tool_grammar(format, [Tool("f", "", schema, strict=True)], REQUIRED)
    assert grammar is not None
    assert '"lenient": false' in grammar.text
    assert '"lenient": true' not in grammar.text


def test_tools_that_are_too_large_for_a_grammar_are_refused():
    properties = {f"p{i}": {"type": "string", "enum": ["x" * 50]} for i in range(5000)}
    tools = [Tool("f", "", {"type": "object", "properties": properties})]
    with pytest.raises(ValueError, match="tools cannot be enforced"):
        tool_grammar(BY_NAME["kimi_k2"], tools, REQUIRED)


@ALL
def test_a_model_that_knows_no_tools_calls_them_under_a_grammar(name):
    """The embedded model, at a high temperature, thinks freely and then calls a tool."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]}
    tools = (Tool("add", "", schema),)
    grammar = tool_grammar(BY_NAME[name], tools, ToolChoice("required", "add", parallel=False))
    with LLM() as llm:
        params = SamplingParams(
            temperature=1.5, seed=3, grammar=grammar, max_tokens=400, max_thinking_tokens=20
        )
        [output] = llm.chat([{"role": "user", "content": "Start with 17, add 25."}], params)
    parser = OutputParser(BY_NAME[name], tools)
    events = parser.push(content=output.outputs[0].content) + parser.flush()
    arguments = "".join(e.json_fragment for e in events if isinstance(e, ToolCallArguments))
    assert parser.num_calls == 1
    assert json.loads(arguments) in ({"a": 1}, {"a": 22})
    assert output.outputs[0].finish_reason == "stop"


@pytest.fixture(scope="module")
def llm_with_markers(tmp_path_factory):
    """A random model whose vocabulary has all markers, as special tokens."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", dtype=torch.bfloat16)
    raw = RawTokenizer.from_file(str(path / "tokenizer.json"))
    raw.add_special_tokens([AddedToken(marker) for marker in sorted(KNOWN_TOOL_MARKERS)])
    raw.save(str(path / "tokenizer.json"))
    options = {"dense_format": "fp32", "cache_dtype": "fp32", "max_context": 512}
    with LLM(path, expert_format="bf16", **options) as llm:
        yield llm


@ALL
def test_markers_reach_the_parser_as_tokens(name, llm_with_markers):
    """Streamed from an engine that writes at random whatever the grammar allows."""
    llm = llm_with_markers
    format = _with_tokens(name, llm.tokenizer)
    properties = {"a": {"enum": [1, 22]}, "b": {"type": "string", "enum": ["x", "<y>"]}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"]}
    tools = (Tool("f", "", schema), Tool("g", "", {"type": "object", "properties": {}}))
    grammar = tool_grammar(format, tools, REQUIRED)
    for seed in range(4):
        params = SamplingParams(seed=seed, grammar=grammar, max_tokens=450)
        params = replace(params, logit_bias={llm.tokenizer.token_to_id("<think>"): -100.0})
        parser = OutputParser(format, tools)
        deltas = list(llm.stream("abc", params))
        events = [event for delta in deltas for event in parser.push_delta(delta)]
        assert parser.num_calls > 0
        text = [event for event in events if isinstance(event, ContentDelta | ReasoningDelta)]
        assert not text or deltas[-1].finish_reason == "length"  # in the middle of a marker
        arguments = [""] * parser.num_calls
        for event in events:
            if isinstance(event, ToolCallArguments):
                arguments[event.index] += event.json_fragment
        if deltas[-1].finish_reason == "stop":
            for text in arguments:
                assert json.loads(text) == {} or set(json.loads(text)) == {"a", "b"}
        # Typed, the same text is no call.
        content = "".join(delta.content for delta in deltas)
        typed = OutputParser(format, tools)
        assert typed.push(content=content) + typed.flush() == [ContentDelta(content)]
        assert typed.num_calls == 0


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '<｜tool▁calls▁begin｜>' }}```json", "deepseek_v3"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", "deepseek_v31"),
        ("<｜DSML｜function_calls>", "deepseek_v32"),
        ("<｜DSML｜tool_calls>", "deepseek_v4"),
        ("<|tool_call_begin|>", "kimi_k2"),
        ("<tool_call>{{ name }}<arg_key>", "glm"),
        ("<tool_call>", "hermes"),
        ("plain", None),
    ],
)
def test_formats_are_recognised_by_the_template(template, expected, tmp_path):
    write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = detect_tool_format(Tokenizer.from_path(tmp_path))
    assert (found.name if found is not None else None) == expected


def test_formats_are_recognised_by_the_vocabulary(tokenizer):
    found = detect_tool_format(tokenizer)
    if not tokenizer.tool_marker_ids:
        assert found is None
        return
    assert found is not None
    assert set(found.tokens) == KNOWN_TOOL_MARKERS
