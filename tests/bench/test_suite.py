"""bench/suite.py and bench/figures.py: that they run, end in time, and that the README shows the committed lines."""

import argparse
import ast
import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from moejet.cli.environment import PROVENANCE
from moejet.cli.main import build_parser, split_command
from moejet.cli.results import read_results

ROOT = Path(__file__).resolve().parents[2]
MAX_FIGURE_BYTES = 60_000


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"bench/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def suite():
    return load("suite")


@pytest.fixture(scope="module")
def figures(suite):
    return load("figures")


@pytest.mark.parametrize(("quick", "large"), [(True, True), (False, True), (False, False)])
def test_the_commands_are_commands(suite, quick, large):
    chosen = suite.cases(quick, large)
    for case in chosen:
        name, arguments = split_command(["bench", *case.arguments])
        assert isinstance(build_parser(name).parse(arguments), argparse.Namespace)
    assert sum(case.expected_s for case in chosen) <= (60 if quick else 420)


CEILINGS = ("ceilings", "--seconds", "0.01", "--megabytes", "8", "-t", "1", "--json", "-")


def test_a_run_writes_lines_and_a_table(suite, tmp_path, monkeypatch, capsys):
    cases = [suite.Case("good", CEILINGS, 1), suite.Case("broken", ("moe", "--tokens", "0"), 1)]
    monkeypatch.setattr(suite, "cases", lambda quick, large: cases)
    results = tmp_path / "new/lines.jsonl"
    assert suite.main(["--results", str(results), "--minutes", "2"]) == 1
    [row] = read_results(results)
    assert set(PROVENANCE) <= set(row)
    shown = capsys.readouterr()
    assert "missing: broken: exit code 2" in shown.err
    text = results.with_suffix(".md").read_text()
    assert "memory reads, GB/s" in text
    assert text in shown.out
    assert suite.main(["--table", str(results)]) == 0
    assert capsys.readouterr().out == text


def test_a_run_ends_in_time(suite, tmp_path):
    slow = suite.Case("slow", ("ceilings", "--seconds", "60", "--json", "-"), 1)
    rows, missing = suite.measure([slow, slow], 1.5 / 60, tmp_path / "lines")
    assert rows == []
    assert missing == ["slow: stopped after 1 s", "slow: no time left"]


def test_every_line_says_where_it_was_measured():
    """Where a literal names its benchmark, the facts of `describe_environment` are unpacked beside it."""
    found = []
    for path in [*ROOT.glob("bench/**/*.py"), *ROOT.glob("engine/moejet/cli/bench*.py")]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else []
            literals = [(k.value, v) for k, v in pairs if isinstance(k, ast.Constant)]
            if any(k == "bench" and isinstance(v, ast.Constant) for k, v in literals):
                found.append(path.name)
                assert None in node.keys, f"{path}, line {node.lineno}"
                assert text.count("describe_environment") > 1, path  # imported and used
        assert 'open("a' not in text, f"{path}: lines are written by moejet.cli.results"
    assert len(set(found)) > 15


def test_of_several_lines_of_a_case_the_last_counts(suite):
    line = {"bench": "model", "model": "m", "test": "tg8", "threads": 2}
    assert suite.latest([{**line, "value": 1}, {**line, "value": 2}]) == [{**line, "value": 2}]


def test_the_readme_shows_the_committed_lines(figures, capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().err
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for figure in figures.figures():
        assert f"]({figure.path.relative_to(ROOT)})" in text
        assert figure.path.stat().st_size < MAX_FIGURE_BYTES
    assert {f.path for f in figures.figures()} == set(figures.FIGURES.iterdir())


def test_other_lines_are_noticed(figures, monkeypatch, tmp_path, capsys):
    lines = read_results(figures.REASONING)
    lines[0]["rows"][0]["tokens"] += 1
    changed = tmp_path / "lines.jsonl"
    changed.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(figures, "REASONING", changed)
    assert figures.main(["--check"]) == 1
    assert "accuracy.svg is not of these results: run" in capsys.readouterr().err


def test_the_figures_are_drawn(figures, tmp_path):
    pytest.importorskip("matplotlib")
    for figure in figures.figures():
        path = figure.save(tmp_path)
        assert figure.description in path.read_text(encoding="utf-8")
        root = ElementTree.parse(path).getroot()
        shown = " ".join(text.strip() for text in root.itertext())
        names = {p["series"] if isinstance(p, dict) else p.name for p in figure.points}
        for text in (figure.title, *names):
            assert text in shown
