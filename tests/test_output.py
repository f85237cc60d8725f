"""Stop strings and the split into reasoning and content, whatever the pieces the text arrives in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from moejet.output import OutputAssembler, StopMatcher, held_back
from moejet.request import SamplingParams
from moejet.testing.byte_tokenizer import write_tokenizer
from moejet.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    (path / "config.json").write_text('{"eos_token_id": 1}')
    return Tokenizer.from_path(path)


def _run(tokenizer, text: str, *, thinking=False, tags=("<think>", "</think>"), **params):
    assembler = OutputAssembler(
        tokenizer, SamplingParams(**params), think_tags=tags, thinking=thinking
    )
    streamed, reasoning, content = "", "", ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        piece = assembler.push(token_id)
        reasoning, content = reasoning + piece[0], content + piece[1]
        streamed += assembler.take_text()
        if assembler.stopped_by is not None:
            break
    piece = assembler.flush()
    reasoning, content = reasoning + piece[0], content + piece[1]
    streamed += assembler.take_text()
    assert streamed == assembler.text
    assert (reasoning, content) == (assembler.reasoning or "", assembler.content)
    return assembler


def test_plain_text_passes_through(tokenizer):
    result = _run(tokenizer, "héllo wörld ✓", tags=None)
    assert result.text == result.content == "héllo wörld ✓"
    assert result.reasoning is None


def test_thinking_is_split_off(tokenizer):
    result = _run(tokenizer, "a < b\n</think>\n\nThe answer.", thinking=True)
    assert result.reasoning.strip() == "a < b"
    assert result.content == "The answer."


def test_stop_string_cuts_content_and_text(tokenizer):
    result = _run(tokenizer, "</think>one STOP two", thinking=True, stop="STOP")
    assert result.stopped_by == "STOP"
    assert result.content == "one "
    assert result.text.endswith("one ")


def test_stop_strings_inside_the_thinking_count_only_on_request(tokenizer):
    text = "first\nsecond</think>third\nfourth"
    assert _run(tokenizer, text, thinking=True, stop="\n").content == "third"
    result = _run(tokenizer, text, thinking=True, stop="\n", stop_in_reasoning=True)
    assert result.reasoning == "first"
    assert result.content == ""
    assert result.text == "first"


def test_a_half_stop_string_at_the_end_is_kept(tokenizer):
    result = _run(tokenizer, "abc STO", tags=None, stop="STOP")
    assert result.stopped_by is None
    assert result.text == result.content == "abc STO"


def test_stop_found_only_at_the_end(tokenizer):
    """Newlines held back in case a closing tag follows turn out to be the stop string."""
    result = _run(tokenizer, "a\n\n", thinking=True, stop="\n", stop_in_reasoning=True)
    assert (result.reasoning, result.text) == ("a", "a")


def test_stop_string_that_the_closing_tag_contains(tokenizer):
    result = _run(tokenizer, "  </think>1 < 2", thinking=True, stop="<")
    assert result.content == "1 "
    assert result.text == "  </think>1 "


def test_special_think_tags_still_separate(tmp_path):
    import json

    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        if "think" in token["content"]:
            token["special"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    result = _run(Tokenizer.from_path(tmp_path), "<think>abc</think>def")
    assert (result.reasoning, result.content) == ("abc", "def")


def test_the_stop_string_that_is_complete_first_wins():
    matcher = StopMatcher(("bb", "ab"))
    assert matcher.push("xabb") == "x"
    assert matcher.found == "ab"
    matcher = StopMatcher(("\naa", "a"))
    assert matcher.push("\naa") == "\n"
    assert matcher.found == "a"


@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_pieces_do_not_matter(text, stop, cuts):
    whole = StopMatcher(tuple(stop))
    expected = whole.push(text)
    expected += "" if whole.found else whole.flush()
    pieces, start = StopMatcher(tuple(stop)), 0
    got = ""
    for cut in [*sorted(min(c, len(text)) for c in cuts), len(text)]:
        got += pieces.push(text[start:cut])
        start = cut
    got += "" if pieces.found else pieces.flush()
    assert got == expected
    ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    assert got == (text[: min(ends)[1]] if ends else text)


def test_held_back_is_the_longest_possible_beginning():
    assert held_back("xxab", ("abc",)) == 2
    assert held_back("xxabc", ("abc",)) == 0
    assert held_back("aa", ("aab", "ac")) == 2


@pytest.fixture(scope="module")
def tool_tokenizer(tmp_path_factory):
    """With two markers of tool calls, one of them a special token, which replies would hide."""
    path = tmp_path_factory.mktemp("tool_tokenizer")
    write_tokenizer(path)
    raw = RawTokenizer.from_file(str(path / "tokenizer.json"))
    raw.add_special_tokens([AddedToken("<tool_call>", special=True)])
    raw.add_tokens([AddedToken("<｜tool▁sep｜>", special=False)])
    raw.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text('{"eos_token_id": 1}')
    return Tokenizer.from_path(path)


MARKED = "a\n\n</think>\n\n<tool_call>é<｜tool▁sep｜>\n"


def _markers(assembler, token_ids):
    """The text of reasoning and content, and the places of the markers in it."""
    text, places = "", []
    for token_id in token_ids:
        text += "".join(assembler.push(token_id))
        places += assembler.take_markers()
    return text + "".join(assembler.flush()), [*places, *assembler.take_markers()]


@pytest.mark.parametrize("thinking", [True, False])
def test_markers_of_tool_calls_have_text_and_places(tool_tokenizer, thinking):
    tags = ("<think>", "</think>")
    for stop in ((), ("é<never",), ("\n\nnever",)):
        params = SamplingParams(stop=stop, stop_in_reasoning=True)
        assembler = OutputAssembler(tool_tokenizer, params, think_tags=tags, thinking=thinking)
        before = "<tool_call> in thought " if thinking else ""
        text, places = _markers(assembler, tool_tokenizer.encode(before + MARKED, False))
        expected = [
            i for i in range(len(text)) if text.startswith(("<tool_call>", "<｜tool▁sep｜>"), i)
        ]
        assert places == expected
        assert len(places) == 2 + thinking


def test_typed_markers_have_no_place(tool_tokenizer):
    assembler = OutputAssembler(tool_tokenizer, SamplingParams(), think_tags=None, thinking=False)
    ids = [
        i
        for piece in ("<tool", "_call>", "<tool_call>")
        for i in tool_tokenizer.encode(piece, add_special_tokens=False)
    ]
    assert _markers(assembler, ids) == ("<tool_call><tool_call>", [len("<tool_call>")])


def test_markers_behind_a_stop_string_do_not_count(tool_tokenizer):
    params = SamplingParams(stop=("STOP",))
    assembler = OutputAssembler(tool_tokenizer, params, think_tags=None, thinking=False)
    ids = tool_tokenizer.encode("<tool_call> STOP<tool_call>", add_special_tokens=False)
    assert _markers(assembler, ids)[1] == [0]


def test_the_end_of_the_thinking_comes_before_the_content(tokenizer):
    """What could have begun a stop string inside the thinking is not kept until the end of the answer."""
    params = SamplingParams(stop=("STOP",), stop_in_reasoning=True)
    assembler = OutputAssembler(
        tokenizer, params, think_tags=("<think>", "</think>"), thinking=True
    )
    pieces = [assembler.push(i) for i in tokenizer.encode("an ST</think>answer", False)]
    first = next(i for i, piece in enumerate(pieces) if piece[1])
    assert "".join(piece[0] for piece in pieces[: first + 1]) == "an ST"
    assert not any(piece[0] for piece in [*pieces[first + 1 :], assembler.flush()])
