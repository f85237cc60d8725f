"""CPU kernels. A tensor is any object with __dlpack__ in CPU memory (torch, numpy).

Instruction sets, narrow to wide: scalar, avx2, avx512, avx512_bf16, amx; and amx_emulated, the AMX
code over tiles in memory, which tests use. "auto" is the widest automatic one: never amx_emulated,
nor avx512_bf16 on Intel's processors, where its dot product is slow.
Errors: ValueError (shapes, ranges, names), TypeError (dtypes), MemoryError, RuntimeError (pool).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

class _Tensor(Protocol):
    def __dlpack__(self) -> object: ...

def cpu_info() -> dict[str, Any]:
    """What this processor and this build can do.

    {"features": [str], "isas": {name: {"compiled": bool, "usable": bool, "automatic": bool,
    "reason": str}}, "amx_permission": bool}; `reason` says why a set is not usable.
    """

def resolve_isa(name: str = "auto", max_isa: str | None = None) -> str:
    """The set to use. A name that is unknown, unusable or above max_isa raises ValueError."""

PACK_LAYOUT_VERSION: int
"""Counts up with every change of what packed bytes mean."""

def checksum(data: Any) -> int:
    """A 64-bit hash of contiguous bytes (any buffer), against accidents and not attacks."""

def min_tile_rows(format: str, isa: str = "auto", arithmetic: str = "bf16") -> int:
    """Rows of one expert from which tile kernels compute it; 0: never."""

class ThreadPool:
    """Workers on the given CPUs. The calling thread works as worker 0; callers take turns.

    memory_nodes: the system's numbers of the memory nodes (NUMA) that weights are divided among, -1
    for memory that is not placed. worker_nodes: the index in memory_nodes of each worker's node.
    """

    def __init__(
        self,
        cpus: list[int],
        pin: bool = True,
        worker_nodes: list[int] = ...,
        memory_nodes: list[int] = ...,
        arithmetic: str = "bf16",
    ) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def worker_nodes(self) -> list[int]: ...
    @property
    def memory_nodes(self) -> list[int]: ...
    def close(self) -> None:
        """Ends the threads; idempotent. Later use raises RuntimeError, as does use after fork.

        RuntimeError if workers that took longer than allowed are not back after 2 s.
        """

    def probe(self, fail_worker: int | None = None) -> list[int]:
        """The CPU that each worker runs on. Worker `fail_worker` raises RuntimeError instead."""

class ExpertWeights:
    """Packed experts of one layer: E experts, gate and up [I, D], down [D, I].

    Memory becomes resident when written; experts that were never set contribute zero. Each expert
    is divided among memory_nodes; results do not depend on that. arithmetic: what tile kernels
    multiply int4_g32 and int8 in, "bf16" or "int8"; the packed bytes are the same.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        format: str,
        memory_nodes: list[int] = ...,
        arithmetic: str = "bf16",
        down_format: str | None = None,
    ) -> None:
        """down_format: that of the down projections, if it is another one."""

    @property
    def is_placed(self) -> bool:
        """Whether memory was asked to lie on certain nodes of the system."""

    def buffers(self) -> list[NDArray[np.uint8]]:
        """The packed bytes, one array for each memory node; the arrays keep the weights alive."""

    def map_file(self, fd: int, offsets: list[int]) -> None:
        """Puts private views of a file, from these multiples of the page size on, in place of `buffers`.

        The file must be long enough and must not change. OSError if the system refuses.
        """

    @property
    def bind_error(self) -> str:
        """Why the system refused to place the memory on its nodes; empty if it did not."""

    def set_projection(
        self,
        expert: int,
        projection: str,
        w: _Tensor,
        pool: ThreadPool | None = None,
        isa: str = "auto",
        scale_inv: _Tensor | None = None,
        group_scales: _Tensor | None = None,
        source_format: str | None = None,
    ) -> None:
        """Quantises and packs one matrix (fp32, bf16 or fp16). The result does not depend on isa.

        With group_scales bf16 [rows, cols / 32], w uint8 [rows, cols / 2] holds codes 0..15, the
        first of each two in the low half of the byte: weight = (code - 8) * scale. The format
        int4_g32 keeps both.
        With scale_inv [ceil(rows / 128), ceil(cols / 128)] fp32, w is float8_e4m3fn (or its bytes as
        uint8) and each 128 x 128 block is multiplied by its factor; the format fp8 keeps codes and
        factors. With source_format, w is uint8 [rows, bytes of a row], blocks of a GGUF file in that
        format, which must be the projection's; every bit is kept. NaN or infinity in fp8, an integer
        format or GGUF's scales raises ValueError; the projection is then undefined.
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

    def fill_random(
        self,
        seed: int = 0,
        pool: ThreadPool | None = None,
        experts: Sequence[int] | None = None,
    ) -> None: ...
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
    def arithmetic(self) -> str: ...
    def down_format(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def expert_nbytes(self) -> int: ...

class LinearWeights:
    """G packed matrices [rows, cols] of one shape; those never set are zero."""

    def __init__(
        self,
        num_matrices: int,
        rows: int,
        cols: int,
        format: str,
        memory_nodes: list[int] = ...,
        arithmetic: str = "bf16",
    ) -> None: ...
    @property
    def is_placed(self) -> bool:
        """Whether memory was asked to lie on certain nodes of the system."""

    def buffers(self) -> list[NDArray[np.uint8]]:
        """The packed bytes, one array for each memory node; the arrays keep the weights alive."""

    def map_file(self, fd: int, offsets: list[int]) -> None:
        """Puts private views of a file, from these multiples of the page size on, in place of `buffers`.

        The file must be long enough and must not change. OSError if the system refuses.
        """

    @property
    def bind_error(self) -> str: ...
    def set(
        self,
        matrix: int,
        w: _Tensor,
        pool: ThreadPool | None = None,
        isa: str = "auto",
        scale_inv: _Tensor | None = None,
        group_scales: _Tensor | None = None,
        source_format: str | None = None,
    ) -> None:
        """Quantises and packs one matrix, as ExpertWeights does."""

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
    def arithmetic(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

def linear_forward(
    weights: LinearWeights, x: _Tensor, out: _Tensor, pool: ThreadPool, isa: str = "auto"
) -> str:
    """out[t, g] = W_g x[t, g]; with x [T, cols], all matrices read the same row.

    x [T, G, cols] or [T, cols], last dimension adjacent · out [T, G, rows] contiguous, or [T, rows]
    for one matrix; fp32 or bf16. Returns the instruction set used; thread counts do not matter.
    """

def mla_attention(
    w_uk_transposed: LinearWeights,
    w_uk: LinearWeights,
    w_uv: LinearWeights,
    q: _Tensor,
    latent_cache: _Tensor,
    block_tables: _Tensor,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    out: _Tensor,
    pool: ThreadPool,
    isa: str = "auto",
    form: str = "auto",
) -> str:
    """Causal attention of each request's last query_lens[i] tokens over its context in the cache.

    w_uk_transposed [C, N], w_uk [N, C], w_uv [V, C], H matrices each · q [T, H, N + R] fp32, rope
    part rotated, rows may be apart · latent_cache [blocks, block_size, C + R] fp32 or bf16, or
    [blocks, block_size, bytes] uint8 for fp8 (csrc/latent_layout.h) ·
    block_tables [B, max_blocks] i64 · out [T, H, V] fp32. form: absorbed, expanded, or auto, which
    takes the cheaper one for each request; or invariant, which is absorbed and gives a query the
    same bits whatever is computed with it. Returns the instruction set used; thread counts do not
    matter. fp32 caches are computed in fp32, the others in bf16 where the instruction set has it.
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

    def __init__(
        self,
        pool: ThreadPool,
        max_tokens: int,
        isa: str = "auto",
        attention_form: str = "auto",
    ) -> None: ...
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
    def operation_seconds(self) -> list[tuple[str, float]]:
        """Name of every operation and its wall time in all runs so far."""

    def expert_loads(self) -> list[tuple[int, int]]:
        """Of every group of experts, in the order of recording: experts read in all runs, and their bytes."""

    @property
    def isa(self) -> str: ...

