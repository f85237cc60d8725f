"""The command line's frame: help, errors, exit codes, start-up."""

import subprocess
import sys
from pathlib import Path

import pytest

import moejet as package
from moejet.cli import main as cli_main


def test_version_and_help_name_every_command(moejet):
    assert moejet("--version").out == f"moejet {package.__version__}\n"
    shown = moejet("--help")
    assert shown.code == 0
    for command in cli_main.COMMANDS:
        assert f"  {command} " in shown.out
    assert moejet().out == shown.out


@pytest.mark.parametrize("command", cli_main.COMMANDS)
def test_each_command_has_help(moejet, command):
    shown = moejet(command, "--help")
    assert shown.code == 0
    assert shown.out.startswith(f"usage: moejet {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "unknown command 'rum'; did you mean 'run'?"),
        (["zzz"], "unknown command 'zzz'; commands: run, chat, pull, eval, bench, "),
        (["--verison"], "unknown option --verison; did you mean '--version'?"),
        (["run", "hi", "--temprature", "0"], "--temprature; did you mean '--temperature'?"),
        (["run", "hi", "--temprature=0"], "--temprature; did you mean '--temperature'?"),
        # An abbreviation that works today breaks when an option is added: refuse it.
        (["run", "hi", "--temp", "0"], "unknown option --temp"),
        (["run", "hi", "--temperature", "hot"], "--temperature='hot' must be a number"),
        (["run", "hi", "--expert-format", "int5"], "--expert-format='int5' must be one of auto"),
        (["chat", "model", "extra"], "unexpected argument 'extra'"),
        (["doctor", "extra"], "unexpected argument 'extra'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(moejet, llm, arguments, message):
    result = moejet(*arguments)
    assert result.code == 2
    assert result.err.startswith("moejet: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err
    assert result.out == ""
    assert llm.opened == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("field=3 must be 4"), 2, "field=3 must be 4"),
        (ImportError("no moejet._C"), 1, "no moejet._C; 'moejet doctor'"),
        (MemoryError(), 1, "out of memory: free some memory"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_exceptions_become_exit_codes(moejet, llm, error, code, message, monkeypatch, tmp_path):
    def fail(index):
        raise error

    llm.on_piece = fail
    monkeypatch.setattr(cli_main, "_silence_stdout", lambda: None)
    result = moejet("run", "hello")
    assert result.code == code
    assert "Traceback" not in result.err
    if message:
        assert f"moejet: error: {message}" in result.err
    else:
        assert result.err.splitlines() == [llm.describe()]
    assert llm.num_aborts == 1
    assert llm.is_closed


def test_a_bug_is_one_line_without_debug(moejet, llm, monkeypatch):
    def fail(index):
        raise RuntimeError("a bug")

    llm.on_piece = fail
    monkeypatch.delenv("MOEJET_LOG", raising=False)
    shown = moejet("run", "hello")
    assert shown.code == 1
    assert "Traceback" not in shown.err
    line = shown.err.splitlines()[-1]
    assert line.startswith("moejet: error: RuntimeError: a bug (unexpected: ")
    assert "--debug" in line
    monkeypatch.setenv(
        "MOEJET_LOG", "warning"
    )  # which --debug replaces, and the test's end puts back
    shown = moejet("run", "hello", "--debug")
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert shown.err.splitlines()[-1].startswith("moejet: error: RuntimeError: a bug")


def test_exit_codes_are_in_the_help_and_in_the_readme(moejet):
    shown = moejet("--help").out
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for code, text in cli_main.EXIT_CODES.items():
        assert f"  {code:<9}{text}\n" in shown
        assert f"| {code} | {text} |" in readme


def test_a_bad_environment_variable_is_named(moejet, monkeypatch):
    monkeypatch.setenv("MOEJET_LOG", "loud")
    result = moejet("doctor")
    assert result.code == 2
    assert "MOEJET_LOG='loud'" in result.err


# They take from tenths of a second to seconds.
SLOW_TO_IMPORT = (
    *("torch", "transformers", "triton", "safetensors", "huggingface_hub", "moejet._C"),
    *("fastapi", "uvicorn", "pydantic", "msgspec", "matplotlib", "sympy"),
)


def test_help_imports_nothing_slow():
    program = f"""
import contextlib, io, sys
from moejet.cli.main import COMMANDS, SUBCOMMANDS, main
for command in ("--version", "--help", *COMMANDS, *SUBCOMMANDS):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*command.split(), "--help"]) == 0, command
    print(command, *[name for name in {SLOW_TO_IMPORT} if name in sys.modules])
    if command in ("--help", "run"):
        print(*[name for name in ("numpy", "jinja2", "tokenizers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines == ["--version", "--help", *cli_main.COMMANDS, *cli_main.SUBCOMMANDS]


def test_debug_log_shows_the_traceback():
    program = (
        "import os; os.environ['MOEJET_LOG'] = 'debug';"
        "from moejet.cli.main import main; main(['bench', '-p', '0', '-n', '0'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("moejet: error: -p 0 with -n 0")


def test_reader_that_goes_away_is_no_error():
    program = "from moejet.cli.main import main; import sys; sys.exit(main(['bench', '--help']))"
    reader = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()
    assert b"Traceback" not in reader.stderr.read()
    reader.stderr.close()
    assert reader.wait() in (0, 141)
