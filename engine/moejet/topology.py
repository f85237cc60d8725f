"""What the machine offers this process: CPUs, memory, NUMA nodes, huge pages, container limits.

Everything is read from /proc and /sys on every call, so that a changed affinity mask or cgroup
limit is seen at once. Each function takes `root`, the directory that stands for "/", which lets
tests describe machines they do not run on. Facts that cannot be read are None, never a guess.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# Kernels write "no limit" in cgroup v1 as the largest page-aligned signed 64-bit number.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One memory node: its number, its CPUs and its installed memory."""

    node: int
    cpus: tuple[int, ...]
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """Limits of the control groups around this process; None means that there is no limit.

    cpu_quota is in CPUs (1.5 = one and a half), memory_limit_bytes is the smallest limit on the
    way up and memory_available_bytes the least that any group on the way up may still take: its
    limit less what it uses, where cached files do not count because they make room.
    version is 1, 2 or None (no cgroups).
    """

    version: int | None
    cpu_quota: float | None
    memory_limit_bytes: int | None
    memory_available_bytes: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Machine memory in bytes, from /proc/meminfo; None where the kernel does not say."""

    total_bytes: int | None
    available_bytes: int | None
    swap_total_bytes: int | None


def read_text(path: Path) -> str | None:
    """The stripped content of a small system file, or None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The CPUs named by a kernel list such as "0-3,8"."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def cpu_model(root: Path = ROOT) -> str:
    """The processor's name as the kernel gives it, or the architecture if it gives none."""
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.machine()


def online_cpus(root: Path = ROOT) -> tuple[int, ...]:
    """The logical CPUs that are switched on."""
    text = read_text(root / "sys/devices/system/cpu/online")
    return parse_cpu_list(text) if text else tuple(range(os.cpu_count() or 1))


