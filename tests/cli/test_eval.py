"""`moejet eval`: results that survive, reports that add up, errors that name what is wrong."""

import json
import math
from pathlib import Path

import pytest

from moejet.cli.eval import specs_of
from moejet.reasoning.answers import AnswerKey, LastNumber, NumericEqual
from moejet.reasoning.datasets import Problem
from moejet.reasoning.eval_plot import Point, points_of, text_plot
from moejet.reasoning.eval_report import markdown, outcomes_of, report
from moejet.reasoning.eval_runs import ResultsFile, Row, attempts, jobs_of
from moejet.reasoning.metrics import Solution
from moejet.reasoning.result import Candidate, Usage
from moejet.testing.arithmetic import held_out_problems

KEY = AnswerKey(LastNumber(), NumericEqual())


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    posed = held_out_problems(4, min_steps=2, max_steps=3)
    lines = [{"question": text, "answer": str(problem.answer)} for problem, text in posed]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_usage(rows: list[dict]) -> list[str]:
    """Rows in an order of their own, without what a clock and others in the same step decide."""
    return sorted(json.dumps({k: v for k, v in row.items() if k != "usage"}) for row in rows)


def test_reports_every_strategy_and_compares_it_with_the_first(moejet, tiny, problems, tmp_path):
    out, found, page = (tmp_path / name for name in ("r.jsonl", "o.json", "o.md"))
    files = ["--out", str(out), "--json", str(found), "--report", str(page)]
    result = moejet("eval", str(problems), "--strategy", "single", "--strategy", "vote:3", "-k", "2",
                    "--max-tokens", "200", *files)  # fmt: skip
    assert result.code == 0
    head, *rows = lines_of(out)
    assert head["kind"] == "moejet-eval"
    assert head["settings"]["max_tokens"] == 200
    assert len(rows) == 2 * 4 * 2
    told = json.loads(found.read_text())
    single, vote = told["strategies"]
    for figures in (single, vote):
        mine = [row for row in rows if row["strategy"] == figures["strategy"]]
        assert figures["pass@1"]["value"] == sum(row["correct"] for row in mine) / 8
        by_problem = {row["problem"]: False for row in mine}
        for row in mine:
            by_problem[row["problem"]] |= row["correct"]
        assert figures["pass@2"]["value"] == sum(by_problem.values()) / 4
        cost = figures["cost"]
        tokens = sum(row["usage"]["generated_tokens"] for row in mine) / 8
        assert cost["generated_tokens"] == tokens
        assert cost["thinking_tokens"] + cost["answer_tokens"] == pytest.approx(tokens)
        assert 4 <= cost["distinct_experts"] <= 16
        assert 4 <= cost["distinct_experts_expected"] <= 16
    assert vote["cost"]["branches"] == 3
    assert vote["risk_coverage"]["by"] == "confidence"
    assert single["risk_coverage"]["by"] == "token probability"
    versus = vote["versus"]
    difference = vote["pass@1"]["value"] - single["pass@1"]["value"]
    assert versus["difference"] == pytest.approx(difference)
    assert versus["low"] <= versus["difference"] <= versus["high"]
    assert "versus" not in single
    text = page.read_text()
    assert "| `vote:3`" in text
    assert "cons@2" in text
    assert result.out.startswith("| strategy")
    assert "A single: " in result.out
    assert "wrote " in result.err


