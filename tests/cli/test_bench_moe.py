"""`moejet bench moe`: the cases it makes, what it checks before timing, and its rows."""

import json
from types import SimpleNamespace

import pytest
import torch

from moejet import ceilings
from moejet.ceilings import Ceiling, Meter
from moejet.config import EXPERT_FORMATS, GGUF_FORMATS
from moejet.experts.cpu_experts import CpuExperts, create_pool
from moejet.presets import PRESETS
from moejet.testing import moe_bench
from moejet.testing.moe_bench import LayerShape

SHAPE = LayerShape(hidden_size=96, intermediate_size=80, num_experts=5, top_k=2)
SMALL = ("--shape", "deepseek-v2-lite", "--experts", "6", "--layers", "1", "--seconds", "0.01")


@pytest.fixture(scope="module")
def pool():
    made = create_pool(1)
    yield made
    made.close()


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(ceilings, "read_buffer_bytes", lambda: 8 << 20)
    monkeypatch.setattr(ceilings, "_TRIAL_SECONDS", 0.001)


def make_layer(pool, weight_format, isa="auto", arithmetic="bf16"):
    sizes = (SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size)
    layer = CpuExperts(*sizes, format=weight_format, pool=pool, isa=isa, arithmetic=arithmetic)
    layer.fill_random(3)
    return layer


def test_tokens_take_distinct_experts():
    for num_tokens in (1, 2, 33):
        ids = moe_bench.random_routing(SHAPE, num_tokens, 7)
        assert ids.shape == (num_tokens, 2)
        assert ids.dtype == torch.int32
        assert all(len(set(row)) == 2 for row in ids.tolist())
    some, again, other = (moe_bench.random_routing(SHAPE, 33, call) for call in (1, 1, 2))
    assert torch.equal(some, again)
    assert not torch.equal(some, other)


def test_single_tokens_walk_through_all_experts():
    taken = [e for call in range(5) for e in moe_bench.random_routing(SHAPE, 1, call)[0].tolist()]
    assert taken == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("num_tokens", [1, 2, 70])
@pytest.mark.parametrize("weight_format", [*EXPERT_FORMATS, *GGUF_FORMATS])
def test_right_answers_pass(pool, weight_format, num_tokens):
    error = moe_bench.check(make_layer(pool, weight_format), SHAPE, num_tokens)
    assert 0 <= error < 0.02


def test_tiles_are_checked(pool, usable_isa):
    layer = make_layer(pool, "int4_g32", usable_isa("amx_emulated"))
    assert moe_bench.check(layer, SHAPE, 70) < 0.005
    layer = make_layer(pool, "int4_g32", "amx_emulated", "int8")
    assert 0.01 < moe_bench.check(layer, SHAPE, 70) < 0.024


@pytest.mark.parametrize("row", [0, 20, 39])
def test_one_wrong_row_is_found(pool, monkeypatch, row):
    def run(self, x, ids, mix, out):
        right(self, x, ids, mix, out)
        out[row] *= 1.5

    right = CpuExperts.run_kernels
    monkeypatch.setattr(CpuExperts, "run_kernels", run)
    # Every token takes one of the two experts that count.
    monkeypatch.setattr(
        moe_bench, "random_routing", lambda *_: torch.tensor([[0, 1]] * 39 + [[1, 2]]).int()
    )
    with pytest.raises(moe_bench.WrongAnswerError, match=r"int8 on .* for 40 tokens"):
        moe_bench.check(make_layer(pool, "int8"), SHAPE, 40)


def test_not_a_number_is_wrong(pool, monkeypatch):
    monkeypatch.setattr(CpuExperts, "run_kernels", lambda *_: None)
    with pytest.raises(moe_bench.WrongAnswerError, match="error nan"):
        moe_bench.check(make_layer(pool, "bf16"), SHAPE, 2)


def test_rotation(monkeypatch):
    monkeypatch.setattr(moe_bench.topology, "available_bytes", lambda: 1000)
    monkeypatch.setattr(moe_bench.topology, "all_caches_bytes", lambda cpus: 50)

    def plan(**given):
        return moe_bench.plan_rotation(10, 4, **{"layers": None, "wanted_bytes": 160, **given})

    assert plan() == 5  # 200 bytes: four times the caches
    assert plan(wanted_bytes=400) == 10
    assert plan(wanted_bytes=1e9) == 15  # 60 % of what is available
    assert plan(layers=2) == 2
    with pytest.raises(ValueError, match="16 layers of 4 experts take"):
        plan(layers=16)
    assert moe_bench.fitting_experts(10, 256) == 60
    assert moe_bench.fitting_experts(10, 8) == 8
    monkeypatch.setattr(moe_bench.topology, "available_bytes", lambda: None)
    assert plan(layers=1000) == 1000
    assert moe_bench.fitting_experts(10, 256) == 256


class FakeMeter:
    """20 GB/s, and 0.1 T operations per second where there is a ceiling."""

    threads = 1

    def read(self, seconds):
        return Ceiling("dram_read", "GB/s", 1, 20.0)

    def arithmetic(self, name, seconds):
        return Ceiling(name, "TOP/s", 1, 0.1)


def test_figures_of_a_case(pool):
    layers = [make_layer(pool, "int8", "avx2") for _ in range(2)]
    figures = moe_bench.time_case(layers, SHAPE, 4, meter=FakeMeter(), seconds=0.001)
    assert figures["calls"] >= 3
    assert 0 < figures["ms_p20"] <= figures["ms_p50"] <= figures["ms_p80"]
    assert 2 <= figures["unique_experts"] <= 5
    assert figures["read_gbps"] == 20.0
    assert figures["ceiling"] == "avx2_int8"
    assert figures["ceiling_tflops"] == 0.1


