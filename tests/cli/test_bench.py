"""`moejet bench`: plan, arithmetic of the rows, output forms."""

import csv
import io
import json
import subprocess
from types import SimpleNamespace

import pytest

from moejet import ceilings
from moejet.cli import bench, environment, options
from moejet.config import EngineConfig
from moejet.model_cost import ModelCost
from moejet.presets import PRESETS

SHAPE = PRESETS["deepseek-v2-lite"]


class FakeLLM:
    """Reads prompts at 1000 tokens/s and makes 100, 50, 100, ... steps/s."""

    def __init__(self, model, engine_options):
        self.model, self.options = model, engine_options
        self.config = SimpleNamespace(
            model=model,
            expert_format=engine_options.get("expert_format", "int4_g32"),
            dense_format="bf16",
            device="cpu",
            arithmetic=engine_options.get("arithmetic", "bf16"),
            cache_dtype=engine_options.get("cache_dtype", "bf16"),
        )
        self.model_config = SHAPE
        formats = {"expert_format": self.config.expert_format, "dense_format": "bf16"}
        formats["cache_dtype"] = self.config.cache_dtype
        self.cost = ModelCost.of(SHAPE, EngineConfig(model="x", **formats))
        pool = SimpleNamespace(num_threads=engine_options.get("num_threads", 2))
        model = SimpleNamespace(moe_layers=[SimpleNamespace()])
        runner = SimpleNamespace(model=model, isa="avx2", pool=pool)
        self.engine = SimpleNamespace(runner=runner)
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def bench_prefill(self, num_tokens, depth=0):
        self.calls.append(("pp", num_tokens, depth))
        return num_tokens / 1000

    def bench_decode(self, num_tokens, depth=0, batch=1):
        self.calls.append(("tg", num_tokens, depth, batch))
        return num_tokens / (100 if len(self.calls) % 2 else 50)

    def bench_overhead(self, batch=1):
        self.calls.append(("overhead", batch))
        return 0.5e-3


class FakeMeter:
    """Memory at 20 GB/s, then 10, then 20, ...; arithmetic at 0.25."""

    def __init__(self, threads=2):
        self.threads, self.reads = threads, 0

    def read(self, seconds=0.0):
        self.reads += 1
        return ceiling("dram_read", 20.0 if self.reads % 2 else 10.0)

    def arithmetic(self, name, seconds):
        return ceiling(name, 0.25)


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
    monkeypatch.setattr(ceilings, "Meter", lambda pool, isa: FakeMeter(pool.num_threads))
    return models


def test_plan():
    cases = bench.plan_tests([512], [128, 8], [0, 1024], [1])
    assert [case.name for case in cases] == [
        "pp512",
        "tg128",
        "tg8",
        "pp512@d1024",
        "tg128@d1024",
        "tg8@d1024",
    ]
    assert [case.name for case in bench.plan_tests([0], [4], [0], [1])] == ["tg4"]
    cases = bench.plan_tests([64], [4], [0, 512], [1, 16])
    assert [case.name for case in cases] == [
        "pp64",
        "tg4",
        "tg4xb16",
        "pp64@d512",
        "tg4@d512",
        "tg4@d512xb16",
    ]
    with pytest.raises(ValueError, match="nothing to measure"):
        bench.plan_tests([0], [0], [0], [1])


def test_the_cache_holds_every_sequence():
    plan = bench.plan_tests
    assert bench.cache_options(plan([64], [4], [32], [1])) == {"max_context": 97}
    given = bench.cache_options(plan([2048], [4], [500], [1, 16]))
    assert given["max_context"] == 2549
    # 504 tokens of 16 sequences, each in blocks of its own.
    assert given["cache_tokens"] >= 16 * 512
    assert given["max_num_requests"] == 16


