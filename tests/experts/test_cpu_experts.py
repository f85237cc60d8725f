"""CpuExperts and the choice of worker CPUs."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from moejet import topology
from moejet.experts import cpu_experts
from moejet.experts.cpu_experts import CpuExperts, available_cpus, create_pool, divide_among_nodes
from moejet.extension import load_extension
from moejet.ops.experts import moe_experts_ref

SIZES = (6, 96, 80)  # experts, hidden, intermediate


def make_experts(format: str) -> CpuExperts:
    experts = CpuExperts(*SIZES, format=format, pool=create_pool(1))
    generator = torch.Generator().manual_seed(0)
    for e in range(6):
        for name, shape in (("gate", (80, 96)), ("up", (80, 96)), ("down", (96, 80))):
            w = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            experts.set_projection(e, name, w.bfloat16())
    return experts


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 96, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(10)])
    ids[2, 1] = -1
    return x, ids, torch.rand(10, 2, generator=generator)


@pytest.mark.parametrize("format", ["int4_g32", "int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_the_reference(format: str, dtype: torch.dtype) -> None:
    experts = make_experts(format)
    x, ids, mix = inputs(dtype)
    result = experts.forward(x, ids, mix)
    reference = moe_experts_ref(x, ids, mix, experts.dequantize)
    assert result.dtype == reference.dtype == dtype
    assert (result - reference).norm() / reference.norm() < 0.02


def test_reference_mode_swaps_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts("int8")
    x, ids, mix = inputs(torch.float32)
    monkeypatch.setenv("MOEJET_REF", "1")
    monkeypatch.setattr(experts, "run_kernels", None)
    assert torch.equal(
        experts.forward(x, ids, mix), moe_experts_ref(x, ids, mix, experts.dequantize)
    )


def test_reference_is_the_formula() -> None:
    experts = make_experts("bf16")
    x, ids, mix = inputs(torch.float32)
    expected = torch.zeros(10, 96, dtype=torch.float64)
    for t in range(10):
        for k in range(2):
            if ids[t, k] >= 0:
                gate, up, down = (w.double() for w in experts.dequantize(int(ids[t, k])))
                g, u = gate @ x[t].double(), up @ x[t].double()
                expected[t] += mix[t, k].double() * (down @ (g * torch.sigmoid(g) * u))
    torch.testing.assert_close(moe_experts_ref(x, ids, mix, experts.dequantize), expected.float())


def test_isa_obeys_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEJET_MAX_ISA", "scalar")
    pool = create_pool(1)
    assert CpuExperts(*SIZES, format="int8", pool=pool).isa == "scalar"
    with pytest.raises(ValueError, match="above max_isa"):
        CpuExperts(*SIZES, format="int8", pool=pool, isa="avx2")


def test_sizes_and_random_fill() -> None:
    experts = CpuExperts(*SIZES, format="int4_g32", pool=create_pool(1))
    assert experts.nbytes >= 6 * 3 * 96 * 80 * 9 // 16
    assert experts.format == "int4_g32"
    experts.fill_random(3)
    assert experts.dequantize(5)[0].std() > 0


def test_available_cpus_are_one_per_core_within_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(quota: float | None) -> None:
        cores = ((0, 4), (1, 5), (2, 6), (3, 7))
        monkeypatch.setattr(topology, "allowed_cpus", lambda: tuple(range(8)))
        monkeypatch.setattr(topology, "physical_cores", lambda cpus: cores)
        limits = topology.CgroupLimits(2, quota, None, None)
        monkeypatch.setattr(topology, "cgroup_limits", lambda: limits)

    for quota, expected in ((None, (0, 1, 2, 3)), (2.5, (0, 1)), (0.5, (0,)), (64.0, (0, 1, 2, 3))):
        pretend(quota)
        assert available_cpus() == expected


def test_create_pool_takes_second_threads_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class FakeExtension:
        @staticmethod
        def ThreadPool(
            cpus: list[int], pin: bool, worker_nodes: list[int], memory_nodes: list[int]
        ) -> list[int]:
            assert worker_nodes == [0] * len(cpus)
            assert memory_nodes == [-1]
            return cpus

    monkeypatch.setattr(topology, "nearest_nodes", lambda cpus: (0,) * len(cpus))
    monkeypatch.delenv("MOEJET_NUMA_NODES", raising=False)
    monkeypatch.setattr(cpu_experts, "load_extension", lambda: FakeExtension)
    monkeypatch.setattr(topology, "allowed_cpus", lambda: (0, 1, 2, 3))
    monkeypatch.setattr(topology, "physical_cores", lambda cpus: ((0, 2), (1, 3)))
    monkeypatch.setattr(
        topology, "cgroup_limits", lambda: topology.CgroupLimits(None, None, None, None)
    )
    monkeypatch.delenv("MOEJET_NUM_THREADS", raising=False)
    assert create_pool() == [0, 1]
    assert create_pool(1) == [0]
    with caplog.at_level(logging.WARNING):
        assert create_pool(3) == [0, 1, 2]
    assert "more than the 2 cores" in caplog.text
    monkeypatch.setenv("MOEJET_NUM_THREADS", "4")
    assert create_pool() == [0, 1, 2, 3]
    for bad in (0, 5):
        with pytest.raises(ValueError, match=f"num_threads={bad} must be between 1 and 4"):
            create_pool(bad)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CPUs 0 to 3 on memory node 2 and 4 to 7 on node 5."""
    monkeypatch.setattr(topology, "allowed_cpus", lambda: tuple(range(8)))
    monkeypatch.setattr(topology, "physical_cores", lambda cpus: tuple((cpu,) for cpu in cpus))
    monkeypatch.setattr(topology, "nearest_nodes", lambda cpus: tuple(2 + c // 4 * 3 for c in cpus))
    monkeypatch.delenv("MOEJET_NUMA_NODES", raising=False)
    monkeypatch.delenv("MOEJET_NUM_THREADS", raising=False)


@pytest.mark.usefixtures("two_nodes")
def test_few_workers_use_the_memory_of_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for quota, expected in ((None, tuple(range(8))), (4.0, (0, 1, 4, 5)), (1.0, (0,))):
        limits = topology.CgroupLimits(2, quota, None, None)
        monkeypatch.setattr(topology, "cgroup_limits", lambda limits=limits: limits)
        assert available_cpus() == expected


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize(
    ("wanted", "cpus", "worker_nodes", "memory_nodes"),
    [
        (None, (0, 1, 4, 5), [0, 0, 1, 1], [2, 5]),
        (None, (4, 0, 5), [1, 0, 1], [2, 5]),
        (None, (4, 5), [0, 0], [-1]),
        ("2", (0, 1, 4, 5), [0, 0, 1, 1], [2, 5]),
        ("2", (0, 1), [0, 1], [-1, -1]),
        ("1", (0, 1, 4, 5), [0, 0, 0, 0], [-1]),
        ("3", (0, 1), [0, 1], [-1, -1, -1]),
        ("2", (0, 1, 2), [0, 0, 1], [-1, -1]),
    ],
)
def test_workers_and_weights_are_divided_among_nodes(
    wanted: str | None,
    cpus: tuple[int, ...],
    worker_nodes: list[int],
    memory_nodes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if wanted is not None:
        monkeypatch.setenv("MOEJET_NUMA_NODES", wanted)
    assert divide_among_nodes(cpus) == (worker_nodes, memory_nodes)


def test_bad_number_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("0", "two", "65"):
        monkeypatch.setenv("MOEJET_NUMA_NODES", bad)
        with pytest.raises(ValueError, match=f"MOEJET_NUMA_NODES='{bad}'"):
            create_pool(1)


def test_forced_nodes_reach_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids, mix = inputs(torch.float32)
    expected = make_experts("int4_g32").forward(x, ids, mix)
    monkeypatch.setenv("MOEJET_NUMA_NODES", "2")
    experts = make_experts("int4_g32")
    assert experts.pool.memory_nodes == [-1, -1]
    assert torch.equal(experts.forward(x, ids, mix), expected)


def test_real_pool_stays_within_the_affinity_mask() -> None:
    pool = create_pool()
    assert set(available_cpus()) <= os.sched_getaffinity(0)
    assert pool.num_threads <= len(os.sched_getaffinity(0))
    pool.close()


def test_workers_keep_to_a_narrowed_affinity_mask() -> None:
    # As taskset or a container's cpuset would start us: only the last CPU.
    program = """
import os
os.environ.pop("MOEJET_NUM_THREADS", None)
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
from moejet.experts.cpu_experts import available_cpus, create_pool
from moejet.extension import load_extension
(cpu,) = os.sched_getaffinity(0)
assert available_cpus() == (cpu,)
pool = create_pool()
assert pool.num_threads == 1 and pool.probe() == [cpu]
try:
    load_extension().ThreadPool([cpu + 1, cpu])
except ValueError as error:
    assert "may not run on CPU" in str(error), error
else:
    raise AssertionError("a CPU outside the mask was accepted")
try:
    create_pool(2)
except ValueError as error:
    assert "num_threads=2 must be between 1 and 1" in str(error), error
else:
    raise AssertionError("more workers than CPUs were accepted")
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_missing_extension_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moejet._C", None)
    monkeypatch.delattr("moejet._C", raising=False)
    with pytest.raises(ImportError, match="install a wheel for this Python"):
        load_extension()


def test_random_weights_of_some_experts_only():
    pool = create_pool(1, pin=False)
    whole, part = (CpuExperts(5, 64, 96, format="int4_g32", pool=pool) for _ in range(2))
    whole.fill_random(3)
    part.fill_random(3, [1, 4])
    for expert in range(5):
        for a, b in zip(whole.dequantize(expert), part.dequantize(expert), strict=True):
            assert torch.equal(b, a if expert in (1, 4) else torch.zeros_like(a))
    with pytest.raises(ValueError, match="5"):
        part.fill_random(3, [5])
    pool.close()
