"""`moejet bench`: plan, arithmetic of the rows, output forms."""

import csv
import io
import json
import subprocess
from types import SimpleNamespace

import pytest

from moejet import ceilings
from moejet.cli import bench, environment, options


class FakeLLM:
    """Reads prompts at 1000 tokens/s and generates 100, 50, 100, ... tokens/s."""

    def __init__(self, model, engine_options):
        self.model, self.options = model, engine_options
        self.config = SimpleNamespace(
            model=model,
            expert_format=engine_options.get("expert_format", "int4_g32"),
            dense_format="bf16",
        )
        self.model_config = SimpleNamespace(model_type="deepseek_v3")
        pool = SimpleNamespace(num_threads=engine_options.get("num_threads", 2))
        layer = SimpleNamespace(experts=SimpleNamespace(isa="avx2", pool=pool))
        model = SimpleNamespace(moe_layers=[layer])
        self.engine = SimpleNamespace(runner=SimpleNamespace(model=model))
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def weight_bytes(self):
        return {"total": 3 << 30, "active_per_token": 1_000_000, "latent_per_token": 1_000}

    def bench_prefill(self, num_tokens, depth=0):
        self.calls.append(("pp", num_tokens, depth))
        return num_tokens / 1000

    def bench_decode(self, num_tokens, depth=0):
        self.calls.append(("tg", num_tokens, depth))
        return num_tokens / (100 if len(self.calls) % 2 else 50)


def ceiling(name, value):
    return ceilings.Ceiling(name, "GB/s", 2, value)


@pytest.fixture
def loaded(monkeypatch):
    """The stand-ins that a command loaded, in order."""
    models = []

    def open_fake(model, engine_options):
        models.append(FakeLLM(model, engine_options))
        return models[-1]

    monkeypatch.setattr(options, "open_llm", open_fake)
    monkeypatch.setattr(ceilings.Meter, "read", lambda self, seconds=0: ceiling("dram_read", 20.0))
    return models


def test_plan():
    cases = bench.plan_tests([512], [128, 8], [0, 1024])
    assert [case.name for case in cases] == [
        "pp512",
        "tg128",
        "tg8",
        "pp512@d1024",
        "tg128@d1024",
        "tg8@d1024",
    ]
    assert [case.name for case in bench.plan_tests([0], [4], [0])] == ["tg4"]
    with pytest.raises(ValueError, match="nothing to measure"):
        bench.plan_tests([0], [0], [0])


def test_rows():
    llm = FakeLLM("m", {})
    cases = bench.plan_tests([10], [20], [100])
    prompt, answer = bench.measure(llm, cases, 2, {"read_gbps": 0.2})
    # One warm-up and two repetitions each.
    assert llm.calls == [("pp", 10, 100)] * 3 + [("tg", 20, 100)] * 3
    assert prompt["tokens_per_s"] == pytest.approx(1000)
    assert prompt["gbps"] is None
    assert sorted(answer["samples_s"]) == pytest.approx([0.2, 0.4])
    assert answer["tokens_per_s"] == pytest.approx(75)
    assert answer["tokens_per_s_sd"] == pytest.approx(35.355, rel=1e-4)
    # Weights once per token, and the latent cache of 110 tokens on average.
    assert answer["bytes_per_token"] == 1_000_000 + 110 * 1_000
    assert answer["gbps"] == pytest.approx(1.11e6 * 75 / 1e9)
    assert answer["fraction_of_read_rate"] == pytest.approx(answer["gbps"] / 0.2)


def test_table(moejet, loaded):
    result = moejet("bench", "-m", "org/model", "-p", "16", "-n", "4", "-d", "0,32", "-r", "2")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split("|")[1].strip() == "model"
    assert set(lines[1]) <= set("| -")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[6] for row in cells] == ["pp16", "tg4", "pp16@d32", "tg4@d32"]
    assert cells[0][:6] == ["org/model", "3.000", "int4_g32", "bf16", "2", "avx2"]
    assert cells[0][7] == "1000 ± 0"
    assert cells[1][9].endswith("%")
    assert len({len(line) for line in lines}) == 1
    assert "memory reads 20.0 GB/s" in result.err
    # Room for the deepest test, and no more: the cache of a long context costs memory.
    assert loaded[0].options == {"max_context": 49}


def test_formats_and_threads_are_compared(moejet, loaded):
    result = moejet(
        "bench", "-p", "8", "-n", "0", "-t", "1,2", "--format", "int4_g32,bf16", "-o", "jsonl"
    )
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [(row["format"], row["threads"]) for row in rows] == [
        ("int4_g32", 1),
        ("int4_g32", 2),
        ("bf16", 1),
        ("bf16", 2),
    ]
    for key in ("commit", "dirty", "cpu", "versions", "isa", "time", "read_gbps", "samples_s"):
        assert key in rows[0]


def test_json_and_csv_hold_the_same_rows(moejet, loaded):
    arguments = ("bench", "-p", "8", "-n", "4", "-r", "1")
    rows = json.loads(moejet(*arguments, "-o", "json").out)
    table = list(csv.DictReader(io.StringIO(moejet(*arguments, "-o", "csv").out)))
    assert [row["test"] for row in rows] == [row["test"] for row in table] == ["pp8", "tg4"]
    assert rows[0]["tokens_per_s_sd"] is None
    assert json.loads(table[0]["samples_s"]) == rows[0]["samples_s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "a"], "'a' is not a list of numbers such as 128,512"),
        (["-n", "-4"], "argument -n"),
        (["-r", "0"], "-r 0 must be at least 1"),
        (["-t", "0"], "-t 0 must be a positive number"),
        (["--format", "int4"], "'int4' is not one of int4_g32, int8, bf16"),
        (["-m", "x", "--synthetic", "deepseek-v3"], "not allowed with argument"),
        (["-o", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_bad_options(moejet, loaded, arguments, message):
    result = moejet("bench", *arguments)
    assert result.code == 2
    assert message in result.err
    assert loaded == []


def test_git_state_of_a_checkout_and_of_a_stranger(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    package = tmp_path / "moejet"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert environment.git_state(package) == (None, None)
    git("init", "--quiet")
    # A package that lies inside somebody's repository without being tracked in it.
    assert environment.git_state(package) == (None, None)
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit, is_dirty = environment.git_state(package)
    assert len(commit) == 40
    assert is_dirty is False
    results = tmp_path / "bench/results/new.jsonl"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    assert environment.git_state(package) == (commit, False)
    (package / "__init__.py").write_text("x = 1")
    assert environment.git_state(package) == (commit, True)