def test_rows():
    llm = FakeLLM("m", {})
    cases = bench.plan_tests([10], [20], [100], [1, 4])
    common = {"isa": "avx2", "format": "int4_g32", "arithmetic": "bf16"}
    prompt, answer, batch = bench.measure(llm, cases, 2, common, FakeMeter())
    # One warm-up and two repetitions each; the overhead once per number of sequences.
    assert llm.calls[:3] == [("pp", 10, 100)] * 3
    assert llm.calls[3:7] == [("overhead", 1), *[("tg", 20, 100, 1)] * 3]
    assert llm.calls[7:] == [("overhead", 4), *[("tg", 20, 100, 4)] * 3]
    assert prompt["tokens_per_s"] == pytest.approx(1000)
    assert prompt["gbps"] is None
    assert prompt["overhead_ms"] is None
    operations = llm.cost.prefill_operations(10, 100)
    assert prompt["tflops"] == pytest.approx(operations / 10 * 1000 / 1e12)
    assert prompt["ceiling"] == "avx2_int8"
    assert prompt["fraction_of_peak"] == pytest.approx(prompt["tflops"] / 0.25)
    assert sorted(answer["samples_s"]) == pytest.approx([0.2, 0.4])
    assert answer["tokens_per_s"] == pytest.approx(75)
    assert answer["tokens_per_s_sd"] == pytest.approx(35.355, rel=1e-4)
    assert answer["overhead_ms"] == pytest.approx(0.5)
    # Weights once per token, and the latent cache of 110 tokens on average.
    assert answer["bytes_per_token"] == round(llm.cost.decode_bytes(110))
    assert answer["gbps"] == pytest.approx(answer["bytes_per_token"] * 75 / 1e9)
    # The better of the rates before and after.
    assert answer["read_gbps"] == 20.0
    assert answer["fraction_of_read_rate"] == pytest.approx(answer["gbps"] / 20.0)
    assert batch["batch"] == 4
    assert batch["tokens_per_s"] == pytest.approx(4 * 75)
    assert batch["bytes_per_token"] == round(llm.cost.decode_bytes(110, 4) / 4)


def test_table(moejet, loaded):
    result = moejet("bench", "-m", "org/model", "-p", "16", "-n", "4", "-d", "0,32", "-r", "2")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split("|")[1].strip() == "model"
    assert set(lines[1]) <= set("| -")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[6] for row in cells] == ["pp16", "tg4", "pp16@d32", "tg4@d32"]
    size = f"{loaded[0].cost.weight_bytes / 2**30:.3f}"
    assert cells[0][:6] == ["org/model", size, "int4_g32", "bf16", "2", "avx2"]
    assert cells[0][7] == "1000 ± 0"
    assert [cell.endswith("%") for cell in cells[0][8:]] == [False, False, False, True, False]
    assert [cell.endswith("%") for cell in cells[1][8:]] == [False, True, False, True, False]
    assert cells[1][12] == "0.500"
    assert len({len(line) for line in lines}) == 1
    assert "memory reads 20.0 GB/s · avx2_int8 0.25 T/s" in result.err
    # Room for the deepest test, and no more: the cache of a long context costs memory.
    assert loaded[0].options == {"max_context": 49}


def test_formats_and_threads_are_compared(moejet, loaded):
    result = moejet(
        *("bench", "-p", "8", "-n", "0", "-t", "1,2", "--format", "int4_g32,bf16", "-o", "jsonl"),
        *("--arithmetic", "int8"),
    )
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [(row["format"], row["threads"]) for row in rows] == [
        ("int4_g32", 1),
        ("int4_g32", 2),
        ("bf16", 1),
        ("bf16", 2),
    ]
    assert {row["arithmetic"] for row in rows} == {"int8"}
    for key in (*environment.PROVENANCE, "isa", "read_gbps", "samples_s"):
        assert key in rows[0]
    assert rows[0]["memory_read_gbps"] == 20.0
    assert "avx2" in rows[0]["instruction_sets"]


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
        (["-p", "a"], "-p='a' must be a list of whole numbers such as 128,512"),
        (["-n", "-4"], "-n='-4'"),
        (["-b", "0"], "-b 0 must be a positive number"),
        (["-r", "0"], "-r='0' must be a whole number of at least 1"),
        (["-t", "0"], "-t 0 must be a positive number"),
        (
            ["--format", "int4"],
            "'int4', which is not one of auto, native, int4_g32, int8, fp8, bf16, fp32",
        ),
        (["-m", "x", "--synthetic", "deepseek-v3"], "not allowed with argument"),
        (["-o", "xml"], "--output='xml' must be one of"),
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
