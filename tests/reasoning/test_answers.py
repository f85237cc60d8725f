"""moejet.reasoning.answers: what is taken from a text, and the truth table of equality."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejet.reasoning import symbolic
from moejet.reasoning.answers import (
    After,
    AnswerKey,
    Boxed,
    Choice,
    FirstMatch,
    LastNumber,
    NumericEqual,
    SympyEqual,
    Tag,
    answer_part,
    group,
    key,
    read_answer,
)
from moejet.reasoning.evaluation import Evaluation
from moejet.reasoning.expression import ExpressionError, parse

PAIRS = [
    (*line.partition(f"  {mark}  ")[::2], mark)
    for line in Path(__file__)
    .with_name("answer_pairs.txt")
    .read_text(encoding="utf-8")
    .splitlines()
    for mark in ("===", "=/=")
    if f"  {mark}  " in line
]
EQUAL = [(a, b) for a, b, mark in PAIRS if mark == "==="]
UNEQUAL = [(a, b) for a, b, mark in PAIRS if mark == "=/="]
UNEQUAL += [("", "0"), ("(" * 500, ")" * 500), ("x" * 5000, "0")]
# Equal by a rule that keys, which form classes, cannot express: percent as its value, a name on one side only.
NOT_BY_KEY = {
    ("50%", "0.5"),
    ("x=5", "2x=10"),
    ("2x+3y=6", r"y=2-\frac{2x}{3}"),
    (r"\sqrt{x^2}", "|x|"),
}
# Different by unit, name or base, which keys leave out.
SAME_KEY = {
    ("5 cm", "5 m"),
    ("5 cm", r"5\text{ cm}^2"),
    ("5 dollars", "5 cents"),
    (r"30^\circ", "30 cm"),
    ("5 apples", "5 oranges"),
    ("$5", "5%"),
    (r"20^\circ C", r"20^\circ F"),
    ("x=5", "y=5"),
    ("10_2", "10_3"),
    (r"\sqrt{x^2}", "x"),
    ("|x|", "x"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
}


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_equal(first: str, second: str) -> None:
    equal = SympyEqual(timeout=20)
    assert equal(first, second)
    assert equal(second, first)
    assert NumericEqual()(first, second)
    if (first, second) not in NOT_BY_KEY:
        assert key(first) == key(second)


@pytest.mark.parametrize(("first", "second"), UNEQUAL)
def test_unequal(first: str, second: str) -> None:
    equal = SympyEqual(timeout=20)
    assert not equal(first, second)
    assert not equal(second, first)
    if (first, second) not in SAME_KEY:
        assert key(first) != key(second)


def test_table_is_large_enough() -> None:
    assert len(EQUAL) >= 100
    assert len(UNEQUAL) >= 100
    assert set(EQUAL) >= NOT_BY_KEY
    assert set(UNEQUAL) >= SAME_KEY


def test_equality_is_reflexive() -> None:
    for text in {text for pair in EQUAL + UNEQUAL for text in pair}:
        assert NumericEqual()(text, text), text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}} and", r"\{1,2\}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{5", None),
        (r"\boxed{4} then \boxed{5", "4"),
        (r"\boxed{}", None),
        ("none", None),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think>nothing", None),
        (r"<think>\boxed{1}", None),
        (r"<think>a</think> \boxed{1} <think>\boxed{2}", None),
        (r"\boxed{1}</think>\boxed{3}</think>\boxed{2}", "2"),
        (r"<Thought>\boxed{1}", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert Boxed()(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer>1</answer> <ANSWER> 2\n</ANSWER>", "2"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer>1", None),
        ("<answer> </answer>", None),
        ("<think><answer>1</answer></think>", None),
    ],
)
def test_tag(text: str, answer: str | None) -> None:
    assert Tag()(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("it is 42.", "42"),
        ("from 3 to 1,234,567.50 in all", "1,234,567.50"),
        ("$1,234.", "1,234"),
        ("x = -5", "-5"),
        ("10-5", "5"),
        ("is −7 degrees", "-7"),
        ("3/4 of it", "3/4"),
        ("50% of it", "50%"),
        ("1.5e-3 m", "1.5e-3"),
        ("1,23", "23"),
        ("no number", None),
        ("<think>5</think>none", None),
        ("<think>5</think>so 6", "6"),
        ("<think>5", None),
        ("the 3rd is 4", "4"),
    ],
)
def test_last_number(text: str, answer: str | None) -> None:
    assert LastNumber()(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("answer is **D**", "D"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{b}", "B"),
        (r"\boxed{\textbf{(D) } 5}", "D"),
        (r"\boxed{5}", None),
        ("I first thought (A), but (C) fits", "C"),
        ("A", "A"),
        ("**B**", "B"),
        ("B. because", "B"),
        ("A cat sat here", None),
        ("The answer is Apple", None),
        ("The final answer is option A", "A"),
        ("<think>Answer: A</think>Answer: B", "B"),
        ("<think>Answer: A", None),
        ("(E)", None),
    ],
)
def test_choice(text: str, answer: str | None) -> None:
    assert Choice()(text) == answer


def test_choice_of_other_letters() -> None:
    assert Choice("ABCDE")("Answer: E") == "E"


def test_chain_and_marker() -> None:
    chain = FirstMatch()
    assert chain(r"\boxed{1} <answer>2</answer> #### 3") == "1"
    assert chain("<answer>2</answer> #### 3") == "2"
    assert chain("4 5\n#### 1,003\nmore 7") == "1,003"
    assert chain("only 4") == "4"
    assert chain("nothing") is None
    assert After()("#### ") is None
    assert FirstMatch((Choice(),))("Answer: A") == "A"


def test_answer_part() -> None:
    assert answer_part("plain") == "plain"
    assert answer_part("plain", thinking=True) is None
    assert answer_part("a</think>b", thinking=True) == "b"
    assert answer_part("◁think▷a◁/think▷b") == "b"


def test_answer_key() -> None:
    answers = AnswerKey()
    assert answers.is_correct(r"<think>.</think>\boxed{0.5}", r"\frac12")
    assert not answers.is_correct(r"<think>\boxed{0.5}", r"\frac12")
    assert answers.is_correct("it is 0.5", "0.5")
    assert not AnswerKey(extract=Boxed()).is_correct("0.5", "0.5")
    assert AnswerKey(thinking=True).answer(r"\boxed{5}") is None
    assert AnswerKey(thinking=True).answer(r"hm</think>\boxed{5}") == "5"
    assert AnswerKey(extract=LastNumber()).is_correct("it is 7", "7")
    assert answers.key("0.5") == answers.key(r"\frac12")
    assert answers.group(["1/2", "x", None, "0.5", None, "x"]) == [0, 1, 2, 0, 4, 1]
    assert answers.group([]) == []


def test_group_is_by_complete_equality() -> None:
    """5 = 5 cm and 5 = 5 m, but no group holds both units; the larger one takes the bare number."""
    answers = ["5 cm", "5", "5 m", "5 m", None, "0.05", "5%", "6"]
    groups = group(answers, NumericEqual())
    assert sorted(i for g in groups for i in g) == [0, 1, 2, 3, 5, 6, 7]
    assert groups[0] == [1, 2, 3]
    assert [5, 6] in groups
    for indices in groups:
        for i, j in itertools.combinations(indices, 2):
            assert NumericEqual()(str(answers[i]), str(answers[j]))
    assert group([]) == []
    assert group([None, None]) == []


def test_group_joins_what_keys_do_not() -> None:
    assert group([r"\sqrt{x^2}", "7", "|x|", "7.0"], SympyEqual(20)) == [[0, 2], [1, 3]]


def test_group_asks_about_pairs_of_keys_only() -> None:
    asked = []

    def equal(first: str, second: str) -> bool:
        asked.append((first, second))
        return NumericEqual()(first, second)

    generator = random.Random(0)
    answers = [generator.choice(["1/2", "0.5", r"\frac12", "2", "2.0", "3"]) for _ in range(200)]
    groups = group(answers, equal)
    assert len(groups) == 3
    assert len(asked) <= 3
    assert [len(g) for g in groups] == sorted((len(g) for g in groups), reverse=True)


@given(st.text(max_size=60))
def test_any_text_is_read(text: str) -> None:
    read_answer(text)
    key(text)
    FirstMatch()(text)
    Choice()(text)


@given(st.text(alphabet="0123456789.,()[]{}\\^_+-*/=<>|x$% frac", max_size=40))
def test_any_mathematical_text_is_read(text: str) -> None:
    assert isinstance(key(text), str)
    assert NumericEqual()(text, text)


@pytest.mark.parametrize("text", ["", ")", "1 2", r"\evil{x}", "x;y", "a:b", "1..2", "f", "\\"])
def test_reader_refuses_or_reads(text: str) -> None:
    if text == "f":
        assert parse(text).kind == "sym"
    else:
        with pytest.raises(ExpressionError):
            parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "(" * 1900,
            r"\frac" * 300,
            "1," * 900,
            "x" * 500,
            "x" * 1999,
            "|" * 500,
            r"\text{a}" * 250,
            "<" * 1000,
        ),
        *(
            "x<" * 900,
            r"\sqrt" * 390 + "2",
            "2^" * 290 + "2",
            "-" * 590 + "1",
            "x" + "!" * 500,
            r"\sin" * 400 + "x",
        ),
        *(
            "a b " * 450,
            r"\pm" * 600,
            r"\{" * 500,
            "[" * 300 + "1" + "]" * 300,
            "e^" * 29 + "9",
            "1/" * 290 + "1",
        ),
        *(
            "9" * 399,
            "{" * 20_000,
            r"\boxed{" * 5000,
            "<answer>" * 5000,
            "1,234" * 8000,
            "answer is " * 5000,
            "0" * 50_000,
        ),
    ],
)
def test_hostile_texts_cost_little(text: str) -> None:
    start = time.process_time()
    key(text)
    NumericEqual()(text, "5")
    FirstMatch()(text)
    Choice()(text)
    assert time.process_time() - start < 1.0


def test_evaluation_has_limits() -> None:
    for text in ("9^9^9", "2^{100000}", "1/0", "600!", r"\infty+1", "(-1)!", "(1/2)!"):
        with pytest.raises(ExpressionError):
            Evaluation().value(parse(text))
    start = time.process_time()
    for text in ("9^{9^{9}}", "(((" * 30 + "1", "-" * 500 + "1", "1" * 500, "1e999"):
        key(text)
    assert time.process_time() - start < 2


# --- the process behind SympyEqual ---------------------------------------------------------------


def test_worker_is_reused_and_replaced_when_it_hangs_or_dies() -> None:
    process = symbolic.shared_process()
    try:
        one, other = parse(r"\sin^2 x + \cos^2 x"), parse("1")
        assert process.equal(one, other, timeout_s=30) is True
        assert process.equal(parse("x"), parse("y"), timeout_s=30) is False
        pid = process.pid
        starts, timeouts = process.starts, process.timeouts
        hard = parse("(" + "+".join(f"\\sin^{{{i}}} x_{i}" for i in range(1, 12)) + ")^{40}")
        start = time.monotonic()
        assert process.equal(hard, parse("x"), timeout_s=0.2) is None
        assert time.monotonic() - start < 10
        assert process.timeouts == timeouts + 1
        assert process.equal(one, other, timeout_s=30) is True
        assert process.starts == starts + 1
        assert process.pid not in (None, pid)
        os.kill(process.pid or 0, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid or 0, os.WEXITED | os.WNOWAIT)
        assert process.equal(one, other, timeout_s=30) is True
        assert process.starts == starts + 2
    finally:
        process.close()
    assert process.pid is None


def test_without_sandbox_equality_stays_numeric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moejet.reasoning.sandbox.platform.machine", lambda: "sparc")
    process = symbolic.SympyProcess()
    assert process.equal(parse("x"), parse("x+0"), timeout_s=1) is None
    assert process.equal(parse("x"), parse("x+0"), timeout_s=1) is None
    assert process.starts == 1


def test_sympy_equal_checks_its_timeout() -> None:
    with pytest.raises(ValueError, match="timeout"):
        SympyEqual(timeout=0)
