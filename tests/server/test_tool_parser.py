"""Tool calls in every format: what is recognised, what stays text, and that no cutting into pieces changes it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejet.request import StreamDelta
from moejet.server.tool_calls import (
    FORMATS,
    ContentDelta,
    OutputEvent,
    OutputParser,
    ReasoningDelta,
    Tool,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolFormat,
)

BY_NAME = {format.name: format for format in FORMATS}
TOOLS = (
    Tool("get_weather", "", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool(
        "add",
        "",
        {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": ["number", "null"]},
                "note": {"type": ["string", "number"]},
                "unit": {"enum": ["cm", "m"]},
                "any": {"anyOf": [{"type": "object"}, {"type": "array"}]},
            },
        },
    ),
)
WEATHER = '{"city": "São Paulo"}'
# Two calls, as each family writes them.
EXAMPLES = {
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        + WEATHER
        + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "deepseek_v31": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{WEATHER}<｜tool▁call▁end｜>"
        '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "deepseek_v32": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">São Paulo</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    ),
    "deepseek_v4": (
        '<｜DSML｜toolcalls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city">São Paulo</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="add"><｜DSML｜parameter name="a" string="false"> 1 </｜DSML｜parameter>'
        "</｜DSML｜invoke></｜DSML｜toolcalls>"
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{WEATHER}<|tool_call_end|><|tool_call_begin|>functions.add:1"
        '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    "glm": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>São Paulo</arg_value>\n</tool_call>\n"
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    ),
    "hermes": (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    ),
}
ALL = pytest.mark.parametrize("name", sorted(BY_NAME))


def _parser(format: ToolFormat | None) -> OutputParser:
    numbers = count()
    return OutputParser(format, TOOLS, new_id=lambda: f"call_{next(numbers)}")


def _merged(events: list[OutputEvent]) -> list[OutputEvent]:
    """The same events with neighbours of one kind joined, which is how a client sees them."""
    result: list[OutputEvent] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            result[-1] = replace(last, json_fragment=last.json_fragment + event.json_fragment)
        elif isinstance(event, ReasoningDelta | ContentDelta) and type(event) is type(last):
            result[-1] = type(event)(last.text + event.text)
        else:
            result.append(event)
    return result


def _parse(
    format: ToolFormat | None,
    content: str,
    *,
    reasoning: str = "",
    cuts: tuple[int, ...] = (),
    markers: tuple[int, ...] = (),
    is_complete: bool = True,
) -> list[OutputEvent]:
    """The merged events of a reply cut into pieces."""
    parser, events = _parser(format), []
    parser.push(markers=markers)
    whole = reasoning + content
    at = 0
    for end in (*sorted(min(cut, len(whole)) for cut in cuts), len(whole)):
        split = min(max(at, len(reasoning)), end)
        events += parser.push(whole[at:split], whole[split:end])
        at = end
    events += parser.flush(is_complete=is_complete)
    assert parser.flush() == []
    assert all(e.text for e in events if isinstance(e, ReasoningDelta | ContentDelta))
    assert all(e.json_fragment for e in events if isinstance(e, ToolCallArguments))
    return _merged(events)


def _calls(events: list[OutputEvent]) -> list[tuple[str, Any]]:
    """(name, arguments) of every call; checks that indices and ends are in order."""
    calls: list[tuple[str, str]] = []
    is_open = False
    for event in events:
        match event:
            case ToolCallStart(index, _, name):
                assert not is_open
                assert index == len(calls)
                calls.append((name, ""))
                is_open = True
            case ToolCallArguments(index, fragment):
                assert is_open
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + fragment)
            case ToolCallEnd(index):
                assert is_open
                assert index == len(calls) - 1
                is_open = False
            case _:
                assert not is_open, "text inside a call"
    assert not is_open
    return calls


def _text(events: list[OutputEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, ContentDelta))


@ALL
def test_calls_of_every_family(name):
    events = _parse(BY_NAME[name], "Let me look.\n\n" + EXAMPLES[name] + "\n")
    assert events[0] == ContentDelta("Let me look.\n\n")
    calls = _calls(events)
    assert [call[0] for call in calls] == ["get_weather", "add"]
    assert [json.loads(call[1]) for call in calls] == [{"city": "São Paulo"}, {"a": 1}]
    assert _text(events) == "Let me look.\n\n"
    ids = [event.id for event in events if isinstance(event, ToolCallStart)]
    native = ["functions.get_weather:0", "functions.add:1"]
    assert ids == (native if name == "kimi_k2" else ["call_0", "call_1"])


@ALL
@given(data=st.data())
def test_the_pieces_do_not_matter(name, data):
    text = data.draw(_soup(BY_NAME[name], EXAMPLES[name]))
    reasoning = data.draw(st.one_of(st.just(""), _soup(BY_NAME[name], EXAMPLES[name])))
    size = len(text) + len(reasoning)
    cuts = tuple(data.draw(st.lists(st.integers(0, size), max_size=12)))
    is_complete = data.draw(st.booleans())
    whole = _parse(BY_NAME[name], text, reasoning=reasoning, is_complete=is_complete)
    _calls(whole)
    options = {"reasoning": reasoning, "is_complete": is_complete}
    assert _parse(BY_NAME[name], text, cuts=cuts, **options) == whole
    assert _parse(BY_NAME[name], text, cuts=tuple(range(size)), **options) == whole


@ALL
@given(data=st.data())
def test_nothing_is_lost(name, data):
    text = data.draw(_soup(BY_NAME[name], EXAMPLES[name], with_sentinels=True))
    cuts = tuple(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    events = _parse(BY_NAME[name], text, cuts=cuts)
    out = "".join(
        str(value)
        for event in events
        for value in (getattr(event, "text", ""), getattr(event, "json_fragment", ""))
    )
    for char in text:
        if "一" <= char <= "龥":
            assert text.count(char) == out.count(char), f"{char} of {text!r}"


def _soup(format: ToolFormat, example: str, with_sentinels: bool = False) -> st.SearchStrategy[str]:
    """Markers, halves of markers, names, JSON and text, in any order, or a good example with something put in."""
    fields = format.fields
    field_markers = (*fields.begin, *fields.value_begin, *fields.value_end) if fields else ()
    markers = [
        *(*format.section_begin[:3], *format.section_end[:3], *format.call_begin, *format.call_end),
        *(
            *format.arguments_begin,
            *field_markers,
            "</arg_key>",
            '" string="true"',
            "```",
            "}",
            "\n",
        ),
    ]
    halves = [marker[:k] for marker in markers for k in (1, len(marker) // 2, len(marker) - 1)]
    names = [
        "get_weather",
        "add",
        "function<｜tool▁sep｜>add",
        "functions.add:0",
        "city",
        "a",
        "x" * 300,
    ]
    values = [
        "1",
        " 2 ",
        '{"a": [1, {"b": "}"}]}',
        WEATHER,
        '{"name": "add", ',
        "[",
        "NaN",
        '"',
        "😀\\",
    ]
    plain = ["Hello", " ", "\n\n", ":", ","]
    piece = st.sampled_from([*markers, *markers, *halves, *names, *values, *plain])
    if with_sentinels:
        piece = st.one_of(piece, st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5))
    soup = st.lists(piece, max_size=25).map("".join)

    def put_in(args: tuple[str, int, int]) -> str:
        text, at, num_cut = args
        at = min(at, len(example))
        return example[:at] + text + example[at + num_cut :]

    return st.one_of(
        soup,
        st.tuples(
            st.lists(piece, max_size=3).map("".join),
            st.integers(0, len(example)),
            st.integers(0, 5),
        ).map(put_in),
    )


@ALL
def test_arguments_stream_while_they_arrive(name):
    text = EXAMPLES[name]
    parser, seen, sizes = _parser(BY_NAME[name]), "", []
    for char in text[: text.index("Paulo") + 5]:
        for event in parser.push(content=char):
            if isinstance(event, ToolCallArguments):
                seen += event.json_fragment
                sizes.append(len(event.json_fragment))
    assert "Paul" in seen
    assert len(sizes) >= 8


@ALL
def test_calls_inside_open_thinking(name):
    events = _parse(BY_NAME[name], "Done.", reasoning="I call it.\n" + EXAMPLES[name] + "\nGood.")
    assert len(_calls(events)) == 2
    texts = [event for event in events if isinstance(event, ReasoningDelta | ContentDelta)]
    assert texts == [
        *(ReasoningDelta("I call it.\n"), ReasoningDelta("\nGood."), ContentDelta("Done."))
    ]


@ALL
def test_the_end_of_the_thinking_ends_a_call(name):
    text = EXAMPLES[name]
    cut = text.index("Paulo")
    events = _parse(BY_NAME[name], "The answer.", reasoning=text[:cut])
    assert [call[0] for call in _calls(events)] == ["get_weather"]
    assert events[-1] == ContentDelta("The answer.")


@ALL
def test_a_reply_that_is_cut_off_leaves_its_arguments_unfinished(name):
    text = EXAMPLES[name]
    cut = text.index("Paulo") + 3
    for end in (cut, text.index("add")):
        events = _parse(BY_NAME[name], text[:end], is_complete=False)
        assert _calls(events)[0][0] == "get_weather"
    events = _parse(BY_NAME[name], text[:cut], is_complete=False)
    assert _calls(events)[0][1] == '{"city": "São Pau'


@ALL
def test_missing_end_markers_are_made_up_for(name):
    format = BY_NAME[name]
    text = EXAMPLES[name]
    for marker in (*format.call_end, *format.section_end):
        text = text.replace(marker, "")
    events = _parse(format, text)
    calls = _calls(events)
    assert [(n, json.loads(a)) for n, a in calls] == [
        *(("get_weather", {"city": "São Paulo"}), ("add", {"a": 1}))
    ]
    assert _text(events) == ""


@ALL
def test_blocks_that_are_no_calls_stay_text(name):
    format = BY_NAME[name]
    call, end = format.call_begin[0], format.call_end[0]
    section = (*format.section_begin, "")[0]
    for text in (
        f"{call} what is this? {end} said the cat",
        f"A call begins with {call}",
        f"{section}{call}{'x' * 1000}",
        f"{call}{call}{call}",
        f"{section} nothing",
        section,
    ):
        assert _parse(format, text) == ([ContentDelta(text)] if text else [])


def test_white_space_alone_is_an_answer_without_calls_and_nothing_beside_them():
    glm = BY_NAME["glm"]
    assert _parse(glm, " \n") == [ContentDelta(" \n")]
    assert _text(_parse(glm, "\n" + EXAMPLES["glm"] + " \n ")) == ""
    assert _text(_parse(glm, EXAMPLES["glm"] + "\nSo.\n")) == "\nSo.\n"


def test_values_take_the_types_of_the_schema():
    pairs = {
        "a": "1",
        "b": "null",
        "note": "two",
        "unit": "5",
        "any": '[1, {"x": "é"}]',
        "new": "7",
        'we"ird': "{not json",
        "nan": "NaN",
    }
    body = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>\n" for k, v in pairs.items())
    events = _parse(BY_NAME["glm"], f"<tool_call>add\n{body}</tool_call>")
    assert json.loads(_calls(events)[0][1]) == {
        "a": 1,
        "b": None,
        "note": "two",
        "unit": "5",
        "any": [1, {"x": "é"}],
        "new": 7,
        'we"ird': "{not json",
        "nan": "NaN",
    }


def test_strings_are_escaped_and_kept_exactly():
    text = '  line\n"two" \\ \t <b>&</b> 😀 </arg  '
    events = _parse(
        BY_NAME["glm"],
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>"
        + text
        + "</arg_value></tool_call>",
    )
    assert json.loads(_calls(events)[0][1]) == {"city": text}


@pytest.mark.parametrize("name", ["glm", "deepseek_v31", "kimi_k2"])
def test_calls_without_arguments_have_an_empty_object(name):
    format = BY_NAME[name]
    begin = format.arguments_begin[0] if format.arguments_begin else ""
    events = _parse(format, f"{format.call_begin[0]}add{begin}{format.call_end[0]}")
    assert _calls(events) == [("add", "{}")]


def test_what_is_no_field_comes_after_the_call():
    field = "<arg_key>{}</arg_key><arg_value>1</arg_value>"
    text = f"<tool_call>add\n{field.format('a')} and {field.format('new')}\n</tool_call>"
    events = _parse(BY_NAME["glm"], text)
    assert _calls(events) == [("add", '{"a": 1, "new": 1}')]
    assert events[-1] == ContentDelta(" and ")


def test_an_outer_brace_that_is_missing():
    events = _parse(
        BY_NAME["hermes"], '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>'
    )
    assert _calls(events) == [("add", '{"a": 1}')]


def test_repeated_native_ids_are_replaced():
    call = "<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    events = _parse(
        BY_NAME["kimi_k2"],
        f"<|tool_calls_section_begin|>{call}{call}<|tool_calls_section_end|>",
    )
    ids = [event.id for event in events if isinstance(event, ToolCallStart)]
    assert ids == ["functions.add:0", "call_0"]


def test_markers_count_only_as_tokens_where_the_vocabulary_has_them():
    glm = replace(BY_NAME["glm"], tokens={"<tool_call>": 1, "</tool_call>": 2})
    text = "Say <tool_call>add</tool_call> or <tool_call>add</tool_call>."
    assert _parse(glm, text) == [ContentDelta(text)]
    second = text.rindex("<tool_call>")
    places = (second, text.rindex("</tool_call>"))
    events = _parse(glm, text, markers=places)
    assert events[0] == ContentDelta("Say <tool_call>add</tool_call> or ")
    assert _calls(events) == [("add", "{}")]
    assert events[-1] == ContentDelta(".")
    # An end marker that is typed inside an argument is part of it.
    text = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>a</tool_call>b</arg_value></tool_call>"
    events = _parse(glm, text, markers=(0, text.rindex("</tool_call>")))
    assert _calls(events) == [("get_weather", '{"city": "a</tool_call>b"}')]


def test_a_part_of_a_marker_may_be_the_token():
    format = replace(BY_NAME["deepseek_v32"], tokens={"｜DSML｜": 1})
    text = EXAMPLES["deepseek_v32"]
    assert _calls(_parse(format, text)) == []
    places = tuple(i for i in range(len(text)) if text.startswith("｜DSML｜", i))
    for cuts in ((), tuple(range(len(text)))):
        assert len(_calls(_parse(format, text, markers=places, cuts=cuts))) == 2


def test_without_a_format_everything_is_text():
    assert _parse(None, "a <tool_call>", reasoning="r") == [
        *(ReasoningDelta("r"), ContentDelta("a <tool_call>"))
    ]


def test_deltas_of_the_engine():
    parser = _parser(BY_NAME["hermes"])
    first = StreamDelta("r", 0, "", "", '<tool_call>{"name": "add", "arguments": {"a": 1', (1,))
    events = parser.push_delta(first)
    events += parser.push_delta(StreamDelta("r", 0, "", "", "", (2,), "length"))
    assert _calls(events) == [("add", '{"a": 1')]
    assert parser.num_calls == 1


@ALL
def test_no_marker_begins_another_where_both_may_come(name):
    format = BY_NAME[name]
    markers = {
        *(*format.section_begin, *format.section_end, *format.call_begin, *format.call_end),
        *format.arguments_begin,
    }
    assert not any(a != b and b.startswith(a) for a in markers for b in markers)
