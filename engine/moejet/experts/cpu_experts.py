"""Routed experts of one layer in packed form on the CPU, and the thread pool that computes them.

This is the only user of the extension's MoE kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor, from_numpy

from moejet import topology
from moejet.environment import env_num_threads, env_numa_nodes, use_reference
from moejet.extension import load_extension, report_placement, resolve_isa
from moejet.ops.experts import moe_experts_ref
from moejet.ops.linear import fp8_bytes, packing_arguments
from moejet.weights.packed_layout import PackedLayout
from moejet.weights.stored import StoredWeight

if TYPE_CHECKING:
    from moejet._C import ThreadPool

logger = logging.getLogger(__name__)


def available_cpus() -> tuple[int, ...]:
    """CPUs for workers: one per physical core that the affinity mask allows, cut to the CPU quota.

    Two threads on one core share its vector units and its cache, so the kernels gain nothing from
    the second one. A quota takes CPUs of all memory nodes alike.
    """
    cores = topology.physical_cores(topology.allowed_cpus())
    quota = topology.cgroup_limits().cpu_quota
    count = len(cores) if quota is None else max(1, min(len(cores), int(quota)))
    firsts = [core[0] for core in cores]
    return tuple(sorted(_nodes_in_turn(firsts)[:count], key=firsts.index))


def _nodes_in_turn(cpus: Iterable[int]) -> list[int]:
    """The CPUs reordered so that the first of them use the memory of as many nodes as possible."""
    by_node: dict[int, list[int]] = {}
    cpus = tuple(cpus)
    for cpu, node in zip(cpus, topology.nearest_nodes(cpus), strict=True):
        by_node.setdefault(node, []).append(cpu)
    turns = zip_longest(*by_node.values())
    return [cpu for turn in turns for cpu in turn if cpu is not None]


def divide_among_nodes(cpus: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """(worker_nodes, memory_nodes) of a pool on these CPUs; MOEJET_NUMA_NODES overrules the machine.

    memory_nodes are the nodes nearest to the workers, or [-1] if there is only one: then memory
    needs no placing.
    """
    nearest = topology.nearest_nodes(cpus)
    nodes = sorted(set(nearest))
    wanted = env_numa_nodes() or len(nodes)
    if wanted != len(nodes):
        return [i * wanted // len(cpus) for i in range(len(cpus))], [-1] * wanted
    return [nodes.index(node) for node in nearest], nodes if len(nodes) > 1 else [-1]


def create_pool(num_threads: int | None = None, *, pin: bool = True) -> ThreadPool:
    """A pool of workers, each pinned to a CPU.

    num_threads: None takes MOEJET_NUM_THREADS, or else one worker per `available_cpus()`. More
    than those are allowed up to the number of logical CPUs in the affinity mask; beyond that
    ValueError.
    """
    if num_threads is None:
        num_threads = env_num_threads()
    cpus = available_cpus()
    if num_threads is not None:
        cores = topology.physical_cores(topology.allowed_cpus())
        # First one CPU of every core, nodes in turn, then the second ones, and so on.
        depth = max(len(core) for core in cores)
        ranks = [[core[i] for core in cores if i < len(core)] for i in range(depth)]
        ordered = [cpu for rank in ranks for cpu in _nodes_in_turn(rank)]
        if not 1 <= num_threads <= len(ordered):
            raise ValueError(
                f"num_threads={num_threads} must be between 1 and {len(ordered)}, the CPUs that "
                "this process may use: lower it, or widen the affinity mask"
            )
        if num_threads > len(cpus):
            logger.warning(
                "num_threads=%d is more than the %d cores available: workers will share cores",
                num_threads,
                len(cpus),
            )
        cpus = tuple(ordered[:num_threads])
    pool: ThreadPool = load_extension().ThreadPool(list(cpus), pin, *divide_among_nodes(cpus))
    return pool


class CpuExperts:
    """The routed experts of one layer, E experts of inner size I over hidden size D."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        format: str,
        pool: ThreadPool,
        isa: str = "auto",
        arithmetic: str = "bf16",
        down_format: str | None = None,
    ) -> None:
        """Reserves memory for all experts; it becomes resident when weights are set.

        format: one of `config.EXPERT_FORMATS` or `config.GGUF_FORMATS`. isa: "auto" (the widest
        usable one, at most MOEJET_MAX_ISA) or a name; a name that cannot run here raises
        ValueError. Too little address space raises MemoryError. arithmetic: what AMX tiles multiply
        int4_g32 and int8 in,
        "bf16" or "int8", where activations share a scale per 128 inputs and int4 weights are
        requantised to int8: faster, at an error of 1.6 % (int8) to 2 % (int4_g32) of a layer
        instead of 0.4 %. Elsewhere integer formats take int8 activations whatever it says.
        down_format: that of the down projections (default: the same); both must be of bf16, fp8,
        fp32, or both of the others.
        """
        self._C = load_extension()
        self.isa = resolve_isa(isa)
        self.pool = pool
        self.weights = self._C.ExpertWeights(
            num_experts,
            hidden_size,
            intermediate_size,
            format,
            pool.memory_nodes,
            arithmetic,
            down_format,
        )
        report_placement(self.weights)

    @property
    def nbytes(self) -> int:
        """Size of the packed weights, padding included."""
        return int(self.weights.nbytes)

    @property
    def format(self) -> str:
        """Of the gate and up projections."""
        return str(self.weights.format)

    @property
    def arithmetic(self) -> str:
        return str(self.weights.arithmetic)

    @property
    def down_format(self) -> str:
        return str(self.weights.down_format)

    def set_projection(
        self,
        expert: int,
        projection: str,
        w: Tensor,
        scale_inv: Tensor | None = None,
        *,
        source_format: str | None = None,
    ) -> None:
        """Quantises and packs one matrix: gate or up [I, D], down [D, I]; fp32, bf16, fp16, or float8_e4m3fn.

        scale_inv: for float8_e4m3fn, the fp32 factor of each 128 x 128 block, [ceil(rows / 128), ceil(cols / 128)];
        the format fp8 then keeps every code and scale, the others quantise the products.
        source_format: one of `config.GGUF_FORMATS`, for w uint8 with the bytes of each row as they are in a GGUF
        file; the projection's format must be the same one. It keeps every bit.
        """
        w = fp8_bytes(w, scale_inv)
        self.weights.set_projection(
            expert,
            projection,
            w,
            self.pool,
            self.isa,
            scale_inv=scale_inv,
            source_format=source_format,
        )

    def set_stored(self, expert: int, projection: str, weight: StoredWeight) -> None:
        """Packs a quantised weight of a checkpoint, losslessly where `format` allows; see `packing_arguments`."""
        target = self.down_format if projection == "down" else self.format
        w, arguments = packing_arguments(weight, target)
        self.weights.set_projection(expert, projection, w, self.pool, self.isa, **arguments)

    def fill_random(self, seed: int, experts: Sequence[int] | None = None) -> None:
        """Random weights of plausible size, the same for the same seed; of these experts only, if given."""
        self.weights.fill_random(seed, self.pool, experts)

    def dequantize(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """(gate [I, D], up [I, D], down [D, I]) in fp32: the values the kernels compute with."""
        gate, up, down = self.weights.dequantize(expert)
        return from_numpy(gate), from_numpy(up), from_numpy(down)

    @property
    def packed_layout(self) -> PackedLayout:
        """Where matrices lie among an expert's packed bytes."""
        made = self.weights
        return PackedLayout(
            made.hidden_size,
            made.intermediate_size,
            self.format,
            self.down_format,
            num_nodes=len(made.buffers()),
        )

    def packed_slices(self, first: int, end: int | None = None) -> list[Tensor]:
        """The packed bytes of expert `first`, or of `first` to `end`, as they lie in memory, which is not copied.

        uint8, one tensor per memory node with its slices of these experts one after another. `fill_random` and
        `set_projection` change them; they keep the weights alive.
        """
        count = (first + 1 if end is None else end) - first
        slices = []
        for memory in self.weights.buffers():
            each = memory.size // self.weights.num_experts
            slices.append(from_numpy(memory)[first * each : (first + count) * each])
        return slices

    def state(self, prefix: str) -> dict[str, Tensor | CpuExperts]:
        """What holds the weights once they are loaded, by name."""
        return {prefix: self}

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Weighted sum of each token's routed experts.

        Shapes: T tokens, D = hidden_size, K experts per token.
          x [T, D] fp32 or bf16 (rows may be apart) · topk_ids [T, K] i32 or i64, -1 skips · topk_weights [T, K] fp32
        Returns: [T, D] in x's dtype. Integer formats quantise activations to int8 per 32 inputs on
        vector instruction sets; AMX computes in bf16, or in int8. An id out of range raises ValueError.
        """
        if use_reference():
            return moe_experts_ref(x, topk_ids, topk_weights, self.dequantize)
        out = torch.empty(x.shape, dtype=x.dtype)
        self.run_kernels(x, topk_ids, topk_weights, out)
        return out

    def run_kernels(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor) -> None:
        """Runs the C++ kernels into `out`, [T, D]. Wrong arguments raise ValueError or TypeError."""
        used = self._C.moe_forward(
            self.weights, x, topk_ids, topk_weights, out, self.pool, self.isa
        )
        assert used == self.isa, f"{used=} {self.isa=}"
