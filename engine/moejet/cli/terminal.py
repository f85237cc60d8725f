"""Terminal output: styles where they can be shown, and the layout of a streamed answer."""

import os
import sys
from typing import TextIO

_DIM, _BOLD, _RED, _YELLOW, _GREEN, _RESET = (f"\x1b[{code}m" for code in (2, 1, 31, 33, 32, 0))
_STYLES = {"dim": _DIM, "bold": _BOLD, "red": _RED, "yellow": _YELLOW, "green": _GREEN}

# A model may write escape sequences; shown as pictures (U+2400 block) they cannot drive a terminal.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROL_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(128, 160), 65533)


def supports_style(stream: TextIO) -> bool:
    """True for a terminal that shows colours; https://no-color.org switches them off."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def style(text: str, name: str, stream: TextIO) -> str:
    """`text` in one of the styles dim, bold, red, yellow, green, where `stream` can show it."""
    return f"{_STYLES[name]}{text}{_RESET}" if text and supports_style(stream) else text


def shown(text: str) -> str:
    """`text` without characters that could drive a terminal."""
    return text.translate(_CONTROL_PICTURES)


def note(text: str) -> None:
    """One dimmed line on stderr: figures and remarks that are not part of the answer."""
    text = shown(text) if sys.stderr.isatty() else text
    print(style(text, "dim", sys.stderr), file=sys.stderr, flush=True)


class AnswerWriter:
    """Writes an answer while it is generated: dimmed thinking, a blank line, the answer.

    Text comes in pieces of any length. Newlines at the ends of either part are laid out here, so
    the blank line is one line whatever the model writes around its closing tag.
    """

    def __init__(self, out: TextIO, *, hide_thinking: bool = False) -> None:
        self._out = out
        self._hide_thinking = hide_thinking
        self._is_terminal = out.isatty()
        self._part = ""
        self._held_newlines = 0
        self._placeholder = False

    def push(self, reasoning: str, content: str) -> None:
        """Write the next piece of either part."""
        if reasoning:
            self._thinking(reasoning)
        if content:
            self._write("content", content)
        self._out.flush()

    def push_raw(self, text: str) -> None:
        """Write text as it is, without any layout."""
        self._out.write(self._shown(text))
        self._out.flush()

    def finish(self) -> None:
        """End the last line. Safe to call at any point, also after an interruption."""
        self._clear_placeholder()
        if self._part:
            self._out.write("\n")
        self._part = ""
        self._held_newlines = 0
        self._out.flush()

    def _thinking(self, text: str) -> None:
        if not self._hide_thinking:
            self._write("reasoning", text)
        elif supports_style(self._out) and not self._placeholder and not self._part:
            self._placeholder = True
            self._out.write(style("thinking ...", "dim", self._out))

    def _clear_placeholder(self) -> None:
        if self._placeholder:
            self._out.write("\r\x1b[K")
            self._placeholder = False

    def _write(self, part: str, text: str) -> None:
        if part != self._part:
            text = text.lstrip("\n")
            if not text:
                return
            self._clear_placeholder()
            if self._part:
                self._out.write("\n\n")
            self._part = part
            self._held_newlines = 0
        body = text.rstrip("\n")
        if body:
            body = "\n" * self._held_newlines + body
            self._held_newlines = 0
            body = self._shown(body)
            # Styled piece by piece: a program killed here leaves the terminal as it was.
            self._out.write(style(body, "dim", self._out) if part == "reasoning" else body)
        self._held_newlines += len(text) - len(text.rstrip("\n"))

    def _shown(self, text: str) -> str:
        return shown(text) if self._is_terminal else text
