"""The README is true: its Python runs as written, its commands parse, its links lead somewhere."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from moejet.cli.main import COMMANDS, SUBCOMMANDS, build_parser, split_command

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    words = [shlex.split(line.rpartition("|")[2], comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "moejet"]


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_examples_run(index):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(blocks("python")[index], f"README.md, example {index}", "exec"), {})
    assert out.getvalue().strip()


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command):
    name, arguments = split_command(command)
    build_parser(name).parse(arguments)


def test_every_command_and_every_variable_is_described():
    source = (ROOT / "engine/moejet/config.py").read_text(encoding="utf-8")
    for variable in set(re.findall(r"\bMOEJET_[A-Z_]+\b", source)):
        assert variable in TEXT
    for command in [*COMMANDS, *SUBCOMMANDS]:
        assert re.search(rf"^\| `{command}\b", TEXT, re.MULTILINE)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = TEXT + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_to_files():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / target).exists(), target
