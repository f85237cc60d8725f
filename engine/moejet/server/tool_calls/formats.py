"""How models write tool calls, as data: markers for the parser, patterns for what must be written.

A reply may hold text, then calls, and in some formats a section around them. `FORMATS` has examples in its patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moejet.tokenizer import Tokenizer

_NAME = r"(?P<name>[a-zA-Z0-9_.-]{1,64})"


@dataclass(frozen=True, slots=True)
class FieldMarkers:
    """Arguments written one by one instead of as JSON: begin, the key, value_begin, the value, value_end.

    key: what stands between begin and value_begin; the group `string` says whether the value is a text
    pattern: of the whole, with $key, $value and perhaps $string
    """

    begin: tuple[str, ...]
    key: re.Pattern[str]
    value_begin: tuple[str, ...]
    value_end: tuple[str, ...]
    pattern: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Markers in the order in which they come; beside the usual ones those that models write by mistake.

    header: what stands between call_begin and arguments_begin, with the group `name` and perhaps `id`
    trailer: what stands behind JSON arguments: one character, repeated
    pattern: of a call, with $name, $arguments and perhaps $number (any) · section: of all, with $calls
    separator: between calls · fields: for arguments that are not JSON
    tokens: markers, or parts of them, that are tokens of the vocabulary, with their ids
    """

    name: str
    section_begin: tuple[str, ...]
    section_end: tuple[str, ...]
    call_begin: tuple[str, ...]
    call_end: tuple[str, ...]
    arguments_begin: tuple[str, ...]
    header: re.Pattern[str]
    pattern: str
    section: str = "$calls"
    separator: str = ""
    trailer: str = ""
    fields: FieldMarkers | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)


DEEPSEEK_V31 = ToolFormat(
    "deepseek_v31",
    section_begin=("<｜tool▁calls▁begin｜>",),
    section_end=("<｜tool▁calls▁end｜>",),
    call_begin=("<｜tool▁call▁begin｜>",),
    call_end=("<｜tool▁call▁end｜>",),
    arguments_begin=("<｜tool▁sep｜>",),
    header=re.compile(_NAME),
    pattern="<｜tool▁call▁begin｜>$name<｜tool▁sep｜>$arguments<｜tool▁call▁end｜>",
    section="<｜tool▁calls▁begin｜>$calls<｜tool▁calls▁end｜>",
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V31,
    name="deepseek_v3",
    arguments_begin=("```json",),
    header=re.compile(rf"function\s*<｜tool▁sep｜>\s*{_NAME}"),
    pattern="<｜tool▁call▁begin｜>function<｜tool▁sep｜>$name\n```json\n$arguments\n```<｜tool▁call▁end｜>",
    separator="\n",
    trailer="```",
)
KIMI_K2 = ToolFormat(
    "kimi_k2",
    section_begin=("<|tool_calls_section_begin|>",),
    section_end=("<|tool_calls_section_end|>",),
    call_begin=("<|tool_call_begin|>",),
    call_end=("<|tool_call_end|>",),
    arguments_begin=("<|tool_call_argument_begin|>",),
    header=re.compile(rf"(?P<id>(?:functions\.)?{_NAME}(?::\d{{1,9}})?)"),
    pattern="<|tool_call_begin|>functions.$name:$number<|tool_call_argument_begin|>$arguments<|tool_call_end|>",
    section="<|tool_calls_section_begin|>$calls<|tool_calls_section_end|>",
)
GLM = ToolFormat(
    "glm",
    section_begin=(),
    section_end=(),
    call_begin=("<tool_call>",),
    call_end=("</tool_call>",),
    arguments_begin=(),
    header=re.compile(_NAME),
    pattern="<tool_call>$name\n$arguments</tool_call>",
    separator="\n",
    fields=FieldMarkers(
        begin=("<arg_key>",),
        key=re.compile(r"(?P<key>.*?)</arg_key>", re.DOTALL),
        value_begin=("<arg_value>",),
        value_end=("</arg_value>",),
        pattern="<arg_key>$key</arg_key>\n<arg_value>$value</arg_value>\n",
    ),
)
HERMES = ToolFormat(
    "hermes",
    section_begin=(),
    section_end=(),
    call_begin=("<tool_call>",),
    call_end=("</tool_call>",),
    arguments_begin=('"arguments":', '"arguments" :', '"parameters":', '"parameters" :'),
    header=re.compile(rf'{{\s*"name"\s*:\s*"{_NAME}"\s*,'),
    pattern='<tool_call>\n{"name": "$name", "arguments": $arguments}\n</tool_call>',
    separator="\n",
    trailer="}",
)
_DSML_FIELDS = FieldMarkers(
    begin=('<｜DSML｜parameter name="', '<｜DSML｜ parameter name="'),
    key=re.compile(r'(?P<key>[^"]*)"\s*(?:string\s*=\s*"(?P<string>true|false)")?'),
    value_begin=(">",),
    value_end=("</｜DSML｜parameter>", "</｜DSML｜ parameter>"),
    pattern='<｜DSML｜parameter name="$key" string="$string">$value</｜DSML｜parameter>\n',
)
# Sections are told apart by one word, which models also misspell: each of them is understood everywhere.
_DSML_WORDS = ("tool_calls", "function_calls", "toolcalls", "functioncalls", "calls")
DEEPSEEK_V4 = ToolFormat(
    "deepseek_v4",
    section_begin=tuple(f"<｜DSML｜{gap}{w}>" for w in _DSML_WORDS for gap in ("", " ")),
    section_end=tuple(f"</｜DSML｜{gap}{w}>" for w in _DSML_WORDS for gap in ("", " ")),
    call_begin=('<｜DSML｜invoke name="', '<｜DSML｜ invoke name="'),
    call_end=("</｜DSML｜invoke>", "</｜DSML｜ invoke>"),
    arguments_begin=('">',),
    header=re.compile(_NAME),
    pattern='<｜DSML｜invoke name="$name">\n$arguments</｜DSML｜invoke>\n',
    section="<｜DSML｜tool_calls>\n$calls</｜DSML｜tool_calls>",
    fields=_DSML_FIELDS,
)
DEEPSEEK_V32 = replace(
    DEEPSEEK_V4,
    name="deepseek_v32",
    section="<｜DSML｜function_calls>\n$calls</｜DSML｜function_calls>",
)
FORMATS: tuple[ToolFormat, ...] = (
    *(DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32, DEEPSEEK_V4, KIMI_K2, GLM, HERMES),
)


def detect_tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """What a checkpoint's chat template writes, or else its vocabulary suggests; None if it knows no tools."""
    tokens = {marker: token_id for token_id, marker in tokenizer.tool_marker_ids.items()}
    template = "".join(tokenizer.chat_template_sources)
    found = _by_text(template) or _by_text("".join(tokens))
    return None if found is None else replace(found, tokens=tokens)


def _by_text(text: str) -> ToolFormat | None:
    if "｜DSML｜" in text:
        return DEEPSEEK_V32 if "function_calls" in text else DEEPSEEK_V4
    if "<｜tool▁calls▁begin｜>" in text:
        return DEEPSEEK_V3 if "```json" in text else DEEPSEEK_V31
    if "<|tool_call_begin|>" in text:
        return KIMI_K2
    if "<arg_key>" in text:
        return GLM
    return HERMES if "<tool_call>" in text else None
