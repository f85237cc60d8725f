"""Takes the readings of `moejet.hybrid_statistics` off an engine whose model runs on a GPU, or on a simulated one.

Over a simulated device the same code runs, its clock is the host's, and figures mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from moejet.batch import Batch
from moejet.engine import Engine
from moejet.experts.bridge import CpuBridge
from moejet.gpu_memory import device_tensors
from moejet.gpu_runner import GpuRunner
from moejet.hybrid_statistics import HandOver, Readings, Vram, delta
from moejet.request import Request
from moejet.timing import compute_tokens, scratch_requests

# Steps before the first that counts: launched one by one, captured, replayed.
_WARM_UP = 3
_HANDOVERS = 20


class _HostClock:
    """Seconds from the begin to the end of each `with clock():`."""

    def __init__(self) -> None:
        self._samples: list[float] = []

    def __call__(self) -> _HostClock:
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._samples.append(time.perf_counter() - self._start)

    def take(self) -> list[float]:
        """All since the last call."""
        samples, self._samples = self._samples, []
        return samples


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _StreamClock:
    """The same between two events on the current stream."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self) -> _StreamClock:
        return self

    def __enter__(self) -> None:
        start, end = _event(), _event()
        end.record()  # makes the event, which is not to happen in the middle of a step
        start.record()
        self._pairs.append((start, end))

    def __exit__(self, *_: object) -> None:
        self._pairs[-1][1].record()

    def take(self) -> list[float]:
        pairs, self._pairs = self._pairs, []
        for _, end in pairs:
            end.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


