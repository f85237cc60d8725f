"""moejet.thinking: where reasoning ends and content begins, for any cutting of the text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moejet.thinking import (
    ThinkingParser,
    detect_think_tags,
    prompt_opens_thinking,
    split_reasoning,
)

OPEN, CLOSE = "<think>", "</think>"


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("plain", False, (None, "plain")),
        ("", False, (None, "")),
        ("  \n plain", False, (None, "  \n plain")),
        ("  \n", False, (None, "  \n")),
        ("<think>\na\n</think>\n\nb", False, ("a", "b")),
        (" \n<think>\na\n</think>\n\nb\n", False, ("a", "b\n")),
        ("<think>\n\n\na\n\n b \n\n\n</think>\n\n\nb", False, ("a\n\n b ", "b")),
        ("<think>\n\n</think>\n\nb", False, ("", "b")),
        ("<think></think>b", False, ("", "b")),
        ("<think>never closed\n\n", False, ("never closed\n\n", "")),
        ("<think>never closed</thi", False, ("never closed</thi", "")),
        ("<thi", False, (None, "<thi")),
        ("a <think>b</think>", False, (None, "a <think>b</think>")),
        ("a</think>b", False, (None, "a</think>b")),
        ("<think>a</think>b<think>c</think>", False, ("a", "b<think>c</think>")),
        ("a\n</think>\n\nb", True, ("a", "b")),
        ("\n\na</think>b", True, ("a", "b")),
        ("  a</think>b", True, ("  a", "b")),
        ("<think>\na</think>b", True, ("a", "b")),
        ("\n<think>a</think>b", True, ("a", "b")),
        ("a <think> b</think>c", True, ("a <think> b", "c")),
        ("</think>b", True, ("", "b")),
        ("", True, ("", "")),
        ("\n\n", True, ("", "")),
        ("only reasoning", True, ("only reasoning", "")),
        ("<</think>b", True, ("<", "b")),
        ("a\n</think\n</think>b", True, ("a\n</think", "b")),
    ],
)
def test_split_reasoning(text: str, thinking: bool, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, thinking) == expected


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


FRAGMENTS = st.sampled_from(
    [OPEN, CLOSE, "<", "</", "</th", "think>", ">", "\n", "\n\n", " ", "a", "bc", "é", "💡"]
)


@given(
    text=st.lists(FRAGMENTS, max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    thinking=st.booleans(),
)
@example(text="a\n\n</think>\n\nb", cuts=list(range(20)), thinking=True)
@example(text=" <think>\n</think>\n", cuts=list(range(20)), thinking=False)
def test_any_chunking_gives_the_same(text: str, cuts: list[int], thinking: bool) -> None:
    parser = ThinkingParser(thinking=thinking)
    reasoning = content = ""
    for piece in pieces(text, cuts):
        r, c = parser.push(piece)
        assert not (r and content), "reasoning after content"
        reasoning += r
        content += c
    r, c = parser.flush()
    reasoning, content = reasoning + r, content + c
    assert (reasoning if parser.has_reasoning else None, content) == split_reasoning(text, thinking)


@given(text=st.lists(FRAGMENTS, max_size=14).map("".join), thinking=st.booleans())
def test_loses_nothing_but_tags_and_whitespace(text: str, thinking: bool) -> None:
    reasoning, content = split_reasoning(text, thinking)

    kept = "".join(((reasoning or "") + content).split())
    whole = "".join(text.split())
    assert len(whole) - len(kept) in (0, len(OPEN), len(CLOSE), len(OPEN) + len(CLOSE))


def test_streams_without_delay() -> None:
    parser = ThinkingParser(thinking=True)
    assert parser.push("some words") == ("some words", "")
    assert parser.push(" <") == (" ", "")
    assert parser.push("b") == ("<b", "")
    assert parser.in_reasoning
    assert parser.push("\n\n") == ("", "")
    assert parser.push("</think") == ("", "")
    assert parser.push(">\n\nDone") == ("", "Done")
    assert not parser.in_reasoning
    assert parser.push("</think>\n") == ("", "</think>\n")


def test_other_tags() -> None:
    assert split_reasoning("◁think▷a◁/think▷b", open="◁think▷", close="◁/think▷") == ("a", "b")
    with pytest.raises(ValueError, match="two different tags"):
        ThinkingParser("<x>", "<x>")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|user|>hi<|assistant|><think>\n", True),
        ("<|user|>hi<|assistant|><think>", True),
        ("<|user|>hi<|assistant|>", False),
        ("<|user|>what is <think>?<|assistant|>", False),
        ("<|assistant|><think>\n\n</think>\n\n", False),
        ("", False),
    ],
)
def test_prompt_opens_thinking(prompt: str, expected: bool) -> None:
    assert prompt_opens_thinking(prompt) is expected


def test_detect_think_tags() -> None:
    class Vocabulary:
        chat_template: str | None = None

        def __init__(self, *tokens: str):
            self.tokens = tokens

        def token_to_id(self, token: str) -> int | None:
            return self.tokens.index(token) if token in self.tokens else None

    assert detect_think_tags(None) is None
    assert detect_think_tags("{{ messages[0].content }}") is None
    assert detect_think_tags("{{ content.split('</think>')[-1] }}") == (OPEN, CLOSE)
    assert detect_think_tags("◁think▷ ◁/think▷") == ("◁think▷", "◁/think▷")
    assert detect_think_tags(Vocabulary("<think>", "</think>")) == (OPEN, CLOSE)
    assert detect_think_tags(Vocabulary("<think>")) is None
