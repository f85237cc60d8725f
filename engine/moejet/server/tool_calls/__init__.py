"""Tool calls: offered tools and the choice among them, the formats in which models call them, parser and grammars."""

from moejet.server.tool_calls.formats import FORMATS, ToolFormat, detect_tool_format
from moejet.server.tool_calls.grammars import tool_grammar
from moejet.server.tool_calls.parser import (
    ContentDelta,
    OutputEvent,
    OutputParser,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    new_call_id,
)
from moejet.server.tool_calls.tools import Tool, ToolChoice, parse_tool_choice, parse_tools

__all__ = [
    "FORMATS",
    "ContentDelta",
    "OutputEvent",
    "OutputParser",
    "ReasoningDelta",
    "Tool",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "ToolChoice",
    "ToolFormat",
    "detect_tool_format",
    "new_call_id",
    "parse_tool_choice",
    "parse_tools",
    "tool_grammar",
]
