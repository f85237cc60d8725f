"""`moejet serve` with packed weights in a mapped file: that is cut short, and then the model is gone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moejet import LLM
from moejet.testing.checkpoints import tiny_checkpoint

BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", "deepseek_v3")


@pytest.fixture
def packed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that holds the model's packed weights."""
    monkeypatch.setenv("MOEJET_CACHE", str(tmp_path / "cache"))
    with LLM(model, packed_cache="on"):
        pass
    [file] = [f for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.stat().st_size > 9999]
    return file


@pytest.fixture
def server(model: Path, packed: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "moejet", "serve", str(model), "--port", "0"]
    command += ["--packed-cache", "on", "--max-restarts", "1", "--no-access-log"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.kill()


def engine_pid(server: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return int(children.split()[0])


def health_until(url: str, status: str) -> dict:
    deadline = time.monotonic() + 60
    while (health := httpx.get(f"{url}/health").json())["status"] != status:
        assert time.monotonic() < deadline, f"{health=}"
        time.sleep(0.05)
    return health


def test_a_file_cut_short_and_a_model_that_is_gone(server, model, packed):
    line = server.stdout.readline()
    url = line.split()[-1]
    assert line.startswith("model is served at http://127.0.0.1:")
    completions = f"{url}/v1/completions"
    pid = engine_pid(server)
    assert str(packed) in Path(f"/proc/{pid}/maps").read_text()

    before = httpx.post(completions, json=BODY, timeout=60).json()["choices"]
    # Cut while a stream runs: it ends with an error that names the likely cause.
    body = {**BODY, "max_tokens": 4000, "stream": True}
    lines = []
    with httpx.stream("POST", completions, json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            lines.append(line)
            if len(lines) == 5:
                os.truncate(packed, 4096)
    [error] = [json.loads(line[6:])["error"] for line in lines if line.startswith('data: {"error"')]
    assert "SIGBUS (a weight file that it had mapped was cut short" in error["message"]
    assert error["code"] == "engine_dead"
    assert lines[-2:] == ["data: [DONE]", ""]

    # The file is written anew from the checkpoint.
    health = health_until(url, "ok")
    assert "SIGBUS" in health["last_failure"]
    assert health["restarts"] == 1
    assert httpx.post(completions, json=BODY, timeout=60).json()["choices"] == before

    # Without the checkpoint there is no coming back, and everybody is told so.
    weights = next(model.glob("*.safetensors"))
    weights.rename(model / "elsewhere")
    os.kill(engine_pid(server), signal.SIGKILL)
    health = health_until(url, "dead")
    assert "could not be started again" in health["error"]
    assert "safetensors" in health["error"]
    assert "SIGUSR1" in health["error"]
    refused = httpx.post(completions, json=BODY)
    assert refused.status_code == 503
    assert "remove the cause, then send the server SIGUSR1" in refused.json()["error"]["message"]
    assert "moejet:engine_up{" in (text := httpx.get(f"{url}/metrics").text)
    assert 'moejet:engine_up{model_name="model"} 0.0' in text

    # The way back.
    (model / "elsewhere").rename(weights)
    server.send_signal(signal.SIGUSR1)
    assert health_until(url, "ok")["restarts"] == 2
    assert httpx.post(completions, json=BODY, timeout=60).status_code == 200
    server.send_signal(signal.SIGUSR1)  # changes nothing
    server.send_signal(signal.SIGTERM)
    log = server.communicate(timeout=30)[1]
    assert server.returncode == 0
    assert "giving up: remove the cause" in log
    assert "starting the engine" in log
    assert "the engine runs: SIGUSR1 changes nothing" in log
