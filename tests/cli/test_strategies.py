"""`moejet run --strategy`, `--effort` of run and chat, and trees of searches."""

import contextlib
import io
import json

import pytest

from moejet.cli import options, tree
from moejet.cli.effort import EFFORTS as OFFERED
from moejet.reasoning import effort
from moejet.reasoning.result import Node, Progress, Result
from moejet.reasoning.sample import Sample
from moejet.reasoning.task import Run, Task

PROMPT = "Take 90, subtract 34, then divide by 7 and add 200."


def test_a_vote_tells_its_progress_and_its_cost(moejet, tiny):
    result = moejet("run", "--strategy", "vote:3", "--temperature", "0", PROMPT)
    assert result.code == 0
    assert result.out.startswith("Plan: 090, A - 034")
    assert result.out.endswith("\n\nThe answer is 208.\n")
    _, *told, vote, figures = result.err.splitlines()
    assert sorted(told) == [f"answer {i} of 3: 208" for i in (1, 2, 3)]
    assert "208: 3" in vote
    for part in ("prompt 27 tokens · ", "3 branches", "expert loads (", "confidence 1.00"):
        assert part in figures
    # Greedy samples are the same, and so are their experts: the formula knows nothing of that.
    assert "distinct experts per layer and step (formula" in figures
    assert moejet("run", "--strategy", "single", "-q", PROMPT).err == ""


def test_names_with_options_and_second_models(moejet, shared, monkeypatch):
    opened: list[str] = []

    def open_llm(model, given):
        opened.append(model)
        return contextlib.nullcontext(shared)

    monkeypatch.setattr(options, "open_llm", open_llm)
    for spec in (
        "best:2,scorer=step_head",
        "debate:2,rounds=1",
        "mutual,inner=(vote:2),second=other",
        "mutual,inner=(vote:2),second=tiny-reasoner",
        "mcts:2x2,parallel=2",
    ):
        result = moejet("run", "--strategy", spec, "--temperature", "0.5", "--seed", "1", PROMPT)
        assert result.code == 0, result.err
        assert result.out.endswith("The answer is 208.\n"), spec
        assert ("├─" in result.err or "└─" in result.err) == spec.startswith("mcts")
    # The model that answers is not loaded a second time.
    assert [name for name in opened if name != "tiny-reasoner"] == ["other"]
    assert len(opened) == 6


def test_json_is_the_whole_result(moejet, tiny):
    result = moejet("run", "--strategy", "vote:2", "--json", "--seed", "3", PROMPT)
    assert result.err == ""
    shown = json.loads(result.out)
    assert shown["strategy"] == "vote:2"
    assert shown["candidate"]["answer"] is not None
    assert len(shown["candidates"]) == 2
    assert shown["nodes"] == []
    assert shown["usage"]["branches"] == 2
    again = moejet("run", "--strategy", "vote:2", "--json", "--seed", "3", PROMPT)
    assert json.loads(again.out)["candidates"] == shown["candidates"]


def test_what_a_policy_puts_in_is_told_apart(moejet, tiny):
    words = ["--strategy", "check:1", "--temperature", "0", PROMPT]
    shown = json.loads(moejet("run", "--json", *words).out)
    assert shown["usage"]["injected_tokens"] == len(tiny.tokenizer.encode("Wait"))
    assert " · 1 injected · " in moejet("run", *words).err
    plain = json.loads(moejet("run", "--json", "--strategy", "single", PROMPT).out)
    assert plain["usage"]["injected_tokens"] == 0


def test_auto_goes_by_the_effort(moejet, tiny):
    shown = json.loads(
        moejet("run", "--strategy", "auto", "--effort", "high", "--json", PROMPT).out
    )
    assert shown["strategy"] == effort.strategy_of("high")
    result = moejet("run", "--strategy", "auto", PROMPT)
    assert result.code == 2
    assert "--strategy auto needs --effort" in result.err


def test_a_raw_prompt_has_no_template(moejet, tiny):
    shown = json.loads(
        moejet("run", "--raw", "--strategy", "single", "--max-tokens", "5", "--json", "Start").out
    )
    assert shown["usage"]["prompt_tokens"] < 5
    result = moejet("run", "--raw", "--strategy", "single", "--max-tokens", "5", "Start")
    assert "cut off: token limit reached" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "2"], "-n=2 does not go with --strategy"),
        (["--logprobs", "1", "--json"], "--logprobs=1 does not go with --strategy"),
    ],
)
def test_options_that_do_not_go_with_a_strategy(moejet, llm, words, message):
    result = moejet("run", "--strategy", "vote:2", *words, "x")
    assert result.code == 2
    assert message in result.err
    assert llm.opened == []


def test_unknown_strategies_are_refused(moejet, tiny):
    result = moejet("run", "--strategy", "vot:2", "x")
    assert result.code == 2
    assert "did you mean 'vote'?" in result.err


def test_effort_limits_the_thinking(moejet, tiny):
    short = json.loads(moejet("run", "--effort", "minimal", "--json", PROMPT).out)
    assert len(tiny.tokenizer.encode(short["reasoning"], add_special_tokens=False)) <= 17
    assert short["content"].startswith("The answer is")
    none = json.loads(
        moejet("run", "--effort", "none", "--strategy", "single", "--json", PROMPT).out
    )
    assert none["usage"]["thinking_tokens"] <= 1
    result = moejet("run", "--effort", "hgih", PROMPT)
    assert result.code == 2
    assert "--effort='hgih' must be one of" in result.err


