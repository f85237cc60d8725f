"""moejet.reasoning.datasets: every shape, and errors that name file, line, field and remedy."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest

from moejet.reasoning.datasets import LETTERS, answer_key, load_problems


def write(path: Path, *lines: object) -> Path:
    file = path / "problems.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def gpqa(number: int, **changes: Any) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    return {
        "Record ID": f"r{number}",
        "Question": f"Q{number}?",
        "Correct Answer": "right",
        **wrong,
        **changes,
    }


def test_plain(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"question": "1+1?", "answer": 2},
        {"problem": "1/2?", "answer": 0.5, "id": "half"},
        {"prompt": " x? ", "answer": " y ", "id": 7},
        {"Question": "z?", "ANSWER": "ß"},
    )
    problems = load_problems(file)
    assert [(p.id, p.question, p.answer) for p in problems] == [
        ("1", "1+1?", "2"),
        ("half", "1/2?", "0.5"),
        ("7", "x?", "y"),
        ("4", "z?", "ß"),
    ]
    assert problems[0].prompt == "1+1?"


def test_aime(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"ID": "2024-I-1", "Problem": "P", "Solution": "...", "Answer": 33},
        {"ID": "2024-I-2", "Problem": "Q", "Answer": "073"},
    )
    assert [p.answer for p in load_problems(file, "aime")] == ["33", "73"]
    for bad in ("1000", "-1", "3.5", "x"):
        with pytest.raises(ValueError, match=r"line 1: field 'answer'.*0\.\.999"):
            load_problems(write(tmp_path, {"problem": "P", "answer": bad}), "aime")


def test_math500(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"problem": "P", "solution": r"so \boxed{1}", "answer": r"\frac12", "subject": "Algebra", "level": 2,
         "unique_id": "test/1.json"},
        {"problem": "Q", "solution": r"first \boxed{3}, then \boxed{\frac{1}{2}}"},
    )  # fmt: skip
    first, second = load_problems(file)
    assert (first.answer, first.subject, first.level, first.id) == (
        r"\frac12",
        "Algebra",
        "2",
        "test/1.json",
    )
    assert second.answer == r"\frac{1}{2}"
    with pytest.raises(ValueError, match=r"line 1: has no 'answer'.*add the field"):
        load_problems(write(tmp_path, {"problem": "P", "solution": "no box"}))


def test_gsm8k(tmp_path: Path) -> None:
    file = write(tmp_path, {"question": "Q", "answer": "a <<1+1=2>>\n#### 1,002"})
    assert load_problems(file)[0].answer == "1,002"
    assert answer_key("gsm8k").is_correct("It is 1002.", "1,002")
    with pytest.raises(ValueError, match=r"line 2: field 'answer' holds no '#### number'"):
        load_problems(
            write(tmp_path, {"question": "Q", "answer": "#### 1"}, {"question": "R", "answer": "2"})
        )


def test_gpqa_choices_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    records = [gpqa(i) for i in range(200)]
    problems = load_problems(write(tmp_path, *records), seed=3)
    for problem in problems:
        assert problem.choices[LETTERS.index(problem.answer)] == "right"
        assert sorted(problem.choices) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    counts = collections.Counter(p.answer for p in problems)
    assert set(counts) == set("ABCD")
    assert min(counts.values()) > 25
    backwards = load_problems(write(tmp_path, *records[::-1]), seed=3)[::-1]
    assert [(p.question, p.choices) for p in backwards] == [
        (p.question, p.choices) for p in problems
    ]
    other = load_problems(write(tmp_path, *records), seed=4)
    assert [p.choices for p in other] != [p.choices for p in problems]
    first = problems[0]
    assert first.prompt.splitlines()[:3] == ["Q0?", "", f"A. {first.choices[0]}"]
    assert answer_key("gpqa").is_correct(f"The answer is ({first.answer})", first.answer)
    assert not answer_key("gpqa").is_correct("none", first.answer)


def test_gpqa_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two of its choices"):
        load_problems(write(tmp_path, gpqa(1, **{"Incorrect Answer 1": "right"})))
    with pytest.raises(ValueError, match=r"has 0 fields 'Incorrect Answer"):
        load_problems(write(tmp_path, {"question": "Q", "correct answer": "a"}))
    with pytest.raises(ValueError, match=r"'incorrect answer 2'"):
        load_problems(write(tmp_path, gpqa(1, **{"Incorrect Answer 2": None})))


def test_byte_order_mark_blank_lines_and_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "windows.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"question": "a", "answer": "1"}\r\n\r\n   \n{"question": "b", "answer": "2"}'
    )
    assert [(p.id, p.question) for p in load_problems(file)] == [("1", "a"), ("4", "b")]


def test_duplicates(tmp_path: Path) -> None:
    a, b = {"question": "a  b", "answer": "1"}, {"question": "a b", "answer": "1"}
    file = write(tmp_path, a, {"question": "c", "answer": "2"}, b)
    with pytest.raises(
        ValueError, match=r"line 3: repeats the question of line 1: .*duplicates='drop'"
    ):
        load_problems(file)
    assert [p.id for p in load_problems(file, duplicates="drop")] == ["1", "2"]
    assert [p.id for p in load_problems(file, duplicates="keep")] == ["1", "2", "3"]
    twice = write(tmp_path, {"id": "x", **a}, {"id": "x", "question": "d", "answer": "1"})
    with pytest.raises(ValueError, match=r"line 2: repeats id 'x' of line 1"):
        load_problems(twice)
    clash = write(tmp_path, {"id": "2", **a}, {"question": "d", "answer": "1"})
    assert [p.id for p in load_problems(clash)] == ["2", "2-2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"}', r"line 2: needs the field 'answer', its fields are: question"),
        ('{"answer": "a"}', r"'question' or 'problem' or 'prompt'.*rename the field"),
        ("{}", r"its fields are: none"),
        ('{"question": "a", "answer": null}', r"needs the field 'answer'"),
        ('{"question": "a", "answer": " "}', r"field 'answer' is blank"),
        ('{"question": "a", "answer": [1]}', r"field 'answer' is list"),
        ('{"question": "a", "answer": true}', r"field 'answer' is bool"),
        ('{"question": "a", "Question": "b", "answer": 1}', r"'Question' appears twice"),
        ('{"question": "a", "answer": "b"', r"no JSON .* repair the line"),
        ('[{"question": "a", "answer": "b"},', r"one JSON array: write one object per line"),
        ("[1]", r"a JSON list"),
        ("5", r"a JSON int"),
        ("[" * 100_000, r"no JSON"),
        ("\ud800", r"not UTF-8"),
    ],
)
def test_errors_name_file_line_field_and_remedy(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    good = b'{"question": "fine", "answer": "1"}\n'
    file.write_bytes(good + line.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message) as caught:
        load_problems(file)
    assert str(caught.value).startswith(f"{file}, line 2: ")


def test_huge_lines(tmp_path: Path) -> None:
    file = write(tmp_path, {"question": "a" * 5000, "answer": "1"})
    assert len(load_problems(file)[0].question) == 5000
    with pytest.raises(ValueError, match=r"line 1: longer than 1000 bytes.*max_line_bytes"):
        load_problems(file, max_line_bytes=1000)
    size = file.stat().st_size - 1  # without the line's end
    assert load_problems(file, max_line_bytes=size + 1)


def test_files_and_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read.*check the path"):
        load_problems(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        load_problems(tmp_path)
    with pytest.raises(ValueError, match="holds no problems"):
        load_problems(write(tmp_path, "", " "))
    file = write(tmp_path, {"question": "a", "answer": "1"})
    with pytest.raises(ValueError, match=r"shape='gsm9k'.*gsm8k"):
        load_problems(file, "gsm9k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="duplicates='no'"):
        load_problems(file, duplicates="no")  # type: ignore[arg-type]


def test_answer_keys() -> None:
    assert answer_key("aime").is_correct(r"\boxed{033}", "33")
    assert not answer_key("aime").is_correct("33", "33")
    assert answer_key("math500").is_correct(r"\boxed{0.5}", r"\frac12")
    assert answer_key("plain").is_correct("so 5", "5")
    assert not answer_key("plain", thinking=True).is_correct("so 5", "5")
