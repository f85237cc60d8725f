"""Machine facts read from directory trees that stand for other machines."""

from pathlib import Path

import pytest

from moejet import topology


@pytest.fixture
def machine(tmp_path):
    """Writes system files: machine({"proc/meminfo": "...", ...}) -> root."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return write


def test_this_machine_is_described():
    allowed = topology.allowed_cpus()
    assert allowed
    assert set(allowed) <= set(topology.online_cpus())
    cores = topology.physical_cores(allowed)
    assert sorted(cpu for core in cores for cpu in core) == list(allowed)
    assert topology.cpu_model()
    memory = topology.memory()
    assert memory.total_bytes is not None
    assert memory.available_bytes is not None
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_nothing_is_guessed_where_nothing_can_be_read(tmp_path):
    assert topology.memory(tmp_path) == topology.Memory(None, None, None)
    assert topology.cgroup_limits(tmp_path) == topology.CgroupLimits(None, None, None, None)
    assert topology.numa_nodes(tmp_path) == ()
    assert topology.huge_page_mode(tmp_path) is None
    assert topology.last_level_cache_bytes(tmp_path) is None
    assert topology.all_caches_bytes((0,), tmp_path) is None
    assert topology.available_bytes(tmp_path) is None
    assert topology.container(tmp_path) is None
    assert topology.cpu_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), ("", ()), ("5,7-8\n", (5, 7, 8))]
)
def test_cpu_lists(text, cpus):
    assert topology.parse_cpu_list(text) == cpus


def _two_sockets(allowed: str | None) -> dict[str, str]:
    """Nodes 0 and 2 have CPUs and memory, node 1 CPUs only, node 3 memory only."""
    files = {}
    nodes = [("0-1", 100, "10 12 20 30"), ("2-3", 0, "12 10 11 30")]
    nodes += [("4-5", 100, "20 11 10 30"), ("", 200, "30 30 30 10")]
    for node, (cpus, kib, distance) in enumerate(nodes):
        directory = f"sys/devices/system/node/node{node}"
        files[f"{directory}/cpulist"] = cpus
        files[f"{directory}/distance"] = distance
        files[f"{directory}/meminfo"] = f"Node {node} MemTotal: {kib} kB"
    if allowed is not None:
        files["proc/self/status"] = f"Name:\tx\nMems_allowed_list:\t{allowed}"
    return files


@pytest.mark.parametrize(
    ("allowed", "usable", "nearest"),
    [
        (None, (0, 2, 3), (0, 0, 2, 2, 2, 2)),
        ("0-3", (0, 2, 3), (0, 0, 2, 2, 2, 2)),
        ("0", (0,), (0,) * 6),
        ("0,3", (0, 3), (0,) * 6),
        ("2-3", (2, 3), (2,) * 6),
    ],
)
def test_cpus_use_the_nearest_memory_they_may(machine, allowed, usable, nearest):
    root = machine(_two_sockets(allowed))
    assert topology.usable_memory_nodes(root) == usable
    assert topology.nearest_nodes((0, 1, 2, 3, 4, 5), root) == nearest
    assert topology.nearest_nodes((9,), root) == usable[:1]


def test_without_nodes_all_memory_is_one(tmp_path):
    assert topology.usable_memory_nodes(tmp_path) == ()
    assert topology.nearest_nodes((0, 7), tmp_path) == (0, 0)


def test_siblings_share_a_core(machine):
    files = {}
    for cpu, (package, core) in enumerate([(0, 0), (0, 1), (1, 0), (0, 0), (0, 1), (1, 0)]):
        directory = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{directory}/physical_package_id"] = str(package)
        files[f"{directory}/core_id"] = str(core)
    root = machine(files)
    assert topology.physical_cores(tuple(range(6)), root) == ((0, 3), (1, 4), (2, 5))
    # A CPU of which nothing is known counts as a core.
    assert topology.physical_cores((3, 9), root) == ((3,), (9,))


def test_numa_nodes_also_without_cpus(machine):
    root = machine(
        {
            "sys/devices/system/node/node0/cpulist": "0-1",
            "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:  2048 kB",
            "sys/devices/system/node/node10/cpulist": "",
            "sys/devices/system/node/node2/cpulist": "2",
        }
    )
    assert [(n.node, n.cpus, n.total_bytes) for n in topology.numa_nodes(root)] == [
        (0, (0, 1), 2048 * 1024),
        (2, (2,), None),
        (10, (), None),
    ]


def test_last_level_cache(machine):
    base = "sys/devices/system/cpu/cpu0/cache"
    root = machine({f"{base}/index0/size": "48K", f"{base}/index3/size": "32M"})
    assert topology.last_level_cache_bytes(root) == 32 << 20


def test_all_caches_count_each_once(machine):
    files = {}
    for cpu in range(4):
        base = f"sys/devices/system/cpu/cpu{cpu}/cache"
        files |= {f"{base}/index0/size": "48K", f"{base}/index0/level": "1"}
        files |= {f"{base}/index3/size": "32M", f"{base}/index3/level": "3"}
        files[f"{base}/index3/shared_cpu_list"] = "0-1" if cpu < 2 else "2-3"
    root = machine(files)
    assert topology.all_caches_bytes((0, 1), root) == 32 << 20
    assert topology.all_caches_bytes((0, 1, 2, 3), root) == 64 << 20
    assert topology.all_caches_bytes((9,), root) is None


def test_available_memory_is_the_tightest_limit(machine):
    files = {"proc/meminfo": "MemAvailable: 100 kB", "proc/self/cgroup": "0::/a"}
    assert topology.available_bytes(machine(files)) == 100 * 1024
    files["sys/fs/cgroup/cgroup.controllers"] = "memory"
    files |= {"sys/fs/cgroup/a/memory.max": "5000", "sys/fs/cgroup/a/memory.current": "2000"}
    assert topology.available_bytes(machine(files)) == 3000


V2 = {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/cgroup.controllers": "cpu memory"}
STAT = "anon 999\nfile 5000\n{0}inactive_file {1}\n{0}active_file {2}\nactive_file_x 7"


def group(path, limit, used, stat=None):
    files = {f"sys/fs/cgroup/{path}/memory.max": limit}
    files[f"sys/fs/cgroup/{path}/memory.current"] = used
    return files if stat is None else {**files, f"sys/fs/cgroup/{path}/memory.stat": stat}


def test_page_cache_is_available(machine):
    """A container that has read its weights once: its limit is full of their pages."""
    files = V2 | {"proc/meminfo": "MemAvailable: 100 kB"}
    files |= group("a/b", "10000", "9900", STAT.format("", 6000, 3000))
    assert topology.available_bytes(machine(files)) == 10000 - 900
    # The machine itself may have less.
    assert topology.available_bytes(machine(files | {"proc/meminfo": "MemAvailable: 8 kB"})) == 8192


def test_page_cache_without_counters_or_beyond_the_usage(machine):
    files = V2 | group("a/b", "10000", "9900")
    assert topology.available_bytes(machine(files)) == 100
    # Counters are read one after the other, and are batched: never more than the limit.
    files |= group("a/b", "10000", "9900", STAT.format("", 9000, 3000))
    assert topology.available_bytes(machine(files)) == 10000
    files |= group("a/b", "10000", "12000", "inactive_file many\nactive_file")
    assert topology.available_bytes(machine(files)) == 0


def test_the_group_with_the_least_left_decides_not_the_smallest_limit(machine):
    files = V2 | group("a/b", "10000", "4000", STAT.format("", 3000, 0))
    files |= group("a", "50000", "48000", STAT.format("", 0, 1000))
    files |= group(".", "max", "99999")
    root = machine(files)
    assert topology.available_bytes(root) == 3000
    assert topology.cgroup_limits(root) == topology.CgroupLimits(2, None, 10000, 3000)


def test_page_cache_in_cgroup_1(machine):
    memory = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "4:memory:/jobs/one",
        f"{memory}/jobs/one/memory.limit_in_bytes": "9223372036854771712",
        f"{memory}/jobs/one/memory.usage_in_bytes": "100",
        f"{memory}/jobs/memory.limit_in_bytes": "10000",
        f"{memory}/jobs/memory.usage_in_bytes": "9000",
        # Without "total_": this group alone, not those below it.
        f"{memory}/jobs/memory.stat": STAT.format("", 1, 1)
        + "\n"
        + STAT.format("total_", 5000, 500),
        f"{memory}/memory.limit_in_bytes": "20000",
        f"{memory}/memory.usage_in_bytes": "19000",
        f"{memory}/memory.stat": STAT.format("total_", 0, 4000),
    }
    root = machine(files)
    assert topology.available_bytes(root) == 20000 - 15000
    assert topology.cgroup_limits(root) == topology.CgroupLimits(1, None, 10000, 5000)


def test_huge_pages(machine):
    root = machine({"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never"})
    assert topology.huge_page_mode(root) == "madvise"


def test_cgroup_2_takes_the_tightest_limit_on_the_way_up(machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory",
            "sys/fs/cgroup/a/cpu.max": "150000 100000",
            "sys/fs/cgroup/a/memory.max": "1000",
            "sys/fs/cgroup/a/memory.current": "400",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/b/memory.max": "max",
        }
    )
    assert topology.cgroup_limits(root) == topology.CgroupLimits(2, 1.5, 1000, 600)


def test_cgroup_2_in_a_container_sees_its_own_group_at_the_mount(machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/../../host/path",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory",
            "sys/fs/cgroup/cpu.max": "50000 100000",
        }
    )
    assert topology.cgroup_limits(root) == topology.CgroupLimits(2, 0.5, None, None)


def test_cgroup_1(machine):
    root = machine(
        {
            "proc/self/cgroup": "5:cpuacct,cpu:/jobs\n4:memory:/jobs\n0::/",
            "sys/fs/cgroup/cpu/jobs/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu/jobs/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2048",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1024",
        }
    )
    assert topology.cgroup_limits(root) == topology.CgroupLimits(1, 4.0, 2048, 1024)


def test_containers_are_recognised(machine):
    assert topology.container(machine({"run/.containerenv": ""})) == "podman"
    assert topology.container(machine({".dockerenv": ""})) == "docker"
