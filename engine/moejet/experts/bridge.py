"""Routed experts on the CPU for a model whose other operations run on a GPU's stream.

A layer's forward, on the model's stream:

    bridge.submit(layer, x, topk_ids, topk_weights)    writes to pinned memory, tells the CPU
    shared = shared_experts(x)                         the GPU's share, at the same time
    routed = bridge.collect(layer)                     waits for the CPU, copies back

Captured in a CUDA graph, this runs without Python: after each `graph.replay()`, `bridge.run_step(T)` serves all layers
on the calling thread, as worker 0 of the pool, and returns when the last one is computed. T is the number of rows that
the graph was captured with; rows of padding have ids -1 and come back as zeros.

Eagerly, `collect` serves its layer itself. Launching a whole step first and serving it then would hang: a stream takes
only about a thousand operations before the launching thread has to wait, and the stream waits for the CPU.

`run_step` and `reset` ask how the stream is. They take that of the last eager layer or replay they were told of, and
the calling thread's current one; a caller whose replay is on yet another must name it.

The GPU may use the bridge's pinned memory until the stream is idle, which is later than the end of `run_step`. It is
therefore freed by `close`, or by a finaliser, once the stream is idle. While a captured graph may still be replayed,
its bridge must stay open and alive. That also keeps the arguments of host functions, to which its operations point.

What arrives there are ids of the layer's experts in RAM, -1 for what is not for the CPU: padding, and experts that the
slot table says live on the GPU. One kernel writes ids, weights and x to pinned memory (`ops.hand_over`); to the
protocol it is what a copy would be, an operation on the stream between the last layer's wait and this one's flag.
The protocol, and why one set of buffers is enough, is explained in csrc/expert_bridge.h.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moejet.environment import env_worker_timeout
from moejet.experts.cpu_experts import CpuExperts
from moejet.extension import load_extension
from moejet.ops.hand_over import HandOver, hand_over

if TYPE_CHECKING:
    from moejet._C import CudaSignals, ExpertBridge

logger = logging.getLogger(__name__)

CUDA_DRIVER = "libcuda.so.1"
# How long collecting a bridge that was not closed may wait for its stream.
_RELEASE_SECONDS = 5.0


class Stream(Protocol):
    """Operations that run later, in the order in which they were asked for."""

    device: torch.device
    pin_memory: bool  # whether host memory must be pinned for it

    @property
    def is_capturing(self) -> bool:
        """Whether operations are being recorded, to be replayed, instead of run."""

    def attach(self, native: ExpertBridge) -> None:
        """Called once, before `submit` and `wait`."""

    def detach(self, native: ExpertBridge) -> None:
        """Called when the stream is idle and the bridge will not be used any more."""

    def run(self, operation: Callable[[], object]) -> None:
        """Enqueues what `operation` enqueues on the current stream, or on streams without a device itself."""

    def copy(self, target: Tensor, source: Tensor) -> None: ...
    def submit(self, layer: int) -> None: ...
    def wait(self, layer: int) -> None: ...

    def settle(self) -> None:
        """Makes results readable by operations that are not on the stream, if the model uses such."""

    def state(self, replayed_on: torch.cuda.Stream | None = None) -> dict[str, Any]:
        """The arguments by which `ExpertBridge.run_step` learns how the stream is."""


class CudaStream:
    """PyTorch's current stream of a CUDA device, for one bridge."""

    pin_memory = True

    def __init__(
        self,
        device: torch.device,
        *,
        driver: str = CUDA_DRIVER,
        host_functions: bool = False,
    ) -> None:
        """driver: the library of the CUDA driver. host_functions: do not use stream memory operations."""
        self.device = device
        self._driver = driver
        self._host_functions = host_functions
        self._signals: CudaSignals | None = None
        self._last: torch.cuda.Stream | None = None  # kept, lest its handle be given to another

    def attach(self, native: ExpertBridge) -> None:
        """Waits for the current stream, on which memory operations are tried out."""
        if self._signals is not None:
            raise ValueError("this CudaStream serves another CpuBridge: create one for each")
        self._last = torch.cuda.current_stream(self.device)
        self._signals = load_extension().CudaSignals(
            native, self._driver, self._last.cuda_stream, self._host_functions
        )
        if self._signals.reason:
            logger.warning(
                "stream memory operations do not work here (%s): layers are handed to the CPU by "
                "host functions, which costs some 10 us more per layer",
                self._signals.reason,
            )

    def detach(self, native: ExpertBridge) -> None:
        self._signals = self._last = None

    @property
    def mode(self) -> str:
        """How flags are set and awaited: "memory_operations" or "host_functions"."""
        return str(self._attached.mode)

    @property
    def reason(self) -> str:
        """Why memory operations are not used although they were wanted; empty if they are."""
        return str(self._attached.reason)

    @property
    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def run(self, operation: Callable[[], object]) -> None:
        operation()

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source.to(target.dtype), non_blocking=True)

    def submit(self, layer: int) -> None:
        current = torch.cuda.current_stream(self.device)
        self._attached.submit(layer, current.cuda_stream)
        if not self.is_capturing:  # a graph is replayed on another stream than it was captured on
            self._last = current

    def wait(self, layer: int) -> None:
        self._attached.wait(layer, torch.cuda.current_stream(self.device).cuda_stream)

    def settle(self) -> None:
        pass  # whatever uses the result comes later on the same stream

    def state(self, replayed_on: torch.cuda.Stream | None = None) -> dict[str, Any]:
        if replayed_on is not None:
            self._last = replayed_on
            used = [replayed_on]
        else:
            used = [] if self._last is None else [self._last]
            if not self.is_capturing:  # which a query would break off
                used.append(torch.cuda.current_stream(self.device))
        handles = {int(stream.cuda_stream) for stream in used}
        return {"signals": self._attached, "streams": sorted(handles)}

    @property
    def _attached(self) -> CudaSignals:
        if self._signals is None:
            raise RuntimeError("this CudaStream belongs to no open CpuBridge")
        return self._signals


