"""Every command with wrong values for every option, from the parsers: one line, exit code 2, no traceback."""

import argparse
import io
import re
import sys

import pytest

from moejet.cli import main as cli
from moejet.cli import options
from moejet.testing.bad_values import faults_of


class AcceptedError(BaseException):
    """The input was taken: what would have come next is work."""


def _accept(*args, **kwargs):
    raise AcceptedError


PROBLEM = '{"question": "1 + 1?", "answer": "2"}\n'
# What makes the rest of a command line right. {problems}: a file of them.
BASE = {
    "run": ["hello"],
    "chat": [],
    "pull": ["org/name"],
    "eval": ["{problems}"],
    "bench": [],
    "bench ceilings": [],
    "bench moe": [],
    "bench gpu": [],
    "bench compare": ["{lines}", "{lines}"],
    "plan": ["deepseek-v3", "--no-measure"],
    "cache": [],
    "serve": ["--port", "0"],
    "doctor": [],
}
# Commands that other people add, without arguments.
BASE |= {name: [] for name in {**cli.COMMANDS, **cli.SUBCOMMANDS} if name not in BASE}
NEEDS = {"--logprobs": ["--json"], "--resume": ["--out", "{dir}/out.jsonl"]}
NUMBERS = (
    "",
    "x",
    "1.5",
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 40,
    "9" * 5000,
    "0x10",
    "١٢",
)
WORDS = ("", "nonsense", "\ud800", "x" * 20_000)
PATHS = ("", "/no/such/place/file", "/", "x" * 5000, "/dev/null/file", "a\0b")
# Options with free text: nothing can be wrong with it here, or a server has to be asked.
FREE = {
    *("--system", "--stop", "--instruction", "--api-key", "--revision", "--served-model-name"),
    *(
        "--cors-origin",
        "--allowed-host",
        "--include",
        "--quant",
        "--model",
        "--host",
    ),
}


def _values(action):
    """(value, whether it must be refused)."""
    if action.choices is not None:
        return [(value, True) for value in WORDS]
    if action.type is int:
        return [(v, not re.fullmatch(r"-?\d+", v)) for v in NUMBERS]
    if action.type is float:
        return [(v, v in ("", "x", "nan", "0x10")) for v in NUMBERS]
    if action.type in (options.count, options.positive, options.seconds):
        return [(v, v in ("", "x", "nan", "-1", "inf", "0x10")) for v in NUMBERS]
    if action.type in (
        options.input_file,
        options.output_file,
        options.lines_file,
        options.directory,
    ):
        return [(v, action.type is not options.directory or v[:1] in ("", "x")) for v in PATHS]
    if action.type is not None:  # lists, numbers or auto, gigabytes
        return [(v, True) for v in ("", "x", "nan", "-1", ",", "1,x", "x,1", "9" * 5000)]
    return [] if _name(action) in FREE else [(value, True) for value in WORDS]


def _name(action):
    return max(action.option_strings or [str(action.metavar or action.dest)], key=len)


def _cases():
    for command in {**cli.COMMANDS, **cli.SUBCOMMANDS}:
        parser = cli.build_parser(command)
        for action in parser._actions:
            name = _name(action)
            if isinstance(action, argparse._HelpAction) or not action.option_strings:
                continue
            if action.nargs == 0:
                yield command, action, [f"{name}=5"], "5", True
            else:
                yield command, action, [name], None, True
                for value, must_fail in _values(action):
                    yield command, action, [f"{name}={value}"], value, must_fail
            if len(name) > 5:
                yield command, action, [name[:-2] + name[-1]], name[:-2] + name[-1], True
        yield command, None, ["--no-such-option-at-all"], "--no-such-option-at-all", True


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """Runs a command line up to where work would begin: (exit code or None for accepted, stdout, stderr)."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(PROBLEM)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"bench": "moe"}\n')
    places = {"problems": problems, "dir": tmp_path, "lines": lines}
    monkeypatch.setenv("MOEJET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("moejet.llm.load_engine", _accept)
    monkeypatch.setattr("moejet.llm.build_engine", _accept)
    monkeypatch.setattr("moejet.cli.serve._listening_socket", _accept)
    monkeypatch.setattr("moejet.cli.bench_ceilings.describe_environment", _accept)
    monkeypatch.setattr("moejet.cli.bench_moe.describe_environment", _accept)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("moejet.cli.bench_gpu._limit_memory", _accept)
    monkeypatch.setattr("moejet.cli.bench_gpu.describe_environment", _accept)
    monkeypatch.setattr("moejet.cli.doctor.execute", _accept)
    monkeypatch.setattr("moejet.cli.bench_compare.read_results", _accept)
    monkeypatch.setattr("moejet.cli.pull.pull", _accept)
    monkeypatch.setattr("moejet.cli.pull.local_snapshot", _accept)

    def run(*words, stdin=""):
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(stdin))
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            argv = [word.format(**places) if word.startswith("{") else word for word in words]
            try:
                code = cli.main(argv)
            except AcceptedError:
                code = None
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.mark.parametrize("command", sorted({**cli.COMMANDS, **cli.SUBCOMMANDS}))
def test_wrong_options_are_refused_in_one_line(drive, command):
    problems, driven = [], 0
    for name, action, words, value, must_fail in _cases():
        if name != command:
            continue
        driven += 1
        needed = NEEDS.get(_name(action), []) if action is not None else []
        code, _, err = drive(*command.split(), *BASE[command], *needed, *words)
        problems += _problems(code, err, words, value, action, must_fail)
    assert not problems, f"{len(problems)} of {driven}:\n" + "\n".join(problems)


def _problems(code, err, words, value, action, must_fail):
    shown = str(words)[:60]
    if code is None or code == 0 or (code == 1 and not err):
        return [f"{shown}: accepted"] if must_fail else []
    found = []
    if "Traceback" in err or "unexpected" in err:
        found.append(f"{shown}: {err[-300:]}")
    if not err.startswith("moejet: error: ") or err.count("\n") != 1:
        found.append(f"{shown}: not one line: {err[:300]!r}")
    if must_fail and code != 2:
        found.append(f"{shown}: exit code {code}: {err[:300]!r}")
    names = (words[0].partition("=")[0], *([_name(action)] if action is not None else []))
    text = err.removeprefix("moejet: error: ").partition(" (try 'moejet")[0]
    faults = faults_of(err, names, value) if value is not None else []
    if faults:
        found.append(f"{shown}: lacks {', '.join(faults)}: {text[:300]!r}")
    return found


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