FLAG_WORDS: int
"""Words of 32 bits between two flags of an ExpertBridge: each has a cache line of its own."""

class ExpertBridge:
    """Routed experts on the CPU for steps whose other operations run on a stream.

    x [max_tokens, D] fp32 or bf16 · topk_ids [max_tokens, K] i32, -1 skips · topk_weights
    [max_tokens, K] fp32 · out [max_tokens, D] fp32 or bf16 · flags [2 layers + 1, FLAG_WORDS] i32;
    all contiguous, pinned if a GPU is to reach them, and kept alive. `moejet.experts.bridge` explains
    the use, csrc/expert_bridge.h the protocol.
    """

    def __init__(
        self,
        pool: ThreadPool,
        layers: Sequence[ExpertWeights],
        x: _Tensor,
        topk_ids: _Tensor,
        topk_weights: _Tensor,
        out: _Tensor,
        flags: _Tensor,
        isa: str = "auto",
        worker_timeout_s: float = ...,
    ) -> None:
        """worker_timeout_s: for a layer, beside 2 ns per multiplication (default: no limit)."""

    def run_step(
        self,
        num_tokens: int,
        layers: Sequence[int] | None = None,
        timeout_s: float = 30.0,
        query: Callable[[], bool] | None = None,
        signals: CudaSignals | None = None,
        streams: Sequence[int] = (),
    ) -> None:
        """Serves the layers (all of them in order) of a step that was launched; see CpuBridge.run_step.

        How the stream is, is asked of query() (True: out of work; raises if it failed) or, given
        signals, of the driver with the handles `streams`: out of work if all are.
        """

    def reset(
        self,
        timeout_s: float = 5.0,
        query: Callable[[], bool] | None = None,
        signals: CudaSignals | None = None,
        streams: Sequence[int] = (),
    ) -> None:
        """Answers what the stream still submits until it is idle, then makes all ready again."""

    def submit(self, layer: int) -> None:
        """What the stream does after its copies, for streams that call functions."""

    def wait(self, layer: int) -> None:
        """What the stream does before it uses the result: waits for it and clears the flag."""

    def counters(self) -> dict[str, Any]:
        """{"steps", "layers", "wait_s", "layer_s": [float], "distinct_experts", "weight_bytes"}"""

    def fail_once(self, layer: int, worker: int, after_s: float = 0.0) -> None:
        """For tests: the worker throws when it next computes this layer, after so many seconds."""

    def set_computing(self, computes: bool) -> None:
        """False: layers are answered at once with zeros and not counted, to time the stream's share alone."""

    @property
    def num_layers(self) -> int: ...
    @property
    def isa(self) -> str: ...

