"""`moejet doctor` on a machine with a GPU, whose answers are made up here."""

from types import SimpleNamespace

import pytest
import torch

from moejet.cli import check_gpu, checks, gpu_selftest
from moejet.experts.simulated_stream import SimulatedStream

GIB = 1 << 30
KERNEL = {"done": "kernel", "error": 2e-7}
HAND_OVER = {
    "done": "hand-over",
    "error": 0.0,
    "mode": "memory_operations",
    "reason": "",
    "layer_us": 7.94,
}
GOOD = [{"start": "a Triton kernel"}, KERNEL, {"start": "handing layers to the CPU"}, HAND_OVER]


@pytest.fixture
def gpu(monkeypatch):
    """A card of 24 GiB, 22 of them free; report(lines, problem) sets what its self-test says."""
    monkeypatch.delenv("MOEJET_DEVICE", raising=False)
    card = SimpleNamespace(name="NVIDIA Test 24", major=8, minor=9, total_memory=24 * GIB)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: card,
        "get_device_name": lambda: card.name,
        "mem_get_info": lambda: (22 * GIB, 24 * GIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(check_gpu, "nvidia_smi", lambda: "NVIDIA Test 24, 580.1")
    monkeypatch.setattr(check_gpu.importlib.util, "find_spec", lambda name: object())

    def report(lines, problem=""):
        monkeypatch.setattr(check_gpu, "lines_of", lambda arguments, timeout_s: (lines, problem))

    report(GOOD)
    return report


def _lines(status=None) -> dict[str, checks.Check]:
    report = checks.Report()
    check_gpu.check_gpu(report, None)
    return {c.name: c for c in report.checks if status is None or c.status == status}


def test_a_good_card(gpu):
    lines = _lines()
    assert lines["device"].value == "NVIDIA Test 24, SM 8.9, 24.0 GiB"
    assert "routed ones as fit run on NVIDIA Test 24, the other experts on the CPU" in (
        lines["models"].value
    )
    assert lines["memory"].value.startswith("22.0 GiB free of 24.0: models take it all, unless")
    assert lines["kernel"].value == "Triton compiles and runs"
    assert lines["hand-over"].value == "by stream memory operations in a graph, 7.9 us per layer"
    assert {lines[name].status for name in ("memory", "kernel", "hand-over")} == {"ok"}


def test_a_full_card(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GIB, 24 * GIB))
    assert "nvidia-smi" in _lines("warning")["memory"].remedy


def test_host_functions(gpu):
    gpu([*GOOD[:3], HAND_OVER | {"mode": "host_functions", "reason": "NOT_SUPPORTED (801)"}])
    found = _lines("warning")["hand-over"]
    assert found.value == "by host functions, 7.9 us per layer"
    assert "NOT_SUPPORTED (801)" in found.remedy


@pytest.mark.parametrize("error", [0.4, float("nan")])
def test_wrong_results(error, gpu):
    gpu([*GOOD[:3], HAND_OVER | {"error": error}])
    found = _lines("error")["hand-over"]
    assert "gives wrong results" in found.value
    assert "--device cpu" in found.remedy


def test_a_self_test_that_dies_or_hangs(gpu):
    gpu(GOOD[:3], "still running after 90 s")
    found = _lines("error")["self-test"]
    assert found.value == "failed at handing layers to the CPU: still running after 90 s"
    gpu([], "killed by SIGSEGV")
    assert _lines("error")["self-test"].value == "failed at the start: killed by SIGSEGV"


def test_the_cpu_was_asked_for(gpu, monkeypatch):
    gpu([], "must not run")
    monkeypatch.setenv("MOEJET_DEVICE", "cpu")
    assert "run on the CPU: MOEJET_DEVICE=cpu" in _lines()["models"].value
    monkeypatch.setenv("MOEJET_DEVICE", "tpu")
    assert "MOEJET_DEVICE='tpu'" in _lines("error")["models"].value


def test_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(check_gpu.importlib.util, "find_spec", lambda name: None)
    lines = _lines()
    assert lines["triton"].status == "warning"
    assert "models" not in lines


def test_a_driver_that_torch_does_not_see(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _lines()["device"].value == (
        "nvidia-smi sees NVIDIA Test 24, 580.1, torch does not (models run on the CPU)"
    )


def test_the_hand_over_of_the_self_test():
    with SimulatedStream() as stream:
        figures = gpu_selftest.hand_over(stream)
    assert figures["error"] == 0.0
    assert figures["mode"] == "simulated"
    assert figures["layer_us"] > 0


def test_processes_that_take_too_long_say_how_far_they_came():
    code = "import time; print('{\"start\": 1}', flush=True); time.sleep(30)"
    lines, problem = check_gpu.lines_of(("-c", code), 3.0)
    assert lines == [{"start": 1}]
    assert problem == "still running after 3 s"


@pytest.mark.gpu
def test_the_self_test_on_this_gpu():
    lines, problem = check_gpu.lines_of(check_gpu.SELFTEST, 90.0)
    assert problem == ""
    assert [line["done"] for line in lines if "done" in line] == ["kernel", "hand-over"]
    assert all(line["error"] < 1e-3 for line in lines if "done" in line)
