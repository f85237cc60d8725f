"""Finds markers in text that arrives in pieces, telling those that came as tokens from mere look-alikes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache


class MarkerScanner:
    """The text that is not yet understood.

    tokens: texts that are single tokens of the vocabulary. A marker that holds one counts only where it came as a
    token; any other marker counts wherever its characters stand.
    """

    def __init__(self, tokens: Collection[str] = ()):
        self.text = ""
        self._start = 0  # of `text`, in the characters of the whole reply
        self._found: set[int] = set()
        self._anchors: dict[str, int | None] = {}
        self._tokens = tokens

    def push(self, text: str) -> None:
        self.text += text

    def mark(self, places: Sequence[int]) -> None:
        """Tells where tokens of `tokens` begin, in the characters of the whole reply."""
        self._found.update(places)

    def take(self, length: int | None = None) -> str:
        """Removes text from the beginning, all without a length."""
        length = len(self.text) if length is None else length
        taken, self.text = self.text[:length], self.text[length:]
        self._start += length
        if len(self._found) > 64:
            self._found = {place for place in self._found if place >= self._start}
        return taken

    def find(self, markers: Sequence[str]) -> tuple[int, str | None]:
        """Where the first of the markers stands, and which; without one (how much text certainly holds none, None)."""
        best: tuple[int, str | None] = (len(self.text) - _held(self.text, tuple(markers)), None)
        for marker in markers:
            at = self.text.find(marker)
            while at >= 0 and not self._counts(at, marker):
                at = self.text.find(marker, at + 1)
            if at >= 0 and (best[1] is None or at < best[0]):
                best = (at, marker)
        return best

    def _counts(self, at: int, marker: str) -> bool:
        if marker not in self._anchors:
            places = (marker.find(token) for token in self._tokens if token in marker)
            self._anchors[marker] = min(places, default=None)
        anchor = self._anchors[marker]
        return anchor is None or self._start + at + anchor in self._found


def _held(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a marker begins with."""
    beginnings, longest = _beginnings(markers)
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if text[-n:] in beginnings), 0)


@lru_cache(maxsize=256)
def _beginnings(markers: tuple[str, ...]) -> tuple[frozenset[str], int]:
    """All that a marker may begin with, short of the whole, and the length of the longest."""
    found = frozenset(marker[:n] for marker in markers for n in range(1, len(marker)))
    return found, max(map(len, found), default=0)
