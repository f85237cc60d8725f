"""Offered tools and the choice among them, in every dialect; what is wrong is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejet.server.tool_calls import Tool, ToolChoice, parse_tool_choice, parse_tools
from moejet.server.tool_calls.tools import MAX_TOOLS

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
RESPONSES = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA}
ANTHROPIC = {"name": "f", "description": "d", "input_schema": SCHEMA}


def _deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize("tool", [CHAT, RESPONSES, ANTHROPIC, {"type": "custom", **ANTHROPIC}])
def test_tools_of_every_dialect(tool):
    [parsed] = parse_tools([tool])
    assert parsed == Tool("f", "d", SCHEMA)
    assert parsed.for_template() == CHAT


def test_tools_without_parameters_take_none():
    for tool in ({"name": "f"}, {"name": "f", "input_schema": {}}):
        assert parse_tools([tool])[0].parameters == {"type": "object", "properties": {}}
    assert parse_tools(None) == parse_tools([]) == ()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "tools must be a list"),
        ("f", "tools must be a list"),
        ([1], r"tools\[0\] must be an object"),
        ([{"name": "f"}] * 2, r"tools\[1\]: the name 'f' occurs twice"),
        ([{"name": f"f{i}"} for i in range(MAX_TOOLS + 1)], "holds 129 tools, and 128"),
        ([{"name": "a b"}], r"tools\[0\].name='a b' must be 1 to 64"),
        ([{"name": "x" * (1 << 20)}], r"tools\[0\].name='xx.*\.\.\. must be"),
        ([{"name": "f\n"}], "must be 1 to 64"),
        ([{"type": "function", "function": {}}], r"tools\[0\].function.name=None"),
        ([{"type": "function", "function": []}], r"tools\[0\].function must be an object"),
        ([{"type": "web_search"}], "type='web_search' is not supported"),
        ([{"type": "custom", "name": "f"}], "type='custom' is not supported"),
        ([{"name": "f", "description": 1}], "description=1 must be a string"),
        ([{"name": "f", "strict": 1}], "strict=1 must be true or false"),
        ([{"name": "f", "parameters": []}], "parameters must be a JSON schema object"),
        ([{"name": "f", "parameters": {"type": "string"}}], "type='string' must be 'object'"),
        ([{"name": "f", "parameters": {"properties": 1}}], "properties=1 must be an object"),
        ([{"name": "f", "parameters": {"properties": {"a": 1}}}], "properties.'a' must be"),
        ([{"name": "f", "parameters": _deep(40)}], "nested deeper than 64"),
        ([{"name": "f", "parameters": _deep(50_000)}], "nested deeper than 64"),
        (
            [{"name": f"f{i}", "description": "x" * 20_000} for i in range(100)],
            "characters as JSON, and 1048576",
        ),
    ],
)
def test_wrong_tools_are_named(tools, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_tools(tools)
    assert len(str(error.value)) < 400


TOOLS = parse_tools([CHAT, {"name": "g"}])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "g"}}, ToolChoice("required", "g", False)),
        ({"type": "function", "name": "g"}, ToolChoice("required", "g", False)),
        ({"type": "auto"}, ToolChoice("auto")),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice("required", None, False)),
        ({"type": "tool", "name": "g"}, ToolChoice("required", "g", False)),
        ({"type": "none"}, ToolChoice("none")),
    ],
)
def test_choices_of_every_dialect(value, expected):
    assert parse_tool_choice(value, TOOLS) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("f", "tool_choice='f' must be 'none', 'auto', 'required' or name a function"),
        (1, "tool_choice=1 must be"),
        ([], "must be"),
        ({}, "must be"),
        ({"type": []}, "must be"),
        ({"type": "function", "function": {"name": "h"}}, "names 'h', which is not offered"),
        ({"type": "function", "function": 3}, "names None"),
        ({"type": "tool", "name": ["f"]}, "which is not offered; tools: f, g"),
    ],
)
def test_wrong_choices_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        parse_tool_choice(value, TOOLS)


def test_choices_without_tools():
    assert parse_tool_choice(None, ()).mode == parse_tool_choice("auto", ()).mode == "none"
    with pytest.raises(ValueError, match="needs tools, and none are offered"):
        parse_tool_choice("required", ())
    assert not parse_tool_choice("auto", TOOLS, parallel=False).parallel
    with pytest.raises(ValueError, match="parallel_tool_calls=1 must be"):
        parse_tool_choice("auto", TOOLS, parallel=1)  # type: ignore[arg-type]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "function", "name", "parameters", "properties", "strict"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_understood_or_refused(value):
    for call in (lambda: parse_tools([value]), lambda: parse_tool_choice(value, TOOLS)):
        try:
            call()
        except ValueError as error:
            assert "tool" in str(error)  # noqa: PT017
