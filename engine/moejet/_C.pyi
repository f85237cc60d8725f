"""CPU kernels. A tensor is any object with __dlpack__ in CPU memory (torch, numpy).

Instruction sets, narrow to wide: scalar, avx2, avx512, amx; and amx_emulated, the AMX code over
tiles in memory, which tests use. "auto" is the widest usable one and never amx_emulated.
Errors: ValueError (shapes, ranges, names), TypeError (dtypes), MemoryError, RuntimeError (pool).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

class _Tensor(Protocol):
    def __dlpack__(self) -> object: ...

def cpu_info() -> dict[str, Any]:
    """What this processor and this build can do.

    {"features": [str], "isas": {name: {"compiled": bool, "usable": bool, "reason": str}},
    "amx_permission": bool}; `reason` says why a set is not usable.
    """

def resolve_isa(name: str = "auto", max_isa: str | None = None) -> str:
    """The set to use. A name that is unknown, unusable or above max_isa raises ValueError."""

def min_tile_rows(format: str, isa: str = "auto") -> int:
    """Rows of one expert from which AMX tiles (bf16 arithmetic) compute it; 0: never."""

class ThreadPool:
    """Workers on the given CPUs. The calling thread works as worker 0; callers take turns."""

    def __init__(self, cpus: list[int], pin: bool = True) -> None: ...
    @property
    def num_threads(self) -> int: ...
    def close(self) -> None:
        """Ends the threads; idempotent. Later use raises RuntimeError, as does use after fork."""

    def probe(self, fail_worker: int | None = None) -> list[int]:
        """The CPU that each worker runs on. Worker `fail_worker` raises RuntimeError instead."""

class ExpertWeights:
    """Packed experts of one layer: E experts, gate and up [I, D], down [D, I].

    Memory becomes resident when written; experts that were never set contribute zero.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, format: str
    ) -> None: ...
    def set_projection(
        self,
        expert: int,
        projection: str,
        w: _Tensor,
        pool: ThreadPool | None = None,
        isa: str = "auto",
    ) -> None:
        """Quantises and packs one matrix (fp32, bf16 or fp16). The result does not depend on isa.

        NaN or infinity in an integer format raises ValueError; the projection is then undefined.
        """

    def set_expert(
        self,
        expert: int,
        gate: _Tensor,
        up: _Tensor,
        down: _Tensor,
        pool: ThreadPool | None = None,
        isa: str = "auto",
    ) -> None: ...
    def dequantize(
        self, expert: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """(gate, up, down): the values that the kernels compute with."""

    def fill_random(self, seed: int = 0, pool: ThreadPool | None = None) -> None: ...
    def checksum(self, pool: ThreadPool | None = None) -> int:
        """Sum of all 64-bit words modulo 2^64: reads every packed byte once, at memory speed."""

    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def expert_nbytes(self) -> int: ...

class LinearWeights:
    """G packed matrices [rows, cols] of one shape; those never set are zero."""

    def __init__(self, num_matrices: int, rows: int, cols: int, format: str) -> None: ...
    def set(
        self, matrix: int, w: _Tensor, pool: ThreadPool | None = None, isa: str = "auto"
    ) -> None:
        """Quantises and packs one matrix (fp32, bf16 or fp16), as ExpertWeights does."""

    def dequantize(self, matrix: int) -> NDArray[np.float32]:
        """[rows, cols]: the values that the kernels compute with."""

    def fill_random(self, seed: int = 0, pool: ThreadPool | None = None) -> None: ...
    @property
    def num_matrices(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

def linear_forward(
    weights: LinearWeights, x: _Tensor, out: _Tensor, pool: ThreadPool, isa: str = "auto"
) -> str:
    """out[t, g] = W_g x[t, g]; with x [T, cols], all matrices read the same row.

    x [T, G, cols] or [T, cols], last dimension adjacent · out [T, G, rows] contiguous, or [T, rows]
    for one matrix; fp32 or bf16. Returns the instruction set used; thread counts do not matter.
    """

def moe_forward(
    weights: ExpertWeights,
    x: _Tensor,
    topk_ids: _Tensor,
    topk_weights: _Tensor,
    out: _Tensor,
    pool: ThreadPool,
    isa: str = "auto",
) -> str:
    """out[t] = sum_k topk_weights[t, k] * down_e(silu(gate_e x_t) * up_e x_t), e = topk_ids[t, k].

    x [T, D] fp32 or bf16, out [T, D] fp32 or bf16 (rows may be apart) · topk_ids [T, K] i32 or i64,
    -1 skips · topk_weights [T, K] fp32. Returns the instruction set used. The result is the same
    for every number of threads; on vector instruction sets it is also the same for every batch.
    """

def arithmetic_ceilings() -> dict[str, dict[str, Any]]:
    """{name: {"reason": str, "variants": [str]}}; `reason` says why it cannot be measured here."""

def measure_arithmetic(name: str, variant: str, seconds: float, pool: ThreadPool) -> list[float]:
    """Operations per second of all workers together, one sample per 10 ms and at least three.

    Multiply-adds on random operands in registers; each counts as two operations.
    """

class ReadProbe:
    """Memory of at least num_bytes bytes that the pool's workers read to find out how fast they can."""

    def __init__(self, num_bytes: int, pool: ThreadPool) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def measure(
        self,
        num_streams: int,
        prefetch_bytes: int,
        seconds: float,
        pool: ThreadPool,
        isa: str = "auto",
    ) -> list[float]:
        """Bytes per second of all workers together, one sample per pass over a part of the memory.

        Each worker reads num_streams (1, 2, 4, 8) places of its own side by side, prefetching
        prefetch_bytes ahead (0: not at all). Samples take turns through all of the memory.
        """

class Program:
    """A recorded forward pass over fp32 buffers of max_tokens rows; keeps all it refers to alive.

    The recording methods name operations in the order of execution; buffers may be columns of wider
    ones. `moejet.cpu_program` records a model and explains the whole.
    """

    def __init__(self, pool: ThreadPool, max_tokens: int, isa: str = "auto") -> None: ...
    def embed(self, weight: _Tensor, out: _Tensor) -> None:
        """out[t] = weight[token_ids[t]]; weight [V, D] fp32 or bf16."""

    def rms_norm(
        self,
        h: _Tensor,
        deltas: Sequence[_Tensor],
        weight: _Tensor,
        eps: float,
        out: _Tensor,
        only_logits_rows: bool = False,
    ) -> None:
        """h += deltas (at most two), out = norm(h); or that of the logits rows only, gathered."""

    def linear(
        self, projections: Sequence[tuple[LinearWeights, _Tensor | None, _Tensor, _Tensor]]
    ) -> None:
        """(weights, bias, x, out): out = W x + bias, all side by side."""

    def rope_and_store(
        self,
        q: _Tensor,
        heads: int,
        latent: _Tensor,
        rank: int,
        norm_weight: _Tensor,
        norm_eps: float,
        cos_sin: _Tensor,
        interleave: bool,
        cache: _Tensor,
    ) -> None:
        """Rotates the end of every head of q in place; [norm(c_kv) | rotated k_pe] to the cache."""

    def attention(
        self,
        w_uk_transposed: LinearWeights,
        w_uk: LinearWeights,
        w_uv: LinearWeights,
        q: _Tensor,
        cache: _Tensor,
        out: _Tensor,
        scale: float,
    ) -> None:
        """`mla_attention` of the step's requests."""

    def router(
        self,
        weight: _Tensor,
        bias: _Tensor | None,
        x: _Tensor,
        logits: _Tensor,
        topk_ids: _Tensor,
        topk_weights: _Tensor,
        scoring: str,
        group_rank: str,
        num_groups: int,
        top_groups: int,
        norm_topk_prob: bool,
        scaling_factor: float,
    ) -> None:
        """`router_logits` and `router_topk`."""

    def experts(
        self, groups: Sequence[tuple[ExpertWeights, _Tensor, _Tensor, _Tensor, _Tensor]]
    ) -> None:
        """(weights, topk_ids, topk_weights, x, out): `moe_forward`, all side by side."""

    def lm_head(self, weights: LinearWeights, x: _Tensor) -> None:
        """logits = W x of the logits rows, into run()'s logits."""

    def run(
        self,
        token_ids: _Tensor,
        positions: _Tensor,
        slot_mapping: _Tensor,
        query_lens: _Tensor,
        context_lens: _Tensor,
        block_tables: _Tensor,
        logits_indices: _Tensor,
        logits: _Tensor,
    ) -> None:
        """One step; `moejet.batch.Batch` describes its tensors. logits [L, V] fp32 is written."""

    @property
    def num_operations(self) -> int: ...
    @property
    def isa(self) -> str: ...
