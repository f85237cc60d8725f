"""`moejet bench` of a model on a (simulated) GPU, from the command's options to its tables."""

import argparse
import json

import pytest

from moejet import LLM, ceilings
from moejet.cli import bench, bench_hybrid
from moejet.config import ModelConfig
from moejet.hybrid_timing import Profile
from moejet.testing.checkpoints import hf_config

SHAPE = ModelConfig.from_hf(hf_config("deepseek_v3"))
OPTIONS = {"device": "simulated", "max_context": 128, "cache_tokens": 512, "isa": "avx2"}


class FakeMeter:
    """Reading a gigabyte for every figure would take most of the test's time."""

    threads = 2

    def __init__(self, pool, isa):
        pass

    def read(self, seconds=0.0):
        return ceilings.Ceiling("dram_read", "GB/s", 2, 20.0)

    def arithmetic(self, name, seconds):
        return ceilings.Ceiling(name, "TOP/s", 2, 0.5)


def _bench(monkeypatch, *arguments, **given) -> int:
    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    args = parser.parse_args(["-r", "2", *arguments])
    args.device = "simulated"  # which users are not offered
    for name, value in given.items():
        setattr(args, name, value)
    monkeypatch.setattr(ceilings, "Meter", FakeMeter)
    monkeypatch.setattr(
        bench, "open_llm", lambda args, options: LLM.synthetic(SHAPE, isa="avx2", **options)
    )
    return bench.execute(args)


@pytest.mark.parametrize("gpu_experts", [0, 9, 10**6])
def test_rows_have_the_figures_of_steps(gpu_experts, monkeypatch, capsys):
    arguments = ("-p", "20", "-n", "11,3", "-b", "1,3", "-o", "jsonl")
    assert _bench(monkeypatch, *arguments, gpu_experts=gpu_experts) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["test"] for row in rows] == ["pp20", "tg11", "tg11xb3", "tg3", "tg3xb3"]
    assert [row["hybrid"] is None for row in rows] == [False, False, False, True, True]
    prompt, single, batch = (row["hybrid"] for row in rows[:3])
    assert (prompt["num_tokens"], prompt["steps"]) == (20, 2)
    assert (single["num_tokens"], single["steps"]) == (1, 4)
    assert batch["num_tokens"] == 3
    for figures in (prompt, single, batch):
        assert figures["wall_ms"] >= figures["span_ms"] > 0
        assert figures["alone_ms"] > 0
        assert figures["ceilings"]["dram_read"] == 20.0
        assert figures["ceilings"]["host_to_device"] is None
        vram = figures["vram"]
        assert 0 < vram["reserved"] <= vram["planned"] < vram["budget"]
    layers = 0 if gpu_experts > 100 else SHAPE.num_moe_layers
    row = 4 * SHAPE.hidden_size + 8 * SHAPE.num_experts_per_tok
    assert single["pcie_to_cpu_bytes"] == layers * row + 4
    assert batch["pcie_to_cpu_bytes"] == 4 * (layers * row + 4)  # padded to four rows
    assert single["pcie_to_gpu_bytes"] > layers * 4 * SHAPE.hidden_size
    if layers:
        assert single["cpu_ms"] > 0
        assert single["handover_us"] > 0
        assert 0 <= single["overlap"] <= 1
    else:
        assert single["cpu_ms"] == 0
        assert single["handover_us"] is None
    hits = {0: 0.0, 9: single["expert_hit_rate"], 10**6: 1.0}[gpu_experts]
    assert single["expert_hit_rate"] == hits
    assert 0 <= hits <= 1
    assert batch["expert_hit_rate"] is None


def test_tables(monkeypatch, capsys):
    assert _bench(monkeypatch, "-p", "4", "-n", "5", gpu_experts=5) == 0
    captured = capsys.readouterr()
    first, second = captured.out.split("| test           | step ms")
    assert "| tg5 " in first
    names, _, prompt, answer = second.splitlines()
    assert "hand-over us" in names
    cells = [cell.strip() for cell in answer.split("|")[1:-1]]
    assert cells[0] == "tg5"
    assert all(float(cell) > 0 for cell in cells[1:3])
    assert cells[5].endswith("%")
    assert prompt.split("|")[1].strip() == "pp4"
    assert "ceilings: memory reads" in captured.err
    assert "GiB planned of 64.00" in captured.err


def test_limits_of_a_real_card():
    figures = {
        "ceilings": {
            "dram_read": 190.0,
            "host_to_device": 54.4,
            "device_to_host": 53.0,
            "device_copy": 4266.0,
        },
        "vram": {
            "planned": 21 << 30,
            "budget": 22 << 30,
            "reserved": 20 << 30,
            "device_used": 23 << 30,
            "device_total": 24 << 30,
        },
    }
    rates, memory = bench_hybrid.describe_limits(figures)
    assert "memory reads 190.0 GB/s, to the GPU 54.4 GB/s, from it 53.0 GB/s" in rates
    assert memory == (
        "GPU memory: 21.00 GiB planned of 22.00, 20.00 reserved at most; "
        "the card has 23.00 of 24.00 in use"
    )


def test_without_the_cpu_nothing_is_computed_there_and_afterwards_all_is_as_before():
    with LLM.synthetic(SHAPE, gpu_experts=0, **OPTIONS) as llm:
        runner = llm.engine.runner
        profile = Profile(llm.engine)
        counted = []
        for _ in range(2):
            before = runner.bridge.counters()["layers"]
            readings = profile.decode(3, depth=5)
            counted.append(runner.bridge.counters()["layers"] - before)
            assert readings.cpu_layers == 3 * SHAPE.num_moe_layers
            assert readings.cpu_experts == 3 * SHAPE.num_moe_layers * SHAPE.num_experts_per_tok
            assert len(readings.wall_s) == len(readings.span_s) == len(readings.alone_s) == 3
        # Warm-up and steps; not those alone. 21 hand-overs of every layer count, with no expert each.
        assert counted == [(3 + 3 + 21) * SHAPE.num_moe_layers] * 2
        assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks
        with pytest.raises(ZeroDivisionError), runner.bridge.answering_at_once():
            raise ZeroDivisionError
        before = runner.bridge.counters()["layers"]
        profile.prefill(1, 4)
        assert runner.bridge.counters()["layers"] - before == 2 * SHAPE.num_moe_layers


def test_a_model_on_the_cpu_has_no_such_figures():
    options = {**OPTIONS, "device": "cpu"}
    with (
        LLM.synthetic(SHAPE, **options) as llm,
        pytest.raises(ValueError, match="runs on the CPU alone"),
    ):
        Profile(llm.engine)
