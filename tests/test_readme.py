"""The README is true: its Python runs, its commands parse, what it names exists, its links lead somewhere."""

import contextlib
import io
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest

from moejet.cli.main import COMMANDS, SUBCOMMANDS, build_parser, split_command

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "bench/README.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Of shell blocks, and of transcripts: the lines that begin with "$"."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    for block in blocks(""):
        lines += re.findall(r"^\$ (.*)", block.replace("\\\n", " "), re.MULTILINE)
    words = [shlex.split(line.rpartition("|")[2], comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "moejet"]


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## )", TEXT, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_examples_run(index):
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(compile(blocks("python")[index], f"README.md, example {index}", "exec"), names)
    if "app" not in names:
        assert out.getvalue().strip()
        return
    import httpx

    from moejet.server import serve_in_thread

    with serve_in_thread(names["app"]) as url:
        assert httpx.get(f"{url}/llm/v1/models").json()["data"]
        reply = httpx.get(f"{url}/ask", params={"question": "Start with 17, add 25."})
        assert "answer is" in reply.json()


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command):
    name, arguments = split_command(command)
    build_parser(name).parse(arguments)


def test_options_exist():
    """Whatever is written as an option is one, of some command or of a script in bench/."""
    known = {"--dist"}
    for command in [*COMMANDS, *SUBCOMMANDS]:
        known |= set(build_parser(command)._option_string_actions)
    for script in (ROOT / "bench").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    # What others' commands take is theirs.
    text = re.sub(r"`(?:lm_eval|uvicorn|pip) [^`]*`|^(?:pip|\$ curl) .*", "", TEXT, flags=re.M)
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*\b", text)):
        assert option in known, option


def test_every_command_and_every_variable_is_described():
    source = (ROOT / "engine/moejet/config.py").read_text(encoding="utf-8")
    for variable in set(re.findall(r"\bMOEJET_[A-Z_]+\b", source)):
        assert variable in TEXT
    for command in [*COMMANDS, *SUBCOMMANDS]:
        assert re.search(rf"^\| `{command}\b", TEXT, re.MULTILINE)


def test_the_table_of_hardware_is_current():
    written = runpy.run_path(str(ROOT / "tests/hardware_table.py"))["with_table"](TEXT)
    assert written == TEXT, "run `python tests/hardware_table.py`"


def test_the_objects_have_what_the_table_says():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", section("To embed"), re.MULTILINE)
    assert rows
    for name, text in rows:
        holder = pkgutil.resolve_name(name if "." in name else f"moejet:{name}")
        for member in re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", text)):
            module = ROOT / "engine" / name.replace(".", "/") / f"{member}.py"
            assert hasattr(holder, member) or module.exists(), f"{name}.{member}"


def test_every_example_is_described():
    named = set(re.findall(r"^\| \[(\w+\.py)\]\(examples/\1\) \|", TEXT, re.MULTILINE))
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in PAGES)
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_python_files_that_are_named_exist():
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for script in re.findall(r"python ((?:bench|examples|tests)/[\w/]+\.py)", text):
            assert (ROOT / script).exists() or "NAME" in script, script


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    page = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
            assert anchor in anchors, target