def test_a_torn_file_is_gone_on_with(moejet, tiny, problems, tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    command = ["eval", str(problems), "--strategy", "vote:2", "--seed", "5", "--max-tokens", "150"]
    assert moejet(*command, "--out", str(whole)).code == 0
    # Two results and a half.
    text = whole.read_bytes()
    ends = [i for i, byte in enumerate(text) if byte == ord("\n")]
    torn.write_bytes(text[: ends[2] + 40])
    before = tiny.counters()["steps"]
    assert moejet(*command, "--out", str(torn), "--resume").code == 0
    assert tiny.counters()["steps"] > before
    assert without_usage(lines_of(torn)[1:]) == without_usage(lines_of(whole)[1:])
    assert torn.read_bytes().startswith(text[: ends[2] + 1])
    # Nothing is left to do; and then there is more, because there are more samples.
    before = tiny.counters()["steps"]
    assert moejet(*command, "--out", str(torn), "--resume").code == 0
    assert tiny.counters()["steps"] == before
    assert moejet(*command, "--out", str(torn), "--resume", "-k", "2").code == 0
    assert len(lines_of(torn)) == 1 + 8


def test_other_settings_are_refused_by_name(moejet, tiny, problems, tmp_path):
    out = tmp_path / "r.jsonl"
    command = ["eval", str(problems), "--max-tokens", "40", "--limit", "1", "--out", str(out)]
    assert moejet(*command).code == 0
    kept = out.read_bytes()
    result = moejet(*command)
    assert result.code == 2
    assert "exists: go on with it (--resume)" in result.err
    for change, name in (
        (["--temperature", "0.25"], "temperature=0.25"),
        (["--seed", "1"], "seed=1"),
        (["--effort", "low"], "effort='low'"),
        (["--budget-tokens", "9"], "budget_tokens=9"),
        (["--instruction", "Hurry."], "instruction='Hurry.'"),
    ):
        result = moejet(*command, "--resume", *change)
        assert result.code == 2, change
        assert name in result.err
    problems.write_text(problems.read_text().replace('"answer": "', '"answer": "1'))
    result = moejet(*command, "--resume")
    assert result.code == 2
    assert "problems=" in result.err
    assert out.read_bytes() == kept


def test_a_file_of_something_else_stays_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("my notes", '{"kind": "other"}\n{"a": 1}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no results"):
            ResultsFile.open(path, {"seed": 0}, resume=True)
        assert path.read_text() == text


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "r.jsonl"
    first = ResultsFile.open(path, {"seed": 0})
    with pytest.raises(ValueError, match="another process"):
        ResultsFile.open(path, {"seed": 0}, resume=True)
    first.close()
    ResultsFile.open(path, {"seed": 0}, resume=True).close()


def test_interruption_keeps_what_is_done(moejet, tiny, problems, tmp_path, monkeypatch):
    out = tmp_path / "r.jsonl"
    add = ResultsFile.add

    def stop_after_two(results: ResultsFile, row: Row) -> None:
        add(results, row)
        if len(results.rows) == 2:
            raise KeyboardInterrupt

    command = ["eval", str(problems), "--max-tokens", "150", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(ResultsFile, "add", stop_after_two)
        result = moejet(*command)
    assert result.code == 130
    assert "stopped with 2 of 4 runs to do" in result.err
    assert "--resume" in result.err
    assert not tiny.engine.has_work
    assert len(lines_of(out)) == 1 + 2
    assert moejet(*command, "--resume").code == 0
    assert len(lines_of(out)) == 1 + 4


def test_effort_and_budget_limit_the_thinking(moejet, tiny, problems, tmp_path):
    found = tmp_path / "o.json"
    command = ["eval", str(problems), "--limit", "2", "--json", str(found)]
    assert moejet(*command, "--effort", "minimal").code == 0
    [figures] = json.loads(found.read_text())["strategies"]
    assert figures["cost"]["thinking_tokens"] <= 17
    assert moejet(*command, "--strategy", "vote:4", "--budget-tokens", "60").code == 0
    [figures] = json.loads(found.read_text())["strategies"]
    assert figures["cost"]["generated_tokens"] <= 60
    assert figures["exhausted_rate"] == 1


def test_wrong_words_are_refused(moejet, tiny, problems, tmp_path):
    for words, message in (
        (["--resume"], "--resume needs --out"),
        (["--texts"], "--texts needs --out"),
        (["--json", str(tmp_path / "no" / "o.json")], "needs the directory"),
        (["--plot", "x.doc"], "must end with one of .png"),
        (["--strategy", "vte:3"], "did you mean 'vote'?"),
        (["--strategy", "auto"], "--strategy auto needs --effort"),
        (["--strategy", "vote:2", "--strategy", "vote:2"], "given twice"),
        (["-k", "0"], "must be a whole number of at least 1"),
        (["--format", "gpqa"], "correct answer"),
        (["--system", "x " * 3000], "problem '1' has"),
    ):
        result = moejet("eval", str(problems), *words)
        assert result.code == 2, words
        assert message in result.err, result.err
    assert moejet("eval", str(tmp_path / "none.jsonl")).code == 2


def test_specifications():
    assert specs_of(None, None) == ["single"]
    assert specs_of(["auto", " vote:3 "], "low") == ["single", "vote:3"]
    assert specs_of(["auto"], "high") == ["adaptive:4"]


def test_a_plot_without_matplotlib_says_what_to_install(moejet, tiny, problems, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = moejet("eval", str(problems), "--plot", "x.png")
    assert result.code == 1
    assert "pip install 'moejet[plot]'" in result.err


def test_seeds_differ_and_do_not_depend_on_the_number_of_samples():
    problems = [Problem(str(i), f"question {i}", "1") for i in range(50)]
    jobs = jobs_of(problems, 20, 0)
    assert len({job.seed for job in jobs}) == 1000
    fewer = jobs_of(problems, 3, 0, limit=7)
    assert len(fewer) == 21
    known = {(job.problem.id, job.sample): job.seed for job in jobs}
    assert all(known[job.problem.id, job.sample] == job.seed for job in fewer)
    assert {job.seed for job in jobs_of(problems, 20, 1)}.isdisjoint(known.values())


def candidate(reasoning: str, content: str) -> Candidate:
    return Candidate(f"{reasoning}</think>{content}", reasoning, content, "42", 10)


def test_attempts_end_where_the_thinking_looks_back(shared):
    thought = "A: 40 + 1 = 41\nWait, let me check.\nA: 40 + 2 = 42\nHmm, no idea\n"
    found = attempts(candidate(thought, "The answer is 42."), "42", "plain", shared.tokenizer)
    assert [(s.key, s.correct) for s in found] == [("41", False), ("42", True), ("42", True)]
    whole = sum(s.tokens for s in found)
    encoded = shared.tokenizer.encode(thought + "The answer is 42.", add_special_tokens=False)
    assert whole == pytest.approx(len(encoded), abs=3)
    assert attempts(candidate("nothing", "at all"), "42", "plain", shared.tokenizer) == ()


def row(strategy: str, problem: int, sample: int, answer: str | None, **more: object) -> Row:
    given: dict = {
        "confidence": None,
        "logprob": -1.0,
        "mean_logprob": -0.1,
        "finish_reason": "stop",
        "is_exhausted": False,
        "num_candidates": 1,
        "usage": Usage(generated_tokens=10, thinking_tokens=6),
    }
    return Row(strategy, str(problem), sample, 0, answer == "1", answer, **(given | more))


def test_figures_by_hand(shared):
    answers = {
        "a": [["1", "1", "2"], ["2", "2", "1"], ["3", None, None]],
        "b": [["1", "1", "1"], ["1", "1.0", "2"], [None, None, None]],
    }
    rows = [
        row(name, p, s, answer)
        for name, table in answers.items()
        for p, samples in enumerate(table)
        for s, answer in enumerate(samples)
    ]
    solutions = (Solution(4, "2", False), Solution(12, "1", True))
    rows[0] = row("a", 0, 0, "1", finish_reason="length", solutions=solutions)
    table = {r.key: r for r in rows}
    outcomes = [outcomes_of(name, table, ["0", "1", "2"], 3, KEY) for name in "ab"]
    found = report(outcomes, {"model": "m", "file": "f"}, shared.model_config)
    a, b = found["strategies"]
    assert a["pass@1"]["value"] == pytest.approx(3 / 9)
    assert a["pass@3"]["value"] == pytest.approx(2 / 3)
    assert a["cons@3"]["value"] == pytest.approx(1 / 3)
    # "1.0" is the same answer as "1", but only the latter was graded right here.
    assert b["cons@3"]["value"] == pytest.approx(2 / 3)
    assert a["truncation_rate"] == pytest.approx(1 / 9)
    assert b["no_answer_rate"] == pytest.approx(3 / 9)
    assert a["outcome_efficiency"] == pytest.approx(1 / 9)
    assert a["process_efficiency"] == 1.0
    assert b["process_efficiency"] is None
    assert a["cost"]["answer_tokens"] == 4
    assert a["cost"]["distinct_experts"] is None
    versus = b["versus"]
    assert (versus["gained"], versus["lost"], versus["mcnemar_p"]) == (1, 0, 1.0)
    assert versus["token_ratio"] == 1
    assert "| `b`" in markdown(found)
    assert json.loads(json.dumps(found, allow_nan=False))["problems"] == 3
    assert [p.name for p in points_of(found)] == ["a", "b"]


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "r.jsonl"
    written = row("a", 0, 0, "1", logprob=-math.inf, solutions=(Solution(3, "1", True),), text="é")
    results = ResultsFile.open(path, {"seed": 0, "stop": ("a",)})
    results.add(written)
    results.close()
    again = ResultsFile.open(path, {"seed": 0, "stop": ("a",)}, resume=True)
    again.close()
    [read] = again.rows.values()
    assert read.logprob is None
    assert (read.solutions, read.text, read.usage) == (written.solutions, "é", written.usage)


def test_the_text_plot_puts_points_where_they_belong():
    drawn = text_plot(
        [Point("one", 100, 0.5, 0.4, 0.6), Point("many", 1600, 0.9, 0.8, 1.0)], width=40, height=13
    ).splitlines()
    [first] = [i for i, line in enumerate(drawn) if "A" in line and "one" not in line]
    [second] = [i for i, line in enumerate(drawn) if "B" in line and "many" not in line]
    assert second < first
    assert drawn[second].index("B") - drawn[first].index("A") == 39
    assert drawn[0].startswith(" 1.000")
    assert "100" in drawn[14]
    assert "1600 tokens" in drawn[14]
    # One point alone, and two at the same place.
    assert "A" in text_plot([Point("x", 5, 1.0, 1.0, 1.0)])
    assert "*" in text_plot([Point("x", 5, 0.5, 0.5, 0.5)] * 2)
