"""What `moejet doctor` says about GPUs: which there are, how much of one a model may use, and whether its way works."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejet.cli.selftest import lines_of
from moejet.environment import env_device

if TYPE_CHECKING:
    from moejet.cli.checks import Report

SELFTEST = ("-m", "moejet.cli.gpu_selftest")
# Triton compiles a kernel for the first time; a stream that hangs is what this is to find.
_TIMEOUT_S = 90.0
_MAX_ERROR = 1e-3
_GIB = 1 << 30
_AWAY = "--device cpu (or MOEJET_DEVICE=cpu) is the way around it"


def check_gpu(report: Report, root: Path) -> None:
    """Devices as torch sees them; then what models would do."""
    gpus: list[dict[str, Any]] = []
    driver = nvidia_smi()
    torch_cuda = None
    if (torch := sys.modules.get("torch")) is not None:  # imported by the checks of software
        torch_cuda = torch.version.cuda
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                device = torch.cuda.get_device_properties(index)
                gpus.append(
                    {
                        "name": device.name,
                        "compute_capability": f"{device.major}.{device.minor}",
                        "memory_bytes": device.total_memory,
                    }
                )
    report.facts["gpu"] = {"devices": gpus, "torch_cuda": torch_cuda, "nvidia_smi": driver}
    for gpu in gpus:
        value = (
            f"{gpu['name']}, SM {gpu['compute_capability']}, {gpu['memory_bytes'] / _GIB:.1f} GiB"
        )
        report.add("gpu", "device", value)
    if not gpus:
        reason = f"nvidia-smi sees {driver}, torch does not" if driver else "none found"
        report.add("gpu", "device", f"{reason} (models run on the CPU)")
        return
    if importlib.util.find_spec("triton") is None:
        remedy = "install it for GPU kernels: python -m pip install triton"
        report.add("gpu", "triton", "missing: models run on the CPU", "warning", remedy)
        return
    _check_use(report, torch)


def _check_use(report: Report, torch: Any) -> None:
    """Where models run, in how much memory, and whether the GPU's way works."""
    facts = report.facts["gpu"]
    try:
        wanted = env_device()
    except ValueError as error:
        report.add("gpu", "models", str(error), "error", "unset MOEJET_DEVICE")
        return
    if wanted == "cpu":
        report.add("gpu", "models", "run on the CPU: MOEJET_DEVICE=cpu, unless --device says cuda")
        return
    free, total = torch.cuda.mem_get_info()
    facts["free_bytes"] = free
    report.add(
        "gpu",
        "models",
        "attention, shared experts and as many routed ones as fit run on "
        f"{torch.cuda.get_device_name()}, the other experts on the CPU",
    )
    status, remedy = "ok", ""
    if free < total / 2:
        status, remedy = "warning", "other programs have the rest: `nvidia-smi` names them"
    report.add(
        "gpu",
        "memory",
        f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}: models take it all, unless --vram (vram_gib) says less",
        status,  # type: ignore[arg-type]
        remedy,
    )
    lines, problem = lines_of(SELFTEST, _TIMEOUT_S)
    facts["selftest"] = lines
    _report_selftest(report, lines, problem)


def _report_selftest(report: Report, lines: list[dict[str, Any]], problem: str) -> None:
    running = "the start"
    for line in lines:
        running = line.get("start", running)
        if "done" not in line:
            continue
        name, error = line["done"], line["error"]
        if not error <= _MAX_ERROR:  # NaN is no good either
            report.add("gpu", name, f"gives wrong results (off by {error:.2g})", "error", _AWAY)
        elif name == "kernel":
            report.add("gpu", name, "Triton compiles and runs", "ok")
        else:
            _report_hand_over(report, line)
    if problem:
        report.add("gpu", "self-test", f"failed at {running}: {problem}", "error", _AWAY)


def _report_hand_over(report: Report, line: dict[str, Any]) -> None:
    cost = f"{line['layer_us']:.1f} us per layer"
    if line["mode"] == "memory_operations":
        report.add("gpu", "hand-over", f"by stream memory operations in a graph, {cost}", "ok")
        return
    remedy = f"stream memory operations do not work here ({line['reason']}): a newer driver may have them"
    report.add("gpu", "hand-over", f"by host functions, {cost}", "warning", remedy)


def nvidia_smi() -> str | None:
    """Names and driver version as nvidia-smi reports them, or None without a working one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no driver: the same as no GPU
    return "; ".join(done.stdout.split("\n")).strip("; ") or None
