"""Problems from JSON lines that the user has: AIME, MATH-500, GSM8K, GPQA and the plain form.

    shape     question                     answer
    aime      problem                      answer: a whole number 0..999
    math500   problem                      answer, or else the last \\boxed{} of solution
    gsm8k     question                     answer: what follows the last ####
    gpqa      Question                     Correct Answer; with Incorrect Answer 1, 2, ... shuffled by the seed
    plain     question, problem or prompt  answer

Names of fields are matched without regard to case. Nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moejet.reasoning.answers import After, AnswerKey, Boxed, Choice, FirstMatch, LastNumber

Shape = Literal["aime", "math500", "gsm8k", "gpqa", "plain"]
SHAPES: tuple[Shape, ...] = ("aime", "math500", "gsm8k", "gpqa", "plain")
QUESTION_FIELDS = ("question", "problem", "prompt")
ID_FIELDS = ("id", "unique_id", "record id", "problem_id")
LETTERS = "ABCDEFGHIJ"
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One task. `answer` is a choice's letter where there are choices."""

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    subject: str = ""
    level: str = ""

    @property
    def prompt(self) -> str:
        """The question, with its choices as lettered lines."""
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, "", *lines]) if lines else self.question


def load_problems(
    path: str | Path,
    shape: Shape | Literal["auto"] = "auto",
    *,
    seed: int = 0,
    duplicates: Literal["error", "drop", "keep"] = "error",
    max_line_bytes: int = MAX_LINE_BYTES,
) -> list[Problem]:
    """All problems of a file. `auto` goes by the first line. Raises ValueError naming file, line, field and remedy."""
    if shape != "auto" and shape not in SHAPES:
        raise ValueError(f"shape={shape!r} must be auto or one of {', '.join(SHAPES)}")
    if duplicates not in ("error", "drop", "keep"):
        raise ValueError(f"duplicates={duplicates!r} must be error, drop or keep")
    file = Path(path)
    problems: list[Problem] = []
    questions: dict[str, int] = {}
    ids: dict[str, int] = {}
    for record in _records(file, max_line_bytes):
        if shape == "auto":
            shape = detect_shape(record)
        problem = _problem(record, shape, seed)
        same = " ".join(problem.prompt.split()) if not problem.choices else problem.question
        if duplicates != "keep" and same in questions:
            if duplicates == "error":
                raise record.error(
                    f"repeats the question of line {questions[same]}: remove one, or load with duplicates='drop'"
                )
            continue
        if problem.id in ids:
            if record.find(ID_FIELDS) is not None:
                raise record.error(
                    f"repeats id {problem.id!r} of line {ids[problem.id]}: ids must differ"
                )
            problem = replace(problem, id=f"{problem.id}-{record.line}")
        questions.setdefault(same, record.line)
        ids[problem.id] = record.line
        problems.append(problem)
    if not problems:
        raise ValueError(f"{file} holds no problems: expected one JSON object per line")
    return problems


def shape_of(path: str | Path) -> Shape:
    """What `auto` takes a file for: by its first line."""
    record = next(_records(Path(path), MAX_LINE_BYTES), None)
    return "plain" if record is None else detect_shape(record)


def answer_key(shape: Shape, *, thinking: bool = False) -> AnswerKey:
    """How answers to problems of this shape are found and compared."""
    if shape == "gpqa":
        return AnswerKey(Choice(), equal=str.__eq__, thinking=thinking)
    if shape in ("aime", "math500"):
        return AnswerKey(Boxed(), thinking=thinking)
    return AnswerKey(FirstMatch((Boxed(), After(), LastNumber())), thinking=thinking)


@dataclass(frozen=True, slots=True)
class Record:
    """One line's object; fields by lower-case name."""

    file: Path
    line: int
    fields: dict[str, Any]

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.file}, line {self.line}: {message}")

    def find(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if self.fields.get(name) not in (None, "")), None)

    def text(self, *names: str) -> str:
        """The first of the named fields, as text that is not empty."""
        name = self.find(names)
        if name is None:
            there = ", ".join(sorted(self.fields)) or "none"
            raise self.error(
                f"needs the field {' or '.join(map(repr, names))}, its fields are: {there}; "
                "rename the field or choose another shape"
            )
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(
                f"field {name!r} is {type(value).__name__}, it must be a text or a number"
            )
        text = str(value).strip()
        if not text:
            raise self.error(f"field {name!r} is blank: fill it or remove the line")
        return text


