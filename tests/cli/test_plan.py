"""`moejet plan`: presets and checkpoints, with and without measuring."""

import json

import pytest

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
        (["deepseek-v3", "--ram", "-1"], "'-1' is not a positive number"),
        (["deepseek-v3", "--gpu-experts", "3"], "needs a GPU: give its memory as --vram"),
        (["deepseek-v3", "--bandwidth", "fast"], "'fast' is not a positive number"),
        (["deepseek-v3", "--context", "999999999"], "max_context=999999999 exceeds"),
        ([], "MODEL"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