def allowed_cpus() -> tuple[int, ...]:
    """The logical CPUs that this process may use, by its affinity mask (cpusets included)."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def physical_cores(cpus: tuple[int, ...], root: Path = ROOT) -> tuple[tuple[int, ...], ...]:
    """The given CPUs grouped by physical core; a CPU without topology is a core of its own."""
    cores: dict[tuple[str, ...], list[int]] = {}
    for cpu in cpus:
        directory = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        package, core = (read_text(directory / n) for n in ("physical_package_id", "core_id"))
        key = ("alone", str(cpu)) if package is None or core is None else (package, core)
        cores.setdefault(key, []).append(cpu)
    return tuple(tuple(group) for group in cores.values())


def last_level_cache_bytes(root: Path = ROOT) -> int | None:
    """Size of the largest cache that CPU 0 sees (one instance, not the sum over sockets)."""
    indices = (root / "sys/devices/system/cpu/cpu0/cache").glob("index*")
    return max((s for s in map(_cache_size, indices) if s is not None), default=None)


def all_caches_bytes(cpus: tuple[int, ...], root: Path = ROOT) -> int | None:
    """Size of all last-level caches that the given CPUs reach, each counted once."""
    found: dict[tuple[int, str], int] = {}
    for cpu in cpus:
        for index in (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            size = _cache_size(index)
            shared = read_text(index / "shared_cpu_list") or str(cpu)
            if size is not None:
                found[_number(index / "level") or 0, shared] = size
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def _cache_size(index: Path) -> int | None:
    text = read_text(index / "size") or ""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit if text.rstrip("KMG").isdigit() else None


def numa_nodes(root: Path = ROOT) -> tuple[NumaNode, ...]:
    """The NUMA nodes that have CPUs or memory; empty if the kernel does not list any."""
    nodes = []
    for directory in (root / "sys/devices/system/node").glob("node[0-9]*"):
        total = None
        for line in (read_text(directory / "meminfo") or "").splitlines():
            words = line.split()
            if "MemTotal:" in words:
                total = int(words[words.index("MemTotal:") + 1]) * 1024
        cpus = parse_cpu_list(read_text(directory / "cpulist") or "")
        nodes.append(NumaNode(int(directory.name[4:]), cpus, total))
    return tuple(sorted(nodes, key=lambda node: node.node))


def usable_memory_nodes(root: Path = ROOT) -> tuple[int, ...]:
    """The nodes with memory that this process may allocate from (cpuset.mems of its control group)."""
    installed = [n.node for n in numa_nodes(root) if n.total_bytes]
    for line in (read_text(root / "proc/self/status") or "").splitlines():
        key, _, value = line.partition(":")
        if key == "Mems_allowed_list":
            return tuple(n for n in installed if n in parse_cpu_list(value))
    return tuple(installed)


def nearest_nodes(cpus: tuple[int, ...], root: Path = ROOT) -> tuple[int, ...]:
    """For each CPU the nearest node whose memory this process may use; 0 where nothing is known."""
    nodes, usable = numa_nodes(root), usable_memory_nodes(root)
    if not usable:
        return (0,) * len(cpus)
    nearest: dict[int, int] = {}
    for node in nodes:
        text = read_text(root / f"sys/devices/system/node/node{node.node}/distance") or ""
        # One distance per node that is switched on, in the order of their numbers.
        distances = {n.node: int(d) for n, d in zip(nodes, text.split(), strict=False)}
        distances[node.node] = 0
        best = min(usable, key=lambda n: distances.get(n, 1 << 30))
        nearest.update(dict.fromkeys(node.cpus, best))
    return tuple(nearest.get(cpu, usable[0]) for cpu in cpus)


def memory(root: Path = ROOT) -> Memory:
    """Installed, available and swap memory of the machine."""
    kib: dict[str, int] = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        if value.split() and value.split()[0].isdigit():
            kib[key] = int(value.split()[0])

    def to_bytes(key: str) -> int | None:
        return kib[key] * 1024 if key in kib else None

    return Memory(to_bytes("MemTotal"), to_bytes("MemAvailable"), to_bytes("SwapTotal"))


def available_bytes(root: Path = ROOT) -> int | None:
    """Memory that this process may still take: of the machine, or less if a control group limits it."""
    candidates = (memory(root).available_bytes, cgroup_limits(root).memory_available_bytes)
    known = [c for c in candidates if c is not None]
    return min(known) if known else None


def huge_page_mode(root: Path = ROOT) -> str | None:
    """Transparent huge pages: "always", "madvise", "never", or None if the kernel has none."""
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    if not text or "[" not in text:
        return None
    return text.partition("[")[2].partition("]")[0]


def container(root: Path = ROOT) -> str | None:
    """The container runtime around this process as far as it leaves a mark, or None."""
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / "var/run/secrets/kubernetes.io").exists():
        return "kubernetes"
    return read_text(root / "run/systemd/container") or None


def cgroup_limits(root: Path = ROOT) -> CgroupLimits:
    """CPU quota and memory limit of this process's control groups (versions 1 and 2)."""
    paths: dict[str, str] = {}
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    mount = root / "sys/fs/cgroup"
    if (mount / "cgroup.controllers").exists():
        return _limits_v2(_ancestors(mount, paths.get("", "/")))
    memory_dirs = _ancestors(mount / "memory", paths.get("memory", "/"))
    cpu_dirs = _ancestors(mount / "cpu", paths.get("cpu", "/"))
    if not memory_dirs and not cpu_dirs:
        return CgroupLimits(None, None, None, None)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    limit, available = _memory_limits(memory_dirs, *names)
    quotas = []
    for directory in cpu_dirs:
        quota = _number(directory / "cpu.cfs_quota_us")
        period = _number(directory / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return CgroupLimits(1, min(quotas, default=None), limit, available)


def _limits_v2(directories: list[Path]) -> CgroupLimits:
    limit, available = _memory_limits(directories, "memory.max", "memory.current")
    quotas = []
    for directory in directories:
        words = (read_text(directory / "cpu.max") or "").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return CgroupLimits(2, min(quotas, default=None), limit, available)


def _ancestors(mount: Path, path: str) -> list[Path]:
    """The group's directory and all above it up to the mount, those that exist.

    Inside a container the path may be the host's, which is not mounted: the mount itself is then
    the container's own group.
    """
    directory = mount / path.lstrip("/")
    chain = [directory, *directory.parents]
    return [d for d in chain[: chain.index(mount) + 1] if d.is_dir()]


def _memory_limits(
    directories: list[Path], limit_name: str, used_name: str, prefix: str = ""
) -> tuple[int | None, int | None]:
    """(smallest limit, the least that a group has left) of a chain of groups.

    prefix: of the counters in memory.stat that include the groups below.
    """
    limits: list[int] = []
    left: list[int] = []
    for directory in directories:
        limit, used = _number(directory / limit_name), _number(directory / used_name)
        if limit is None or limit >= _UNLIMITED_BYTES:
            continue
        limits.append(limit)
        # Pages of files that nobody locked; the kernel drops them before it refuses memory.
        cached = _file_bytes(directory / "memory.stat", prefix)
        left.append(max(0, limit - max(0, (used or 0) - cached)))
    return min(limits, default=None), min(left, default=None)


def _file_bytes(stat: Path, prefix: str) -> int:
    """Page cache that a group can give back: both lists of pages of files, without tmpfs's."""
    wanted = (f"{prefix}inactive_file", f"{prefix}active_file")
    words = (line.split() for line in (read_text(stat) or "").splitlines())
    return sum(int(w[1]) for w in words if len(w) == 2 and w[0] in wanted and w[1].isdigit())


def _number(path: Path) -> int | None:
    text = read_text(path) or ""
    return int(text) if text.lstrip("-").isdigit() else None