def _records(file: Path, max_line_bytes: int) -> Iterator[Record]:
    try:
        stream = file.open("rb")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): check the path") from error
    with stream:
        number = 0
        while raw := stream.readline(max_line_bytes + 1):
            number += 1
            where = f"{file}, line {number}"
            if len(raw) > max_line_bytes:
                raise ValueError(
                    f"{where}: longer than {max_line_bytes} bytes; is it one JSON object per line? "
                    "If so, raise max_line_bytes"
                )
            line = _decoded(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, where)
            if line:
                yield Record(file, number, _fields(line, where))


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}): convert the file"
        ) from error


def _fields(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = (
            "the file seems to be one JSON array: write one object per line"
            if line[0] == "["
            else "repair the line"
        )
        raise ValueError(f"{where}: no JSON ({error}); {hint}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: a JSON {type(value).__name__}, but each line must hold one object"
        )
    fields: dict[str, Any] = {}
    for name, content in value.items():
        if fields.setdefault(name.strip().lower(), content) is not content:
            raise ValueError(f"{where}: field {name!r} appears twice in different case: keep one")
    return fields


def detect_shape(record: Record) -> Shape:
    if "correct answer" in record.fields:
        return "gpqa"
    if "####" in str(record.fields.get("answer", "")):
        return "gsm8k"
    if "problem" in record.fields and "solution" in record.fields:
        return "math500"
    return "plain"


def _problem(record: Record, shape: Shape, seed: int) -> Problem:
    name = record.find(ID_FIELDS)
    id = str(record.fields[name]) if name else str(record.line)
    question = record.text(*QUESTION_FIELDS)
    subject, level = _label(record, "subject", "high-level domain"), _label(record, "level")
    if shape == "gpqa":
        choices, letter = _shuffled_choices(record, f"{seed}:{question}")
        return Problem(id, question, letter, choices, subject, level)
    return Problem(id, question, _answer(record, shape), (), subject, level)


def _label(record: Record, *names: str) -> str:
    name = record.find(names)
    return str(record.fields[name]) if name else ""


def _answer(record: Record, shape: Shape) -> str:
    if shape == "math500" and record.find(("answer",)) is None:
        boxed = Boxed()(record.text("solution"))
        if boxed is None:
            raise record.error(
                "has no 'answer', and its 'solution' no \\boxed{}: add the field 'answer'"
            )
        return boxed
    answer = record.text("answer")
    if shape == "gsm8k":
        found = After()(answer)
        if found is None:
            raise record.error(
                "field 'answer' holds no '#### number': add it, or choose the shape 'plain'"
            )
        return found
    if shape == "aime":
        if not answer.isdecimal() or int(answer) > 999:
            raise record.error(
                f"field 'answer' is {answer!r}, AIME's answers are whole numbers 0..999"
            )
        return str(int(answer))
    return answer


def _shuffled_choices(record: Record, seed: str) -> tuple[tuple[str, ...], str]:
    """The order depends on the seed and the question only, not on where the line stands."""
    right = record.text("correct answer")
    names = sorted(name for name in record.fields if name.startswith("incorrect answer"))
    wrong = [record.text(name) for name in names]
    if not 1 <= len(wrong) < len(LETTERS):
        raise record.error(
            f"has {len(wrong)} fields 'Incorrect Answer 1', '... 2', ...: needs 1..{len(LETTERS) - 1}"
        )
    choices = [right, *wrong]
    if len(set(choices)) != len(choices):
        raise record.error("two of its choices are the same: repair the line")
    random.Random(seed).shuffle(choices)
    return tuple(choices), LETTERS[choices.index(right)]
