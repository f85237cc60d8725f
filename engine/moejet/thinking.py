"""Splits generated text into reasoning and content, piece by piece.

A reply is `[whitespace] <think> reasoning </think> content`; the opening tag is absent where the prompt already ended
with it (`thinking=True`). Rules, the same for any cutting of the text into pieces:

- One run of newlines is dropped after the opening tag (or at the start, if the prompt opened it), before the closing
  tag and after it, as DeepSeek's servers return the two parts. Spaces and everything else are kept.
- Whitespace before the model's own opening tag is dropped; if no tag follows, it is content.
- A model that repeats an opening tag that the prompt already holds is understood.
- Without a closing tag everything is reasoning, without any tag everything is content.
- After the closing tag, or once content has begun, tags are ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

# Opening and closing tags of published reasoning models, in the order in which they are looked for.
KNOWN_TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("◁think▷", "◁/think▷"),
    ("<thinking>", "</thinking>"),
    ("<Thought>", "</Thought>"),  # Marco-o1
    ("<|im_start|>think", "<|im_start|>answer"),  # s1
)


class TokenVocabulary(Protocol):
    """What `detect_think_tags` asks of a tokenizer."""

    @property
    def chat_template(self) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...


class _State(Enum):
    START = auto()  # before the first non-space character
    REASONING_START = auto()  # dropping newlines
    REASONING = auto()
    CONTENT_START = auto()  # dropping newlines
    CONTENT = auto()


class ThinkingParser:
    """Incremental splitter; `thinking` says that the prompt ended inside an open tag."""

    def __init__(self, open: str = "<think>", close: str = "</think>", thinking: bool = False):
        if not open or not close or open == close:
            raise ValueError(f"open={open!r} and close={close!r} must be two different tags")
        self.open = open
        self.close = close
        self.thinking = thinking
        self.has_reasoning = thinking
        self._state = _State.START
        self.held = ""

    @property
    def in_reasoning(self) -> bool:
        """Whether text that comes now is reasoning (False while that is undecided)."""
        if self._state is _State.START:
            return self.thinking
        return self._state in (_State.REASONING_START, _State.REASONING)

    @property
    def may_open(self) -> bool:
        """Whether an opening tag, if it came now, would be understood."""
        return self._state is _State.START and not self.held.strip()

    def push(self, text: str) -> tuple[str, str]:
        """Adds generated text; returns the new (reasoning, content), either of which may be empty.

        Both are non-empty only if `text` holds the closing tag; reasoning then comes first.
        """
        reasoning = content = ""
        buffer = self.held + text
        self.held = ""
        if self._state is _State.START:
            buffer = self._decide(buffer)
        if self._state is _State.REASONING_START:
            buffer = buffer.lstrip("\n")
            if buffer:
                self._state = _State.REASONING
        if self._state is _State.REASONING:
            reasoning, buffer = self._split_reasoning(buffer)
        if self._state is _State.CONTENT_START:
            buffer = buffer.lstrip("\n")
            if buffer:
                self._state = _State.CONTENT
        if self._state is _State.CONTENT:
            content = buffer
        return reasoning, content

    def flush(self) -> tuple[str, str]:
        """Ends the text; returns what was held back for a tag that never came."""
        text, self.held = self.held, ""
        if self._state is _State.START:
            if self.thinking:
                self._state = _State.REASONING
                return text.lstrip("\n"), ""
            self._state = _State.CONTENT
            return "", text
        return (text, "") if self._state is _State.REASONING else ("", text)

    def _decide(self, buffer: str) -> str:
        """Leaves START if the text so far shows whether the opening tag is there; returns the rest."""
        stripped = buffer.lstrip()
        if stripped.startswith(self.open):
            self._state = _State.REASONING_START
            self.has_reasoning = True
            return stripped[len(self.open) :]
        if self.open.startswith(stripped):
            self.held = buffer
            return ""
        self._state = _State.REASONING_START if self.thinking else _State.CONTENT
        return buffer

    def _split_reasoning(self, buffer: str) -> tuple[str, str]:
        """(reasoning to hand out, text after the closing tag); holds back what may belong to the tag."""
        at = buffer.find(self.close)
        if at >= 0:
            self._state = _State.CONTENT_START
            return buffer[:at].rstrip("\n"), buffer[at + len(self.close) :]
        partial = next(
            k
            for k in range(min(len(self.close) - 1, len(buffer)), -1, -1)
            if buffer.endswith(self.close[:k])
        )
        # Newlines before a closing tag are dropped, so those before a possible one have to wait.
        safe = len(buffer[: len(buffer) - partial].rstrip("\n"))
        self.held = buffer[safe:]
        return buffer[:safe], ""


def split_reasoning(
    text: str, thinking: bool = False, *, open: str = "<think>", close: str = "</think>"
) -> tuple[str | None, str]:
    """(reasoning, content) of a whole reply; reasoning is None if no thinking was opened."""
    parser = ThinkingParser(open, close, thinking)
    first, last = parser.push(text), parser.flush()
    reasoning = first[0] + last[0] if parser.has_reasoning else None
    return reasoning, first[1] + last[1]


def prompt_opens_thinking(prompt: str, open: str = "<think>", close: str = "</think>") -> bool:
    """Whether a rendered prompt ends with an opening tag (and whitespace), so that the reply starts inside it.

    A tag further up, such as one that a user wrote, does not count. `close` is accepted for symmetry with the pair that
    `detect_think_tags` returns.
    """
    return prompt.rstrip().endswith(open)


def detect_think_tags(source: str | TokenVocabulary | None) -> tuple[str, str] | None:
    """The (open, close) tags that a chat template or tokenizer uses, or None.

    A tokenizer counts if both tags are single tokens of its vocabulary or its template names the closing one.
    """
    if source is None:
        return None
    contains: Callable[[str], bool]
    if isinstance(source, str):
        template, contains = source, lambda _: False
    else:
        template = source.chat_template or ""
        token_to_id = source.token_to_id
        contains = lambda token: token_to_id(token) is not None  # noqa: E731
    for open_tag, close_tag in KNOWN_TAGS:
        if close_tag in template or (contains(open_tag) and contains(close_tag)):
            return open_tag, close_tag
    return None
