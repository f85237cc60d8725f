"""The checks of `moejet doctor`, one function per section of its report."""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import moejet
from moejet import topology
from moejet.cli.check_gpu import check_gpu
from moejet.cli.selftest import TOLERANCE, lines_of
from moejet.environment import env_max_isa, env_num_threads, use_reference

Status = Literal["ok", "info", "warning", "error"]

SELFTEST = ("-m", "moejet.cli.selftest")
_REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub")
_OPTIONAL = ("triton", "transformers")
_REINSTALL = (
    "install moejet again: pip install --force-reinstall --no-deps, and the wheel or its sources"
)
_GIB = 1 << 30


@dataclass(slots=True)
class Check:
    """One line of the report; `remedy` says what to do where `status` is not ok or info."""

    section: str
    name: str
    value: str
    status: Status = "info"
    remedy: str = ""


@dataclass(slots=True)
class Report:
    """All lines, and the same facts as data for --json."""

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(
        self, section: str, name: str, value: str, status: Status = "info", remedy: str = ""
    ) -> None:
        """Append one line."""
        self.checks.append(Check(section, name, value, status, remedy))

    @property
    def usable(self) -> bool:
        """False if something prevents moejet from running."""
        return all(check.status != "error" for check in self.checks)


def examine(root: Path = topology.ROOT) -> Report:
    """Look at everything. `root` stands for "/" where system files are read."""
    report = Report()
    sections: tuple[Callable[[Report, Path], None], ...] = (
        _check_software,
        _check_cpu,
        _check_memory,
        _check_kernels,
        check_gpu,
        _check_disk,
        _check_environment,
    )
    for check in sections:
        check(report, root)
    return report


def _check_software(report: Report, root: Path) -> None:
    name = "software"
    report.add(name, "moejet", moejet.__version__)
    python = platform.python_version()
    report.add(name, "python", f"{python} ({sys.executable})")
    versions: dict[str, str | None] = {"moejet": moejet.__version__, "python": python}
    for package in _REQUIRED:
        versions[package] = _check_package(report, package)
    for package in _OPTIONAL:
        versions[package] = _installed_version(package)
        report.add(name, package, versions[package] or "not installed (optional)")
    libc = " ".join(part for part in platform.libc_ver() if part) or "unknown"
    report.add(name, "kernel", f"{platform.system()} {platform.release()}")
    report.add(name, "libc", libc)
    versions |= {"kernel": platform.release(), "libc": libc}
    report.facts["versions"] = versions
    embedded = Path(moejet.__file__).parent / "assets" / "tiny_reasoner" / "model.safetensors"
    if embedded.is_file():
        report.add(name, "tiny-reasoner", f"{embedded.stat().st_size / 2**20:.1f} MiB, embedded")
    else:
        report.add(name, "tiny-reasoner", f"{embedded} is missing", "error", _REINSTALL)
    if platform.system() != "Linux":
        report.add(
            name,
            "system",
            platform.system(),
            "error",
            "moejet runs on Linux; on Windows use WSL 2",
        )


def _check_package(report: Report, package: str) -> str | None:
    """Import a required package: an installed one may still be broken."""
    try:
        import_module(package)
    except Exception as error:  # a broken package may raise anything; the report names it
        reason = f"{type(error).__name__}: {_first_line(error)}"
        remedy = f"install it again: python -m pip install --force-reinstall {package}"
        report.add("software", package, f"cannot be imported ({reason})", "error", remedy)
        return None
    version = _installed_version(package)
    report.add("software", package, version or "unknown version")
    return version


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _check_cpu(report: Report, root: Path) -> None:
    name = "cpu"
    online = topology.online_cpus(root)
    allowed = topology.allowed_cpus()
    cores = topology.physical_cores(online, root)
    allowed_cores = topology.physical_cores(allowed, root)
    limits = topology.cgroup_limits(root)
    nodes = topology.numa_nodes(root)
    report.add(name, "model", topology.cpu_model(root))
    report.add(name, "cores", f"{len(cores)} physical, {len(online)} logical")
    status: Status = "ok"
    remedy = ""
    if len(allowed_cores) < len(cores):
        status = "info"
        remedy = "the affinity mask or cpuset leaves out the other cores"
    report.add(
        name,
        "allowed",
        f"{len(allowed_cores)} physical, {len(allowed)} logical",
        status,
        remedy,
    )
    if limits.cpu_quota is None:
        report.add(name, "quota", "none")
    elif limits.cpu_quota < 1:
        report.add(
            name,
            "quota",
            f"{limits.cpu_quota:g} CPUs (cgroup)",
            "warning",
            "less than one CPU: threads are paused all the time; raise the container's CPU limit",
        )
    else:
        report.add(name, "quota", f"{limits.cpu_quota:g} CPUs (cgroup)")
    workers = _default_threads()
    if workers is not None:
        report.add(name, "threads", f"{workers} by default")
    shown = ", ".join(f"node {n.node}: {len(n.cpus)} CPUs, {_gib(n.total_bytes)}" for n in nodes)
    report.add(name, "numa", shown or "one node")
    cache = topology.last_level_cache_bytes(root)
    report.add(name, "cache", "unknown" if cache is None else f"{cache / 2**20:.0f} MiB last level")
    report.facts["cpu"] = {
        "model": topology.cpu_model(root),
        "architecture": platform.machine(),
        "physical_cores": len(cores),
        "logical_cpus": len(online),
        "allowed_physical_cores": len(allowed_cores),
        "allowed_logical_cpus": len(allowed),
        "cgroup_quota_cpus": limits.cpu_quota,
        "default_threads": workers,
        "last_level_cache_bytes": cache,
        "numa_nodes": [asdict(node) for node in nodes],
    }


