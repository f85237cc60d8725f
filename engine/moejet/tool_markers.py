"""Markers of tool calls that published models have as single tokens of their vocabulary.

They are never hidden in a reply, even where a tokenizer calls them special, and a reply says at which places they came
as tokens (`StreamDelta.tool_markers`): the same characters in ordinary tokens are a quotation.
"""

from __future__ import annotations

KNOWN_TOOL_MARKERS: frozenset[str] = frozenset(
    (
        # DeepSeek-V3, R1 and V3.1
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        # DeepSeek-V3.2 and V4: part of every marker
        "｜DSML｜",
        # Kimi-K2
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        # GLM-4.5 and later; the first two also Qwen and Hermes
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    )
)