class CudaSignals:
    """The stream's side of a bridge on CUDA streams; it must outlive graphs captured with it."""

    def __init__(
        self, bridge: ExpertBridge, library: str, stream: int, host_functions: bool = False
    ) -> None:
        """library: of the CUDA driver. RuntimeError if it cannot be loaded.

        stream: a handle, not capturing, on which stream memory operations are tried out once it has
        nothing else to do.
        """

    def submit(self, layer: int, stream: int) -> None: ...
    def wait(self, layer: int, stream: int) -> None: ...
    @property
    def mode(self) -> str:
        """memory_operations or host_functions"""

    @property
    def reason(self) -> str:
        """Why memory operations are not used although they were wanted; else empty."""

# Small operations on whole tensors: fp32, elements of a row adjacent, rows may be apart. Rows are
# shared out over the pool's workers; without a pool the caller computes. Results do not depend on
# threads or on the other rows, and are the same on every instruction set (router_logits: rounding).

BAD_LOGITS: int
UNDECIDED: int
MAX_TOP_LOGITS: int
MAX_ROPE_DIM: int
MAX_ROUTER_EXPERTS: int

def embed(
    table: _Tensor,
    token_ids: _Tensor,
    out: _Tensor,
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> None:
    """out[t] = table[token_ids[t]]; table [V, D] fp32 or bf16, token_ids [T] i32 or i64, out [T, D]."""

def rms_norm(
    x: _Tensor,
    weight: _Tensor,
    eps: float,
    out: _Tensor,
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight; x and out [T, D], weight [D]; out may be x."""

def add_rms_norm(
    h: _Tensor,
    a: _Tensor,
    b: _Tensor | None = None,
    weight: _Tensor | None = None,
    eps: float = 0.0,
    out: _Tensor | None = None,
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> None:
    """h += a + b in place; with weight and out, also out = rms_norm(h). All [T, D], weight [D]."""

def rope(
    x: _Tensor,
    cos_sin: _Tensor,
    interleave: bool,
    out: _Tensor,
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> None:
    """Rotates x [T, H, R] by cos_sin [T, R] into out [T, H, R], halves in order; out may be x."""

def store_latent(
    c_kv: _Tensor,
    k_pe: _Tensor,
    cache: _Tensor,
    slots: _Tensor,
    norm_weight: _Tensor | None = None,
    eps: float = 0.0,
    cos_sin: _Tensor | None = None,
    interleave: bool = True,
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> None:
    """cache[slots[t]] = [rms_norm(c_kv[t]) | rope(k_pe[t])]; without norm_weight or cos_sin, as it is.

    c_kv [T, C] · k_pe [T, R] · cache [N, S, C + R] contiguous, fp32 or bf16, or uint8 for fp8 rows
    (csrc/latent_layout.h) · slots [T] i32 or i64
    norm_weight [C] · cos_sin [T, R]
    """

def router_logits(
    x: _Tensor,
    weight: _Tensor,
    out: _Tensor,
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> None:
    """out = x weight^T in fp32; x [T, D], weight [E, D] fp32 or bf16, out [T, E]."""

def router_topk(
    logits: _Tensor,
    ids: _Tensor,
    weights: _Tensor,
    scoring: str,
    group_rank: str,
    num_groups: int,
    top_groups: int,
    norm_topk_prob: bool,
    scaling_factor: float,
    bias: _Tensor | None = None,
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> None:
    """Selects experts; logits [T, E], ids [T, K] i32, weights [T, K], bias [E].

    scoring: softmax, sigmoid · group_rank: none, best (score), best_two (their sum)
    """

def argmax(logits: _Tensor, pool: ThreadPool | None = None, isa: str = "auto") -> list[int]:
    """Of each row of logits [B, V], the first index of the largest; BAD_LOGITS if NaN or +inf is there."""

def top_logits(
    logits: _Tensor,
    ids: _Tensor,
    values: _Tensor,
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> list[float]:
    """The K <= MAX_TOP_LOGITS largest of each row, descending; ids [B, K] i32, values [B, K].

    Returns log(sum(exp(row))) of each row of logits [B, V].
    """

def sample(
    logits: _Tensor,
    temperature: list[float],
    top_k: list[int],
    top_p: list[float],
    min_p: list[float],
    u: list[float],
    pool: ThreadPool | None = None,
    isa: str = "auto",
) -> list[int]:
    """A token for each row of logits [B, V] by inverse transform with u; lists of B entries.

    BAD_LOGITS: NaN, +inf, or nothing above -inf. UNDECIDED: more than MAX_TOP_LOGITS tokens pass the
    cut-offs.
    """