def test_every_packed_byte_is_read_before_time_is_up(pool):
    layers = [make_layer(pool, "bf16") for _ in range(3)]
    figures = moe_bench.time_case(layers, SHAPE, 1, meter=FakeMeter(), seconds=0.05)
    assert figures["calls"] * 2 >= 3 * SHAPE.num_experts


def test_arithmetic_of_the_rows():
    figures = {"unique_experts": 10.0, "ms_p50": 2.0, "read_gbps": 20.0, "ceiling_tflops": 0.5}
    row = moe_bench.derive(figures, expert_bytes=1_000_000, operations=500_000_000)
    assert row["bytes"] == 10_000_000
    assert row["gbps"] == pytest.approx(5.0)
    assert row["tflops"] == pytest.approx(0.25)
    assert row["fraction_of_dram"] == pytest.approx(0.25)
    assert row["fraction_of_peak"] == pytest.approx(0.5)
    assert row["roofline_ms"] == pytest.approx(1.0)  # arithmetic; memory would take 0.5
    assert row["over_roofline"] == pytest.approx(2.0)
    row = moe_bench.derive({**figures, "ceiling_tflops": None}, 1_000_000, 500_000_000)
    assert row["fraction_of_peak"] is None
    assert row["roofline_ms"] == pytest.approx(0.5)
    assert LayerShape.of(PRESETS["deepseek-v3"]).operations(2) == 6 * 2 * 8 * 7168 * 2048


@pytest.mark.usefixtures("small_buffer")
def test_rows_of_the_command(moejet, tmp_path):
    file = tmp_path / "rows.jsonl"
    arguments = ("--format", "int4_g32,bf16", "--tokens", "1,3", "-t", "1", "--json", str(file))
    result = moejet("bench", "moe", *SMALL, *arguments)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 2 + 4
    assert len({len(line) for line in lines}) == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["format"], row["tokens"]) for row in rows] == [
        ("int4_g32", 1),
        ("int4_g32", 3),
        ("bf16", 1),
        ("bf16", 3),
    ]
    for row in rows:
        assert row["bench"] == "moe"
        assert row["threads"] == 1
        assert row["num_experts"] == 6
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms_p50"] / 1e6, rel=1e-3)
        assert row["over_roofline"] > 0
        assert (row["fraction_of_peak"] is None) == (row["ceiling"] is None)
        for key in ("commit", "dirty", "cpu", "versions", "isa", "time", "relative_error"):
            assert key in row
    # A second run adds to the file.
    arguments = ("--format", "int8", "--arithmetic", "int8", "--tokens", "1", "--json", str(file))
    moejet("bench", "moe", *SMALL, *arguments)
    lines = file.read_text().splitlines()
    assert len(lines) == 5
    assert [json.loads(line)["arithmetic"] for line in lines] == ["bf16"] * 4 + ["int8"]


@pytest.mark.usefixtures("small_buffer")
def test_json_to_stdout_replaces_the_table(moejet):
    result = moejet("bench", "moe", *SMALL, "--format", "int8", "--tokens", "2", "--json", "-")
    assert result.code == 0, result.err
    assert json.loads(result.out)["tokens"] == 2
    assert json.loads(result.out)["arithmetic"] == "bf16"


@pytest.mark.usefixtures("small_buffer")
def test_a_wrong_answer_is_not_timed(moejet, monkeypatch):
    monkeypatch.setattr(moe_bench, "tolerance", lambda *_: 1e-9)
    timed = SimpleNamespace(calls=0)
    monkeypatch.setattr(moe_bench, "time_case", lambda *_, **__: setattr(timed, "calls", 1))
    result = moejet("bench", "moe", *SMALL, "--format", "int8", "--tokens", "1")
    assert result.code == 1
    assert "wrong answer with int8" in result.err
    assert result.out == ""
    assert timed.calls == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "deepseek-v9"], "'deepseek-v9', which is not one of deepseek-v2-lite"),
        (["--format", "int4"], "'int4', which is not one of int4_g32, int8"),
        (["--tokens", "1,0"], "--tokens 0 must be a positive number"),
        (["--tokens", "x"], "--tokens='x' must be a list"),
        (["--experts", "0"], "--experts='0' must be a whole number of at least 1"),
        (["--experts", "4"], "experts=4 must be at least the 8"),
        (["--layers", "-1"], "--layers='-1' must be a whole number of at least 1"),
        (["--layers", "100000"], "choose fewer experts or layers"),
        (["--seconds", "0"], "--seconds='0' must be a number above 0"),
        (["--isa", "avx9"], "--isa='avx9' must be one of"),
    ],
)
def test_bad_options(moejet, arguments, message):
    result = moejet("bench", "moe", *arguments)
    assert result.code == 2
    assert message in result.err


def test_meter_is_used_for_real(pool, small_buffer):
    meter = Meter(pool, isa="scalar", num_bytes=8 << 20)
    figures = moe_bench.time_case(
        [make_layer(pool, "bf16", "scalar")], SHAPE, 2, meter=meter, seconds=0.001
    )
    assert figures["read_gbps"] > 0
    assert figures["ceiling"] is None
    assert figures["ceiling_tflops"] is None