def _default_threads() -> int | None:
    try:
        from moejet.experts.cpu_experts import available_cpus
    except ImportError:
        return None  # needs torch, whose absence is already reported
    return len(available_cpus())


def _check_memory(report: Report, root: Path) -> None:
    name = "memory"
    memory = topology.memory(root)
    limits = topology.cgroup_limits(root)
    report.add(name, "total", _gib(memory.total_bytes))
    usable = topology.available_bytes(root)
    if usable is not None and usable < 2 * _GIB:
        remedy = "less than 2 GiB: only very small models fit; end other programs or add memory"
        report.add(name, "available", _gib(usable), "warning", remedy)
    else:
        report.add(name, "available", _gib(usable), "ok")
    limit = "none" if limits.memory_limit_bytes is None else _gib(limits.memory_limit_bytes)
    report.add(name, "cgroup limit", limit)
    mode = topology.huge_page_mode(root)
    if mode in ("always", "madvise"):
        report.add(name, "huge pages", f"transparent, {mode}", "ok")
    else:
        report.add(
            name,
            "huge pages",
            mode or "not offered by this kernel",
            "warning",
            "weights are read through 4 KiB pages, which costs speed: "
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    runtime = topology.container(root)
    report.add(name, "container", runtime or "none found")
    report.facts["memory"] = {
        "total_bytes": memory.total_bytes,
        "available_bytes": usable,
        "swap_bytes": memory.swap_total_bytes,
        "cgroup_limit_bytes": limits.memory_limit_bytes,
        "cgroup_version": limits.version,
        "transparent_huge_pages": mode,
        "container": runtime,
    }


def _check_kernels(report: Report, root: Path) -> None:
    """Run the extension in a process of its own and read how far it came."""
    lines, problem = run_selftest()
    facts: dict[str, Any] = {"isas": {}, "selftest": []}
    report.facts["kernels"] = facts
    running = "loading moejet._C"
    for line in lines:
        if "cpu_info" in line:
            facts |= line["cpu_info"]
        elif "start" in line:
            running = "{} with {} weights".format(*line["start"])
        elif "done" in line:
            facts["selftest"].append(line)
    name = "kernels"
    wrong: dict[str, str] = {}
    for line in facts["selftest"]:
        # A result that is not a number comes as null.
        if line["error"] is None or line["error"] > TOLERANCE:
            shown = "not a number" if line["error"] is None else f"off by {line['error']:.2g}"
            wrong[line["done"][0]] = f"wrong results with {line['done'][1]} weights ({shown})"
    for isa, state in facts["isas"].items():
        if not state["usable"]:
            report.add(name, isa, f"not usable: {state['reason']}")
        elif isa in wrong:
            remedy = f"{_REINSTALL}; if it stays, report it with this output"
            report.add(name, isa, wrong[isa], "error", remedy)
        else:
            shown = "usable (in tests only)" if isa == "amx_emulated" else "usable"
            report.add(name, isa, shown, "ok")
    if facts["isas"]:
        permission = "granted" if facts.get("amx_permission") else "not granted"
        report.add(name, "AMX permission", permission)
        usable = {isa for isa, state in facts["isas"].items() if state["usable"]}
        if platform.machine() in ("x86_64", "AMD64") and not {"avx2", "avx512"} & usable:
            remedy = "without AVX2 the plain C++ kernels run, which are very slow"
            report.add(name, "vector units", "no AVX2", "warning", remedy)
    if problem:
        report.add(name, "self-test", f"failed at {running}: {problem}", "error", _REINSTALL)
    elif not wrong:
        report.add(name, "self-test", f"{len(facts['selftest'])} kernels agree with float64", "ok")


def run_selftest() -> tuple[list[dict[str, Any]], str]:
    """The JSON lines of the self-test and what went wrong ("" if nothing did)."""
    return lines_of(SELFTEST)


def _check_disk(report: Report, root: Path) -> None:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return  # already reported as a missing package
    directory = Path(HF_HUB_CACHE)
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free_bytes = shutil.disk_usage(existing).free
    report.facts["disk"] = {"cache_directory": str(directory), "free_bytes": free_bytes}
    value = f"{directory}: {_gib(free_bytes)} free"
    if not os.access(existing, os.W_OK):
        remedy = "not writable: set HF_HOME to a directory that is"
        report.add("disk", "model cache", value, "warning", remedy)
    elif free_bytes < 10 * _GIB:
        remedy = "little room for downloads: free some, or set HF_HOME to a larger disk"
        report.add("disk", "model cache", value, "warning", remedy)
    else:
        report.add("disk", "model cache", value, "ok")


def _check_environment(report: Report, root: Path) -> None:
    settings: dict[str, Any] = {}
    readers: dict[str, Callable[[], Any]] = {
        "MOEJET_MAX_ISA": env_max_isa,
        "MOEJET_NUM_THREADS": env_num_threads,
        "MOEJET_REF": use_reference,
    }
    for variable, read in readers.items():
        try:
            settings[variable] = read()
        except ValueError as error:
            report.add("settings", variable, str(error), "error", f"unset {variable}")
            continue
        if settings[variable]:
            report.add("settings", variable, str(settings[variable]))
    report.facts["settings"] = settings


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / _GIB:.1f} GiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