class Profile:
    """Readings of an engine's steps."""

    def __init__(self, engine: Engine):
        if not isinstance(engine.runner, GpuRunner):
            raise ValueError("the model runs on the CPU alone: load it with device='cuda'")
        self._engine, self._runner = engine, engine.runner
        self._clock = _StreamClock() if engine.runner.device.type == "cuda" else _HostClock()

    def decode(self, num_steps: int, depth: int = 0, batch: int = 1) -> Readings:
        """num_steps tokens of each of `batch` sequences behind `depth` random ones, choosing the tokens included."""
        steps = _WARM_UP + 2 * num_steps
        runner, model = self._runner, self._engine.model_config
        with scratch_requests(self._engine, steps, depth, batch) as requests:
            self._run(_WARM_UP, lambda: self._decode_step(requests))
            readings = self._read(num_steps, lambda: self._decode_step(requests))
        rows = runner.decoding.padded(batch)
        asked = num_steps * model.num_moe_layers * model.num_experts_per_tok
        return Readings(
            num_tokens=batch,
            handover_s=self.handover_seconds(rows),
            hand_over=self._hand_over(
                rows, inputs=runner.decoding.input_bytes(batch), results=4 * rows
            ),
            asked_experts=float(asked) if batch == 1 else None,
            **readings,
        )

    def prefill(
        self, num_prompts: int, num_tokens: int, depth: int = 0, *, warm_up: int | None = None
    ) -> Readings:
        """Prompts of num_tokens one after another, each behind `depth` random tokens.

        warm_up: tokens of the prompt before them that does not count (None: as many).
        """
        engine = self._engine

        def read_prompt(count: int = num_tokens) -> None:
            with scratch_requests(engine, count, depth, batch=1) as requests:
                left = count
                while left > 0:
                    count = min(engine.config.max_batch_tokens, left)
                    compute_tokens(engine, requests, count)
                    left -= count

        self._run(1, lambda: read_prompt(num_tokens if warm_up is None else warm_up))
        readings = self._read(num_prompts, read_prompt)
        inputs = 2 * num_tokens * engine.model_config.hidden_size
        hand_over = self._hand_over(num_tokens, inputs=inputs, results=0)
        if readings["cpu_layers"] == 0:  # all experts in RAM were streamed
            hand_over = replace(hand_over, layers=0)
        return Readings(num_tokens=num_tokens, handover_s=None, hand_over=hand_over, **readings)

    def handover_seconds(self, rows: int) -> float | None:
        """What a layer takes in a step that does nothing else and of which the CPU has nothing to compute."""
        runner, bridge = self._runner, self._runner.bridge
        if bridge is None:
            return None
        device, c = runner.device, self._engine.model_config
        x = torch.zeros(rows, c.hidden_size, dtype=bridge.dtype, device=device)
        ids = torch.full((rows, c.num_experts_per_tok), -1, dtype=torch.int32, device=device)
        mix = torch.zeros(rows, c.num_experts_per_tok, device=device)

        def enqueue() -> None:
            for layer in range(bridge.num_layers):
                bridge.submit(layer, x, ids, mix)
                bridge.collect(layer)

        with torch.inference_mode(), runner.on_device():
            samples = self._handovers(bridge, enqueue, rows)
        return sorted(samples)[len(samples) // 2] / bridge.num_layers

    def _handovers(self, bridge: CpuBridge, enqueue: Callable[[], None], rows: int) -> list[float]:
        clock, runner = self._clock, self._runner
        enqueue()
        if not runner.decoding.uses_graphs:
            for _ in range(_HANDOVERS):
                with clock():
                    enqueue()
            return clock.take()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            enqueue()
        for _ in range(_HANDOVERS):
            with clock():
                graph.replay()
            bridge.run_step(rows)
            torch.cuda.current_stream().synchronize()
        return clock.take()

    def vram(self) -> Vram | None:
        """Now; the allocator's peaks are those since they were last reset."""
        runner, memory = self._runner, self._runner.memory
        if memory is None:
            return None
        if runner.device.type != "cuda":
            held = sum(tensor.nbytes for tensor in device_tensors(runner))
            return Vram(memory.on_device, runner.vram_bytes, held, held)
        free, total = torch.cuda.mem_get_info(runner.device)
        return Vram(
            memory.on_device,
            runner.vram_bytes,
            torch.cuda.max_memory_allocated(runner.device),
            torch.cuda.max_memory_reserved(runner.device),
            total - free,
            total,
        )

    def _read(self, count: int, run: Callable[[], None]) -> dict[str, Any]:
        """The fields of `Readings` that come from running something `count` times, and again without the CPU."""
        before, moved = self._counters(), self._transfers()
        wall_s, span_s = self._run(count, run)
        counted = delta(self._counters(), before)
        copied = {name: value - moved[name] for name, value in self._transfers().items()}
        with self._alone():
            _, alone_s = self._run(count, run)
        return {
            "wall_s": wall_s,
            "span_s": span_s,
            "alone_s": alone_s,
            "cpu_s": counted["layer_s"],
            "cpu_wait_s": counted["wait_s"],
            "cpu_layers": int(counted["layers"]),
            "cpu_experts": int(counted["distinct_experts"]),
            "cpu_bytes": int(counted["weight_bytes"]),
            "streamed_bytes": int(copied["streamed_bytes"]),
            "fetched_bytes": int(copied["fetched_bytes"]),
            "copy_s": copied["copy_seconds"],
        }

    def _run(self, count: int, run: Callable[[], None]) -> tuple[list[float], list[float]]:
        """Seconds of each of `count` runs: by the host's clock, and on the stream."""
        wall_s, span_s = [], []
        self._runner.clock = self._clock
        self._clock.take()
        try:
            for _ in range(count):
                start = time.perf_counter()
                run()
                wall_s.append(time.perf_counter() - start)
                span_s.append(sum(self._clock.take()))
        finally:
            self._runner.clock = nullcontext
        return wall_s, span_s

    @contextmanager
    def _alone(self) -> Iterator[None]:
        bridge, cache = self._runner.bridge, self._runner.expert_cache
        if bridge is None:
            yield
            return
        # Answers of zero change what later layers ask for, which the cache must not learn from.
        with bridge.answering_at_once(), nullcontext() if cache is None else cache.resting():
            yield

    def _counters(self) -> dict[str, Any]:
        if self._runner.bridge is None:
            names = ("layer_s", "wait_s", "layers", "distinct_experts", "weight_bytes")
            return dict.fromkeys(names, 0)
        return self._runner.bridge.counters()

    def _transfers(self) -> dict[str, float]:
        """Weights that went to the GPU so far, where the runner moves any."""
        names = ("streamed_bytes", "fetched_bytes", "copy_seconds")
        ask = getattr(self._runner, "transfers", None)
        moved = None if ask is None else ask()
        return {name: getattr(moved, name, 0) for name in names}

    def _hand_over(self, rows: int, *, inputs: int, results: int) -> HandOver:
        bridge, c = self._runner.bridge, self._engine.model_config
        layers = 0 if bridge is None else bridge.num_layers
        size = 2 if bridge is None else bridge.dtype.itemsize
        return HandOver(rows, layers, c.hidden_size, c.num_experts_per_tok, size, inputs, results)

    def _decode_step(self, requests: list[Request]) -> None:
        """One token of each request as `Engine.step` computes it; what is chosen is thrown away."""
        batch = Batch.build(
            requests, [1] * len(requests), block_size=self._engine.config.block_size
        )
        batch.logits_indices = torch.arange(len(requests))
        chosen = self._runner.sample(batch, range(len(requests)), requests)
        assert chosen is not None
        for request in requests:
            request.num_computed_tokens += 1
