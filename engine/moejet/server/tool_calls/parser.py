"""Splits a reply into text and tool calls while it arrives; no event mixes the two.

The same events, merged, come of any cutting of the reply into pieces:

- What might still become a marker is held back, and handed out at the end if it became none.
- White space before a call, between calls and after the last one is dropped where nothing else stands there.
- Calls may begin inside the thinking, whose end then ends them too.
- A block that is no call (no name, strange text) is text. Once a call has begun, what comes up to its end marker is its
  arguments, valid JSON or not; a missing end marker is made up for by the next marker or the end of the reply.
- A marker that the vocabulary has as a token counts only where it came as that token (`StreamDelta.tool_markers`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moejet.server.tool_calls.arguments import FieldArguments, JsonArguments
from moejet.server.tool_calls.formats import ToolFormat
from moejet.server.tool_calls.scanner import MarkerScanner

if TYPE_CHECKING:
    from moejet.request import StreamDelta
    from moejet.server.tool_calls.tools import Tool

_MAX_HEADER = 256  # characters between a call's first marker and its arguments


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """index counts the calls of one reply from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next part of the arguments' JSON text."""

    index: int
    json_fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    index: int


OutputEvent = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class OutputParser:
    """One sample's reply. Without a format everything is text."""

    def __init__(
        self,
        format: ToolFormat | None,
        tools: Sequence[Tool] = (),
        *,
        new_id: Callable[[], str] = new_call_id,
    ):
        self._format = format
        self._schemas: Mapping[str, Mapping[str, object]] = {t.name: t.parameters for t in tools}
        self._new_id = new_id
        self._scanner = MarkerScanner(format.tokens if format is not None else ())
        self._events: list[OutputEvent] = []
        self._is_reasoning = False
        self._state: Literal["text", "section", "header", "arguments"] = "text"
        self._blank = ""  # white space that may turn out to stand before a call
        self._has_text = False  # since the last call
        self._raw = ""  # a block's text as long as it may turn out to be none
        self._in_section = False
        self._has_garbage = False  # in the section, since its last marker
        self._calls_before_section = 0
        self._arguments: JsonArguments | FieldArguments | None = None
        self._ids: set[str] = set()
        self.num_calls = 0

    def push_delta(self, delta: StreamDelta) -> list[OutputEvent]:
        """What a delta of the engine adds; the last delta also ends the reply."""
        events = self.push(delta.reasoning, delta.content, delta.tool_markers)
        if delta.finish_reason is not None:
            events += self.flush(is_complete=delta.finish_reason == "stop")
        return events

    def push(
        self, reasoning: str = "", content: str = "", markers: Sequence[int] = ()
    ) -> list[OutputEvent]:
        """Adds text; `markers` as in StreamDelta.tool_markers, not later than the text that they are in."""
        self._scanner.mark(markers)
        for is_reasoning, text in ((True, reasoning), (False, content)):
            if not text:
                continue
            if is_reasoning != self._is_reasoning:
                self._end(is_complete=True)
                self._is_reasoning = is_reasoning
            if self._format is None:
                self._append_text(text)
                continue
            self._scanner.push(text)
            while self._step():
                pass
        return self._take()

    def flush(self, *, is_complete: bool = True) -> list[OutputEvent]:
        """Ends the reply. is_complete=False: it was cut off, so the arguments of an open call are left unfinished."""
        self._end(is_complete=is_complete)
        return self._take()

    def _take(self) -> list[OutputEvent]:
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        """Reads on; False when more text is needed."""
        assert self._format is not None, "without a format nothing is to be read"
        match self._state:
            case "text":
                return self._read_text(self._format)
            case "section":
                return self._read_section(self._format)
            case "header":
                return self._read_header(self._format)
            case "arguments":
                return self._read_arguments(self._format)

    def _read_text(self, format: ToolFormat) -> bool:
        at, marker = self._scanner.find((*format.section_begin, *format.call_begin))
        self._append_text(self._scanner.take(at))
        if marker is None:
            return False
        self._raw = self._scanner.take(len(marker))
        self._in_section = marker in format.section_begin
        self._calls_before_section = self.num_calls
        self._has_garbage = False
        self._state = "section" if self._in_section else "header"
        return True

    def _read_section(self, format: ToolFormat) -> bool:
        at, marker = self._scanner.find((*format.call_begin, *format.section_end))
        text = self._scanner.take(at)
        self._raw += text
        if self._has_garbage or text.strip():
            self._append_text(self._raw)
            self._raw, self._has_garbage = "", True
        if marker is None:
            return False
        self._raw += self._scanner.take(len(marker))
        self._has_garbage = False
        if marker in format.call_begin:
            self._state = "header"
            return True
        if self.num_calls == self._calls_before_section:
            self._append_text(self._raw)
        self._raw, self._state = "", "text"
        return True

    def _read_header(self, format: ToolFormat) -> bool:
        others = (*format.section_begin, *format.section_end, *format.call_begin, *format.call_end)
        ends = format.arguments_begin
        if not ends and format.fields is not None:
            ends = (*format.fields.begin, *format.call_end)  # a call may have no arguments
        at, marker = self._scanner.find((*ends, *others))
        if marker is None and at <= _MAX_HEADER:
            return False
        match = format.header.fullmatch(self._scanner.text[:at].strip())
        if at > _MAX_HEADER or marker not in ends or match is None:
            self._append_text(self._raw)
            self._raw, self._has_garbage = "", True
            self._state = "section" if self._in_section else "text"
            return True
        self._scanner.take(at + len(marker) * (marker in format.arguments_begin))
        self._start_call(format, match["name"], match.groupdict().get("id"))
        return True

    def _start_call(self, format: ToolFormat, name: str, native_id: str | None) -> None:
        is_new = native_id is not None and native_id not in self._ids
        call_id = native_id if is_new and native_id is not None else self._new_id()
        self._ids.add(call_id)
        self._events.append(ToolCallStart(self.num_calls, call_id, name))
        self.num_calls += 1
        self._raw = self._blank = ""
        self._has_text = False
        if format.fields is None:
            self._arguments = JsonArguments(format)
        else:
            self._arguments = FieldArguments(format.fields, self._schemas.get(name, {}))
        self._state = "arguments"

    def _read_arguments(self, format: ToolFormat) -> bool:
        assert self._arguments is not None, "a call has begun"
        ends = (*format.call_end, *format.section_end, *format.call_begin)
        fragment, is_end = self._arguments.step(self._scanner, ends)
        self._append_arguments(fragment)
        if not is_end:
            return False
        self._end_call("", is_complete=True)
        _, marker = self._scanner.find(ends)
        if marker in format.call_end:
            self._scanner.take(len(marker))
        self._state = "section" if self._in_section else "text"
        return True

    def _end_call(self, rest: str, *, is_complete: bool) -> None:
        assert self._arguments is not None, "a call has begun"
        self._append_arguments(self._arguments.finish(rest, is_complete=is_complete))
        self._events.append(ToolCallEnd(self.num_calls - 1))
        self._append_text(self._arguments.stray)
        self._arguments = None

    def _end(self, *, is_complete: bool) -> None:
        """Ends the thinking, or the content."""
        rest = self._scanner.take()
        if self._state == "arguments":
            self._end_call(rest, is_complete=is_complete)
        else:
            text = self._raw + rest
            has_calls = self._in_section and self.num_calls > self._calls_before_section
            if self._state != "section" or not has_calls or text.strip():
                self._append_text(text)
        if not self.num_calls:
            self._append(self._blank)
        self._blank = self._raw = ""
        self._has_text = self._in_section = False
        self._state = "text"

    def _append_arguments(self, fragment: str) -> None:
        index = self.num_calls - 1
        last = self._events[-1] if self._events else None
        if isinstance(last, ToolCallArguments):
            self._events[-1] = ToolCallArguments(index, last.json_fragment + fragment)
        elif fragment:
            self._events.append(ToolCallArguments(index, fragment))

    def _append_text(self, text: str) -> None:
        if not self._has_text:
            text = self._blank + text
            self._has_text = bool(text.strip())
            self._blank = "" if self._has_text else text
        if self._has_text:
            self._append(text)

    def _append(self, text: str) -> None:
        kind = ReasoningDelta if self._is_reasoning else ContentDelta
        last = self._events[-1] if self._events else None
        if isinstance(last, kind):
            self._events[-1] = kind(last.text + text)
        elif text:
            self._events.append(kind(text))
