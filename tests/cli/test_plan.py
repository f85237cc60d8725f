"""`moejet plan`: presets and checkpoints, with and without measuring."""

import json

import pytest
import torch

from moejet.cli.main import main
from moejet.testing.checkpoints import tiny_checkpoint


def test_preset_for_another_machine(capsys):
    arguments = ["plan", "deepseek-v3", "--ram", "512", "--bandwidth", "400", "--no-measure"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "342.56 GiB  routed experts" in out
    assert "of 512.00 in all" in out
    assert "memory reads 400.0 GB/s" in out
    assert out.endswith("it fits\n")
    assert main([*arguments, "--expert-format", "int8"]) == 1
    assert "it does not fit: one of: expert_format='int4_g32'" in capsys.readouterr().out


def test_json_of_a_checkpoint_with_measurement(tmp_path, capsys):
    path = tiny_checkpoint(tmp_path, "deepseek_v3")
    assert main(["plan", str(path), "--json", "--context", "64", "--threads", "1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["cache_tokens"] == 8192
    assert plan["machine"]["read_gbps"] > 0.1
    assert [s["depth"] for s in plan["speeds"]] == [0]
    assert sum(p["num_bytes"] for p in plan["parts"]) == plan["ram_bytes"]


def test_a_gpu_takes_experts_out_of_ram(capsys):
    common = ["plan", "kimi-k2", "--ram", "640", "--no-measure", "--bandwidth", "200", "--json"]
    plans = []
    for more in ([], ["--gpu-experts", "0"]):
        assert main([*common, "--vram", "32", *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    full, none = plans
    assert full["gpu_experts"] > none["gpu_experts"] == 0
    assert full["ram_bytes"] < none["ram_bytes"]
    assert full["vram_bytes"] > none["vram_bytes"]
    assert full["speeds"][0]["decode"] > none["speeds"][0]["decode"] > 0
    assert main([*common[:-1], "--vram", "32"]) == 0
    out = capsys.readouterr().out
    assert "if the GPU keeps up with the CPU" in out
    assert "of 23040 routed experts" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/"], "no such file or directory"),
        (["deepseek-v9"], "neither an alias"),
        (["deepseek-v3", "--ram", "-1"], "--ram='-1' must be a number above 0"),
        (["deepseek-v3", "--gpu-experts", "3"], "needs a GPU: give its memory as --vram"),
        (["deepseek-v3", "--bandwidth", "fast"], "--bandwidth='fast' must be a number above 0"),
        (["deepseek-v3", "--context", "999999999"], "--context=999999999 is more"),
        ([], "MODEL"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--vram", "32"], "device: a GPU, 32.0 GiB to use, with "),
        (["--vram", "32", "--gpu-experts", "0"], "; all 1664 routed experts on the CPU"),
        (["--vram", "32", "--expert-format", "int4_g32"], "with all routed experts; nothing is"),
        (["--vram", "6"], "the CPU computes the others at the same time"),
        (["--device", "cpu"], "device: the CPU alone\n"),
        ([], "device: the CPU alone\n"),
    ],
)
def test_the_device_is_said(more, text, capsys):
    common = ["plan", "deepseek-v2-lite", "--ram", "64", "--no-measure"]
    assert main([*common, *more]) == 0
    assert text in capsys.readouterr().out


@pytest.fixture
def card(monkeypatch):
    """A GPU with 12 GiB, of which 10.3 are free."""
    monkeypatch.setenv("MOEJET_DEVICE", "auto")
    pytest.importorskip("triton")
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA Test 12",
        "mem_get_info": lambda: (int(10.3 * 2**30), 12 << 30),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_the_gpu_of_this_machine_is_planned_for(card, capsys):
    common = ["plan", "deepseek-v2-lite", "--ram", "64", "--no-measure"]
    assert main([*common, "--expert-format", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "device: NVIDIA Test 12, 10.2 GiB to use, with " in out
    assert "GiB of 10.25 in all" in out
    assert main([*common, "--json", "--gpu-experts", "7"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["gpu"], plan["gpu_experts"]) == ("NVIDIA Test 12", 7)
    assert main([*common, "--device", "cpu"]) == 0
    assert "device: the CPU alone" in capsys.readouterr().out
    assert main([*common, "--vram", "5"]) == 0
    assert "device: a GPU, 5.0 GiB to use" in capsys.readouterr().out


def test_a_gpu_that_cannot_be_used_is_an_error_where_it_was_asked_for(card, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "deepseek-v2-lite", "--no-measure", "--device", "cuda"]) == 2
    assert "device='cuda' is not possible: torch sees no CUDA device" in capsys.readouterr().err