def test_levels_offered_are_those_that_exist():
    assert OFFERED == effort.EFFORTS


class TemplateThatKnowsEfforts:
    template_variables = frozenset({"messages", "reasoning_effort"})


def test_a_template_that_knows_efforts_is_told(moejet, llm, monkeypatch):
    told: list[dict] = []
    chat = llm.chat
    monkeypatch.setattr(llm, "tokenizer", TemplateThatKnowsEfforts(), raising=False)
    monkeypatch.setattr(llm, "chat", lambda m, p, **more: told.append(more) or chat(m, p))
    assert moejet("run", "--effort", "low", "--json", "x").code == 0
    assert told == [{"reasoning_effort": "low"}]
    assert llm.calls[0][2].max_thinking_tokens is None


class PlainTemplate:
    template_variables = frozenset({"messages"})


def test_chat_changes_its_effort(moejet, llm, monkeypatch):
    monkeypatch.setattr(llm, "tokenizer", PlainTemplate(), raising=False)
    lines = "/effort\none\n/effort low\ntwo\n/effort max\nthree\n/effort hgih\n"
    result = moejet("chat", "--effort", "minimal", stdin=lines)
    assert [call[2].max_thinking_tokens for call in llm.calls] == [16, 48, None]
    assert "effort: minimal; levels: none, minimal" in result.err
    assert "effort: low" in result.err
    assert "unknown effort hgih" in result.err
    # Without a level nothing is limited.
    moejet("chat", stdin="one\n/effort\n")
    assert llm.calls[-1][2] == llm.default_sampling()


NODES = (
    Node(0, -1, "the question", state="kept"),
    Node(1, 0, "add 2\nthen stop", 0.25, 3, "pruned"),
    Node(2, 0, "add 3", 0.5, 5, "chosen"),
    Node(4, 2, "that is 8", 1.0, state="chosen"),
    Node(3, 1, "no", float("nan"), state="open"),
    Node(5, 2, "that is 9", 0.125, state="finished"),
)


def tree_lines(nodes, width=100) -> list[str]:
    out = io.StringIO()
    tree.print_tree(nodes, out, width=width)
    return out.getvalue().splitlines()


def test_a_tree_is_drawn(monkeypatch):
    assert tree_lines(NODES) == [
        "○ the question",
        "├─ ✗ 0.25 3x add 2 then stop",
        "│  └─ · no",
        "└─ ★ 0.50 5x add 3",
        "   ├─ ★ 1.00 that is 8",
        "   └─ ● 0.12 that is 9",
    ]
    assert tree_lines(NODES, width=12)[1] == "├─ ✗ 0.25 3…"
    assert tree_lines([Node(0, -1, "")]) == ["·"]
    assert tree_lines(()) == []
    monkeypatch.setattr(tree, "MAX_LINES", 2)
    assert tree_lines(NODES)[2:] == ["... 4 more"]


def test_trees_without_a_root_and_of_great_depth(monkeypatch):
    # Branches of an opening that is no node itself.
    assert tree_lines([Node(7, 3, "a"), Node(8, 3, "b"), Node(9, 7, "c")]) == [
        "· a",
        "└─ · c",
        "· b",
    ]
    chain = [Node(i, i - 1, str(i)) for i in range(5000)]
    monkeypatch.setattr(tree, "MAX_LINES", 10_000)
    assert len(tree_lines(chain)) == 5000


def test_a_terminal_gets_colours_and_no_control_characters(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    nodes = [Node(0, -1, "a \x1b[2J", state="chosen"), Node(1, 0, "b", state="pruned")]
    screen, file = Screen(), io.StringIO()
    tree.print_tree(nodes, screen)
    assert screen.getvalue() == "\x1b[32m★ a ␛[2J\x1b[0m\n\x1b[2m└─ ✗ b\x1b[0m\n"
    tree.print_tree(nodes, file)
    assert file.getvalue() == "★ a \x1b[2J\n└─ ✗ b\n"


class Searching:
    """A vote that says it has searched."""

    def run(self, task: Task) -> Run[Result]:
        from dataclasses import replace

        for node in NODES[1:3]:
            yield Progress("step", "step 1: 2 of 4 are kept", node=node)
        result = yield from Sample(1).run(task)
        return replace(result, nodes=NODES)


def test_the_tree_comes_before_the_answer(moejet, tiny, monkeypatch):
    monkeypatch.setattr(
        "moejet.reasoning.specs.parse_strategy", lambda spec, llm, load: Searching()
    )
    result = moejet("run", "--strategy", "mcts:4", PROMPT)
    _, *lines = result.err.splitlines()
    assert lines[0] == "step 1: 2 of 4 are kept"
    assert lines.count(lines[0]) == 1
    first = lines.index("○ the question")
    assert lines[first + 5] == "   └─ ● 0.12 that is 9"
    assert len(lines) == first + 7
    shown = json.loads(moejet("run", "--strategy", "mcts:4", "--json", PROMPT).out)
    assert shown["nodes"][4]["score"] is None
    assert [node["number"] for node in shown["nodes"]] == [0, 1, 2, 4, 3, 5]
