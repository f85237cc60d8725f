"""`moejet pull`: what it prints, where, and with which exit code."""

import json
import os
import subprocess
import sys

import pytest

from moejet.testing.checkpoints import tiny_checkpoint
from moejet.testing.gguf_files import write_gguf


@pytest.fixture
def served(hub, tmp_path):
    """org/model on the hub; returns the options that name a cache of the test's own."""
    repo = tmp_path / "repo"
    repo.mkdir()
    hub.repos["org/model"] = tiny_checkpoint(repo, "moonlight", num_shards=2, num_hidden_layers=2)
    return ["--cache-dir", str(tmp_path / "cache")]


def snapshot(tmp_path):
    return next((tmp_path / "cache/models--org--model/snapshots").iterdir())


def test_lines_without_a_terminal(moejet, served, tmp_path):
    result = moejet("pull", "org/model", *served)
    assert result.code == 0
    assert result.out == f"{snapshot(tmp_path)}\n"
    lines = result.err.splitlines()
    assert lines[0].startswith("org/model: ")
    assert " files, " in lines[0]
    assert "model-00001-of-00002.safetensors: " in result.err
    assert lines[-1].startswith("complete: ")
    assert "\r" not in result.err


def test_a_line_on_terminals(moejet, served):
    result = moejet("pull", "org/model", *served, terminal=True)
    assert "fetching [" in result.err
    assert "MB/s" in result.err
    assert "hash correct" not in result.err


def test_quiet_and_json(moejet, served, tmp_path):
    result = moejet("pull", "org/model", "-q", "--json", *served)
    assert result.err == ""
    found = json.loads(result.out)
    assert found["path"] == str(snapshot(tmp_path))
    assert found["bytes"] == found["bytes_fetched"] == sum(f["size"] for f in found["files"])
    again = json.loads(moejet("pull", "org/model", "--json", *served).out)
    assert again["bytes_fetched"] == 0


def test_dry_run_fetches_no_weights(moejet, hub, served):
    result = moejet("pull", "org/model", "--dry-run", *served)
    assert result.code == 0
    assert result.out == ""
    assert "  model-00002-of-00002.safetensors" in result.err
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


def test_offline(moejet, hub, served, tmp_path, monkeypatch):
    missing = moejet("pull", "org/model", "--offline", *served)
    assert missing.code == 2
    assert "not in the local cache" in missing.err
    moejet("pull", "org/model", *served)
    hub.requests.clear()
    assert moejet("pull", "org/model", "--offline", *served).out == f"{snapshot(tmp_path)}\n"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert moejet("pull", "org/model", *served).out == f"{snapshot(tmp_path)}\n"
    (snapshot(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    partly = moejet("pull", "org/model", *served)
    assert partly.code == 2
    assert "model-00002-of-00002.safetensors missing" in partly.err
    assert hub.requests == []


def test_verify(moejet, hub, served, tmp_path):
    moejet("pull", "org/model", *served)
    hub.requests.clear()
    good = moejet("pull", "org/model", "--verify", *served)
    assert good.code == 0
    assert "correct" in good.err
    shard = snapshot(tmp_path) / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    bad = moejet("pull", "org/model", "--verify", "--json", *served)
    assert bad.code == 1
    assert json.loads(bad.out)["corrupt"] == [shard.name]
    assert f"{shard.name} corrupt and removed" in bad.err
    assert hub.requests == []
    assert moejet("pull", "org/model", *served).code == 0
    assert shard.read_bytes() == data


def test_sweep(moejet, served, tmp_path):
    moejet("pull", "org/model", *served)
    orphan = tmp_path / "cache/models--org--model/blobs" / ("a" * 64 + ".incomplete")
    orphan.write_bytes(b"x" * 2048)
    shown = moejet("pull", "--sweep", "--dry-run", *served)
    assert "2.0 KiB  incomplete" in shown.err
    assert "nothing removed" in shown.err
    assert orphan.exists()
    swept = moejet("pull", "org/model", "--sweep", "--json", *served)
    assert json.loads(swept.out)["freed"] == 2048
    assert not orphan.exists()
    assert "0 files" in moejet("pull", "--sweep", *served).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the model is missing"),
        (["model"], "'model' is not a hub id"),
        (["./a/b"], "is not a hub id"),
        (["org/model", "--offline", "--verify"], "not allowed with"),
        (["org/model", "--verify", "--quant", "Q4_0"], "choose what to download"),
        (["org/model:Q4_0", "--verify"], "look at all of a model: give org/name"),
        (["org/model", "--verify", "--dry-run"], "--dry-run goes with"),
        (["--sweep", "--revision", "v1"], "--revision does not go with --sweep"),
    ],
)
def test_bad_usage(moejet, hub, arguments, message):
    result = moejet("pull", *arguments)
    assert result.code == 2
    assert message in result.err
    assert hub.requests == []


def test_exit_codes_tell_input_from_circumstances(moejet, hub, served):
    assert moejet("pull", "org/nothing", *served).code == 2
    assert moejet("pull", "org/model", "--revision", "v9", *served).code == 2
    hub.gated.add("org/model")
    gated = moejet("pull", "org/model", *served)
    assert gated.code == 2
    assert "is gated: accept its terms" in gated.err
    hub.fail_with = 503
    down = moejet("pull", "org/model", *served)
    assert down.code == 1
    assert down.err.count("\n") == 1
    assert "the hub answers 503" in down.err


def test_pull_then_run_without_a_hub(hub, served, tmp_path):
    command = [sys.executable, "-m", "moejet"]
    environment = hub.environment() | {"HF_HUB_CACHE": str(tmp_path / "cache")}
    subprocess.run([*command, "pull", "org/model"], env=environment, check=True)
    hub.close()
    options = ["--raw", "--max-tokens", "4", "--ignore-eos", "--threads", "1", "--json"]
    run = subprocess.run(
        [*command, "run", "org/model", "hello", *options],
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    assert len(json.loads(run.stdout)["token_ids"]) == 4


def test_one_quantisation_from_plan_to_answer(moejet, hub, served, tmp_path, monkeypatch):
    """`plan` reads the header only; `pull` and `run` take the same name."""
    repo = tmp_path / "gguf"
    repo.mkdir()
    for name in ("Q4_0", "Q8_0"):
        write_gguf(hub.repos["org/model"], repo / f"m-{name}.gguf", name)
    hub.repos["org/model-GGUF"] = repo
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refused = moejet("plan", "org/model-GGUF:Q6_K", "--no-measure")
    assert refused.code == 2
    assert "no quant='Q6_K'; it has Q4_0 (" in refused.err
    planned = moejet("plan", "org/model-GGUF:Q4_0", "--no-measure", "--json")
    assert planned.code == 0
    assert json.loads(planned.out)["expert_format"] == "native"
    assert not list((tmp_path / "cache").rglob("snapshots/*/*.gguf"))
    assert moejet("pull", "org/model-GGUF:Q4_0").code == 0
    hub.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--raw", "--max-tokens", "4", "--ignore-eos", "--threads", "1", "--json"]
    answer = moejet("run", "org/model-GGUF:Q4_0", "hello", *options)
    assert answer.code == 0
    assert len(json.loads(answer.out)["token_ids"]) == 4
    missing = moejet("run", "org/model-GGUF:Q8_0", "hello")
    assert missing.code == 2
    assert "Q8_0 GGUF file missing" in missing.err


def test_importing_the_command_needs_no_torch():
    program = "import sys, moejet.cli.pull; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ).returncode == 0