# What a stream that failed or hangs may still use: never freed.
_abandoned: list[tuple[ExpertBridge, Stream]] = []


def _release(native: ExpertBridge, stream: Stream, process: int) -> None:
    """Frees a bridge that was not closed, once its stream is idle."""
    if os.getpid() != process:  # the parent's stream is none of a forked child's business
        return
    try:
        native.reset(_RELEASE_SECONDS, **stream.state())
        stream.detach(native)
    except Exception as error:
        _abandoned.append((native, stream))
        logger.warning("a CpuBridge's memory is not freed: its stream may use it (%s)", error)


class CpuBridge:
    """Hands the routed experts of L layers to the CPU and brings their results back."""

    def __init__(
        self,
        layers: Sequence[CpuExperts],
        stream: Stream,
        *,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        out_dtype: torch.dtype | None = None,
        timeout_s: float = 30.0,
        worker_timeout_s: float | None = None,
    ) -> None:
        """layers: all of one pool and instruction set, numbered from 0 as the model submits them.

        dtype: of x as it travels, fp32 or bf16; out_dtype: of the results, by default the same. timeout_s: how long the
        GPU may take from one layer to the next before `run_step` gives up. worker_timeout_s: how long the workers may
        take for a layer (None: MOEJET_WORKER_TIMEOUT), beside 2 ns for each multiplication.
        """
        if not layers:
            raise ValueError("layers is empty: a bridge needs at least one layer of experts")
        first = layers[0]
        for number, layer in enumerate(layers):
            if layer.pool is not first.pool or layer.isa != first.isa:
                raise ValueError(
                    f"layers[{number}] has another pool or instruction set ({layer.isa}) than layers[0] ({first.isa}): "
                    "create all with the same"
                )
        self.stream = stream
        self.timeout_s = timeout_s
        self.dtype, self.num_layers = dtype, len(layers)
        self._pending: dict[int, int] = {}
        hidden = first.weights.hidden_size

        def memory(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=stream.pin_memory)

        native = load_extension()
        self._handed = HandOver.allocate(
            max_tokens, hidden, top_k, dtype=dtype, pin_memory=stream.pin_memory
        )
        self._num_experts = [layer.weights.num_experts for layer in layers]
        self._out = memory(max_tokens, hidden, dtype=out_dtype or dtype)
        self._flags = memory(2 * len(layers) + 1, native.FLAG_WORDS, dtype=torch.int32)
        self._native: ExpertBridge = native.ExpertBridge(
            first.pool,
            [layer.weights for layer in layers],
            self._handed.x,
            self._handed.topk_ids,
            self._handed.topk_weights,
            self._out,
            self._flags,
            first.isa,
            env_worker_timeout() if worker_timeout_s is None else worker_timeout_s,
        )
        stream.attach(self._native)
        # Holds what the GPU uses: memory (by the native bridge) and signals (by the stream).
        self._finalizer = weakref.finalize(self, _release, self._native, stream, os.getpid())
        self._is_closed = False
        self._last_counters: dict[str, Any] = {}

    def close(self, timeout_s: float = 5.0) -> None:
        """Waits until the stream is idle and frees the memory; graphs with this bridge must not be replayed again.

        Steps that were launched and not served are let through, as by `reset`, whose exceptions this raises; the
        bridge is then still open.
        """
        if self._is_closed:
            return
        self.reset(timeout_s)
        self._finalizer.detach()
        self._last_counters = self._native.counters()
        self._is_closed = True
        self.stream.detach(self._native)
        del self._native, self._handed, self._out, self._flags

    @property
    def pinned_bytes(self) -> int:
        """Size of the host memory that the GPU reaches."""
        return self._handed.nbytes + self._out.nbytes + self._flags.nbytes

    def submit(
        self,
        layer: int,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        slot_of_expert: Tensor | None = None,
        uses: Tensor | None = None,
    ) -> None:
        """Enqueues the hand-over of x [T, D], topk_ids [T, K] and topk_weights [T, K] to the CPU.

        slot_of_expert, uses: which experts are not for the CPU, and a count of all; see `ops.hand_over`.
        """
        self._check_open()
        num_tokens, most = x.shape[0], self._handed.x.shape[0]
        if not 1 <= num_tokens <= most:
            raise ValueError(f"x has {num_tokens} rows: the bridge takes 1 to max_tokens={most}")
        if layer in self._pending:
            raise ValueError(f"layer={layer} was submitted already: collect it first")
        target = self._handed.first(num_tokens)
        for name, source in (("x", x), ("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            expected = getattr(target, name).shape
            if source.shape != expected:
                raise ValueError(
                    f"{name} has shape {list(source.shape)}, expected {list(expected)}"
                )
        write = partial(
            hand_over,
            x,
            topk_ids,
            topk_weights,
            target,
            num_experts=self._num_experts[layer],
            slot_of_expert=slot_of_expert,
            uses=uses,
        )
        self.stream.run(write)
        self.stream.submit(layer)
        self._pending[layer] = num_tokens

    def collect(self, layer: int) -> Tensor:
        """Enqueues the wait for the layer's result, [T, D] in out_dtype on the stream's device.

        Unless a graph is being captured, the CPU computes the layer now, on the calling thread.
        """
        self._check_open()
        if layer not in self._pending:
            raise ValueError(f"layer={layer} was not submitted: submit it first")
        num_tokens = self._pending.pop(layer)
        is_eager = not self.stream.is_capturing
        if is_eager:
            self._serve(num_tokens, [layer])
        out = torch.empty(
            num_tokens, self._out.shape[1], dtype=self._out.dtype, device=self.stream.device
        )
        self.stream.wait(layer)
        self.stream.copy(out, self._out[:num_tokens])
        if is_eager:
            self.stream.settle()
        return out

    def run_step(self, num_tokens: int, stream: torch.cuda.Stream | None = None) -> None:
        """Serves all layers of a graph that was just replayed, of num_tokens rows, on `stream`.

        stream: by default that of the last eager layer or named replay, and the current one.

        Raises RuntimeError if the CPU or the GPU fails, or if the GPU takes longer than timeout_s for a layer, or the
        workers longer than worker_timeout_s; only the calling thread, worker 0, has no limit. `reset` must be called
        then. The step's results are NaN: the GPU is let through the rest of it, or, if it had not even
        submitted the first layer, waits there until `reset` lets it through.
        """
        self._check_open()
        self._serve(num_tokens, None, stream)

    def reset(self, timeout_s: float = 5.0, stream: torch.cuda.Stream | None = None) -> None:
        """Lets the stream run out of work, without computing, and makes the bridge ready for the next step.

        For the time after an exception, wherever it came from between the launch of a step and the end of `run_step`.
        Raises RuntimeError if the stream has failed or does not come to its end within timeout_s; what it submits
        after that waits for the next `reset`, so call it again before waiting for the stream. The same if a worker is
        not back from a step that failed, which could still write to the results: then the stream has come to its end.
        stream: as of `run_step`.
        """
        self._check_open()
        self._pending.clear()
        self._native.reset(timeout_s, **self.stream.state(stream))

    @contextmanager
    def answering_at_once(self) -> Iterator[None]:
        """Meanwhile the CPU computes nothing and answers with zeros: what steps take then is the GPU's share."""
        self._check_open()
        self._native.set_computing(False)
        try:
            yield
        finally:
            if not self._is_closed:
                self._native.set_computing(True)

    def counters(self) -> dict[str, Any]:
        """So far: steps; layers, distinct_experts, weight_bytes computed; wait_s for the GPU, layer_s by layer.

        A step, eager or replayed, counts when its last layer has been served.
        """
        return self._last_counters if self._is_closed else self._native.counters()

    def _serve(
        self, num_tokens: int, layers: list[int] | None, stream: torch.cuda.Stream | None = None
    ) -> None:
        state = self.stream.state(stream)
        self._native.run_step(num_tokens, layers, self.timeout_s, **state)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this CpuBridge is closed: create another")
