"""Damaged text files of a model, of problems and of results: one line that names the file, exit code 2."""

import json
import shutil
from pathlib import Path

import pytest

from moejet.resolve import resolve_model
from moejet.testing.bad_values import sampled

DAMAGE = {
    "empty": lambda whole: b"",
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "twice": lambda whole: whole + whole,
    "a list": lambda whole: b"[]",
    "a string": lambda whole: b'"x"',
    "null": lambda whole: b"null",
    "a number": lambda whole: b"1e999",
    "no UTF-8": lambda whole: b"\xff\xfe" + whole,
    "nested": lambda whole: b"[" * 100_000,
    "zeros": lambda whole: bytes(len(whole)),
}
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model, its weights by a link."""
    source = resolve_model("tiny-reasoner")
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (tmp_path / file.name).symlink_to(file)
        elif file.is_file():
            shutil.copy(file, tmp_path / file.name)
    return tmp_path


def refused(moejet, name: str, *arguments: object) -> str:
    """What the command says of the file."""
    done = moejet(*map(str, arguments))
    assert done.code == 2, done.err
    assert name in done.err, done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert "unexpected" not in done.err
    return done.err


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", MODEL_FILES)
def test_files_of_a_model(moejet, model, name, damage):
    file = model / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    refused(moejet, name, "run", model, "hello")


def _wrong_fields():
    """Each field of config.json with values of types that it never has."""
    config = json.loads(
        (resolve_model("tiny-reasoner") / "config.json").read_text(encoding="utf-8")
    )
    numbers = [key for key, value in config.items() if type(value) in (int, float)]
    return [(key, value) for key in numbers for value in ("x", [], {}, True, -1, 10**30)]


@pytest.mark.parametrize(("key", "value"), sampled(_wrong_fields(), 24))
def test_fields_of_a_configuration(moejet, model, key, value):
    """Refused, or of no consequence for a model that does not use the field: never a bug's message."""
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, key: value}), encoding="utf-8")
    done = moejet("run", str(model), "hello", "--max-tokens", "1")
    assert done.code in (0, 2), done.err
    if done.code == 2:
        assert key in done.err, done.err
        assert len(done.err.splitlines()) == 1, done.err
        assert "unexpected" not in done.err


@pytest.mark.parametrize("damage", ["empty", "a list", "no UTF-8", "nested", "zeros", "a number"])
def test_files_of_problems_and_of_results(moejet, tmp_path, damage):
    problems, results = tmp_path / "problems.jsonl", tmp_path / "results.jsonl"
    lines = b'{"question": "1 + 1?", "answer": "2"}\n'
    problems.write_bytes(DAMAGE[damage](lines))
    refused(moejet, "problems.jsonl", "eval", problems)
    results.write_bytes(DAMAGE[damage](b'{"bench": "model"}\n'))
    refused(moejet, "results.jsonl", "bench", "compare", results, results)
    problems.write_bytes(lines)
    if damage != "empty":  # where nothing is, nothing is gone on with
        refused(moejet, "results.jsonl", "eval", problems, "--out", results, "--resume")
