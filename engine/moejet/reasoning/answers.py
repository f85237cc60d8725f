"""What a model answered, taken from its text, and whether that is the answer that was wanted.

    answers = AnswerKey(extract=FirstMatch((Boxed(), LastNumber())), equal=SympyEqual(timeout=2))
    answers.answer(text)            # "\\frac{1}{2}", or None
    answers.is_correct(text, "0.5")

Only what follows the end of the thinking counts; a thinking without its end tag holds no answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from moejet.reasoning.answer_form import read_answer
from moejet.reasoning.equality import NumericEqual, SympyEqual, group, key
from moejet.thinking import KNOWN_TAGS
from moejet.validation import checked

__all__ = [
    "After",
    "AnswerKey",
    "Boxed",
    "Choice",
    "FirstMatch",
    "LastNumber",
    "NumericEqual",
    "SympyEqual",
    "Tag",
    "answer_part",
    "group",
    "key",
    "read_answer",
]


@runtime_checkable
class Extractor(Protocol):
    def __call__(self, content: str) -> str | None:
        """The answer in a text, None if there is none."""


def answer_part(text: str, *, thinking: bool = False) -> str | None:
    """The text behind the last end of thinking; None if it never ended. `thinking`: the prompt opened it."""
    ends = [text.rfind(close) + len(close) for _, close in KNOWN_TAGS if close in text]
    start = max(ends, default=0)
    opened = thinking if not ends else False
    if opened or any(tag in text[start:] for tag, _ in KNOWN_TAGS):
        return None
    return text[start:]


@dataclass(frozen=True, slots=True)
class Boxed:
    """The content of the last \\boxed{...} whose braces are balanced."""

    def __call__(self, content: str) -> str | None:
        part = answer_part(content) or ""
        closing = _partners(part)
        found, at = None, 0
        while (match := _BOX.search(part, at)) is not None:
            at = closing.get(match.end() - 1, match.end())
            if at > match.end() and (inside := part[match.end() : at].strip()):
                found = inside
        return found


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def _partners(text: str) -> dict[int, int]:
    """Where the brace that is opened at a position is closed; \\{ and \\} do not count."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match.group() == "{":
            opened.append(match.start())
        elif match.group() == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


@dataclass(frozen=True, slots=True)
class Tag:
    """The content of the last <name>...</name>."""

    name: str = "answer"

    def __call__(self, content: str) -> str | None:
        part = answer_part(content) or ""
        name = re.escape(self.name)
        found = re.findall(
            rf"<{name}>((?:(?!<{name}>).)*?)</{name}>", part, re.DOTALL | re.IGNORECASE
        )
        return found[-1].strip() or None if found else None


@dataclass(frozen=True, slots=True)
class After:
    """The rest of the line behind the last `marker`, as in GSM8K's `#### 42`."""

    marker: str = "####"

    def __call__(self, content: str) -> str | None:
        part = answer_part(content) or ""
        _, found, rest = part.rpartition(self.marker)
        line = rest.strip().split("\n", 1)[0].strip()
        return line or None if found else None


@dataclass(frozen=True, slots=True)
class LastNumber:
    """The last number in the text: with sign, thousands separators, decimals, a fraction or per cent."""

    def __call__(self, content: str) -> str | None:
        found = _NUMBER.findall(answer_part(content) or "")
        return found[-1].replace("−", "-") if found else None


_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−])?"
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,]\d)|(?<![\d])\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?(?:\s?\\?%)?"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The letter of a multiple choice, in upper case."""

    letters: str = "ABCD"

    def __call__(self, content: str) -> str | None:
        part = answer_part(content)
        if part is None:
            return None
        letter = f"([{self.letters}{self.letters.lower()}])"
        boxed = Boxed()(part)
        if boxed is not None:
            inside = re.fullmatch(
                rf"\W*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{{)?\W*{letter}(?:\b.*)?",
                boxed,
                re.DOTALL,
            )
            return inside.group(1).upper() if inside else None
        upper = f"([{self.letters}])"
        patterns = (
            rf"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|option|choice))*)\s*[:=]?\s*[*_$\s(\[]*{upper}(?![\w'])",
            rf"(?m:^\W*{upper}\W*$)",
            rf"\({upper}\)",
            rf"(?m:^\s*\**{upper}[.):])",
        )
        for pattern in patterns:
            found = re.findall(pattern, part)
            if found:
                return str(found[-1])
        return None


@dataclass(frozen=True, slots=True)
class FirstMatch:
    """The first extractor that finds something."""

    extractors: Sequence[Extractor] = (Boxed(), Tag(), After(), LastNumber())

    def __call__(self, content: str) -> str | None:
        return next((a for e in self.extractors if (a := e(content)) is not None), None)


@dataclass(frozen=True, slots=True)
@checked
class AnswerKey:
    """How answers of one kind of task are found and compared; strategies vote with it.

    thinking: prompts end inside an open thinking tag, so a text without the closing one is all thinking
    """

    extract: Extractor = field(default_factory=FirstMatch)
    equal: Callable[[str, str], bool] = field(default_factory=SympyEqual)
    thinking: bool = False

    def answer(self, text: str) -> str | None:
        part = answer_part(text, thinking=self.thinking)
        return None if part is None else self.extract(part)

    def is_correct(self, text: str, reference: str) -> bool:
        answer = self.answer(text)
        return answer is not None and self.equal(answer, reference)

    def key(self, answer: str) -> str:
        return key(answer)

    def group(self, answers: Sequence[str | None]) -> list[int]:
        """For each answer the index of the first one of its group, see `equality.group`; None is alone."""
        firsts = list(range(len(answers)))
        for members in group(answers, self.equal):
            for index in members:
                firsts[index] = members[0]
        return firsts
