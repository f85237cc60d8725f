"""From token ids to what a person reads: text, reasoning and content, with stop strings applied.

tokens -> IncrementalDecoder -> text -> ThinkingParser -> reasoning, content -> stop strings. Nothing that might still
turn into a tag or a stop string is handed out, so a stream never shows half of one.
"""

from __future__ import annotations

import copy

from moejet.request import SamplingParams
from moejet.thinking import ThinkingParser
from moejet.tokenizer import IncrementalDecoder, Tokenizer


class StopMatcher:
    """Finds the stop string that is complete first, in text that arrives in pieces."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.found: str | None = None
        self.held = ""
        self.num_cut = 0  # characters from the match to the end of the text then known

    def push(self, text: str) -> str:
        """Returns what is safe to hand out; after a match, what came before it."""
        if not self.stop or self.found is not None:
            return "" if self.found is not None else text
        buffer = self.held + text
        hits = [(at, s) for s in self.stop if (at := buffer.find(s)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self.held = ""
            self.num_cut = len(buffer) - at
            return buffer[:at]
        keep = held_back(buffer, self.stop)
        self.held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """Hands out what was held back, at the end of the text."""
        text, self.held = self.held, ""
        return text


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = max((len(s) for s in stop), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0


class OutputAssembler:
    """Collects one sample's output. Without a tokenizer, text stays empty and only token ids count."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        *,
        think_tags: tuple[str, str] | None,
        thinking: bool,
    ):
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self._markers = tokenizer.tool_marker_ids if tokenizer is not None else {}
        self._parser: ThinkingParser | None = None
        if think_tags is not None:
            self._parser = ThinkingParser(*think_tags, thinking=thinking)
        self._content_stop = StopMatcher(params.stop)
        self._reasoning_stop = StopMatcher(params.stop if params.stop_in_reasoning else ())
        self._raw = ""
        self._num_taken = 0
        self._num_split = 0  # characters of reasoning and content, held ones included
        self._found_markers: list[int] = []
        self._reasoning = ""
        self.content = ""
        self.num_reasoning_tokens = 0  # tags that the model wrote itself included

    def copy(self) -> OutputAssembler:
        """The same state, for a fork of the sample."""
        other = copy.copy(self)
        other._decoder = self._decoder.copy() if self._decoder is not None else None
        other._parser = copy.copy(self._parser)
        other._content_stop = copy.copy(self._content_stop)
        other._reasoning_stop = copy.copy(self._reasoning_stop)
        other._found_markers = list(self._found_markers)
        return other

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._content_stop.found or self._reasoning_stop.found

    @property
    def reasoning(self) -> str | None:
        thought = self._parser is not None and self._parser.has_reasoning
        return self._reasoning if thought else None

    @property
    def is_thinking(self) -> bool:
        """Whether text that comes now belongs to the thinking."""
        return self._parser is not None and self._parser.in_reasoning

    @property
    def may_open_thinking(self) -> bool:
        return self._parser is not None and not self.is_thinking and self._parser.may_open

    @property
    def text(self) -> str:
        """Everything generated so far, tags included, up to a stop string."""
        return self._raw

    def push(self, token_id: int) -> tuple[str, str]:
        """Adds a token; returns the new (reasoning, content)."""
        if self._decoder is None:
            return "", ""
        was_thinking = self.is_thinking
        pieces = self._feed(self._decoder.push(token_id))
        self.num_reasoning_tokens += was_thinking or self.is_thinking
        if (marker := self._markers.get(token_id)) is not None and self.stopped_by is None:
            # No tag and no newline ends like a marker, so the thinking parser holds none of it back.
            self._found_markers.append(self._num_split - len(marker))
        return pieces

    def flush(self) -> tuple[str, str]:
        """Ends the text; returns the last (reasoning, content)."""
        if self._decoder is None or self.stopped_by is not None:
            return "", ""
        reasoning, content = self._feed(self._decoder.flush())
        if self._parser is not None and self.stopped_by is None:
            more = self._split(*self._parser.flush())
            reasoning, content = reasoning + more[0], content + more[1]
        if self.stopped_by is None:
            tail = self._reasoning_stop.flush(), self._content_stop.flush()
            self._reasoning += tail[0]
            self.content += tail[1]
            reasoning, content = reasoning + tail[0], content + tail[1]
        return reasoning, content

    def take_markers(self) -> tuple[int, ...]:
        """Where the tool-call markers found since the last call begin, in the characters of reasoning and content."""
        found, self._found_markers = tuple(self._found_markers), []
        return found

    def take_text(self) -> str:
        """The raw text that has become safe to show since the last call; everything once flushed or stopped."""
        end = len(self._raw)
        if self.stopped_by is None:
            end -= len(self._content_stop.held) + len(self._reasoning_stop.held)
            end -= len(self._parser.held) if self._parser is not None else 0
        if end <= self._num_taken:
            return ""
        piece, self._num_taken = self._raw[self._num_taken : end], end
        return piece

    def _feed(self, piece: str) -> tuple[str, str]:
        self._raw += piece
        return self._split(*(self._parser.push(piece) if self._parser is not None else ("", piece)))

    def _split(self, reasoning: str, content: str) -> tuple[str, str]:
        self._num_split += len(reasoning) + len(content)
        reasoning = self._reasoning_stop.push(reasoning)
        if content and self._reasoning_stop.found is None:
            reasoning += (
                self._reasoning_stop.flush()
            )  # it cannot go on, and comes before the content
        content = "" if self._reasoning_stop.found else self._content_stop.push(content)
        self._reasoning += reasoning
        self.content += content
        if self._content_stop.found is not None:
            # Content is the end of the raw text, character for character.
            self._raw = self._raw[: len(self._raw) - self._content_stop.num_cut]
        elif self._reasoning_stop.found is not None:
            # Tags and dropped newlines may follow; what has been shown cannot be part of the match.
            at = self._raw.find(self._reasoning_stop.found, self._num_taken)
            self._raw = self._raw[: max(at, self._num_taken)]
        return reasoning, content
