"""The measurements of one case, in the process that runs it; every figure is given away as soon as it is there."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from cases import Case, Sizes, available_ram, prompts_of, shape_of, slices_of

from moejet import LLM, SamplingParams
from moejet.batch import Batch
from moejet.ceilings import Meter
from moejet.config import ModelConfig
from moejet.engine import Engine
from moejet.hybrid_statistics import Ceilings, derive, drift, extrapolate
from moejet.hybrid_timing import Profile

Give = Callable[[str, dict[str, Any]], None]
_MAX_ERROR_S = 5.0


@contextmanager
def opened(
    case: Case, model: ModelConfig, sizes: Sizes, device: str, tiny: bool, give: Give
) -> Iterator[LLM]:
    """The model with random weights; afterwards nothing of it is left, on the GPU either."""
    resident = round(case.resident * model.num_moe_layers * model.num_experts)
    options = {
        "device": device,
        "gpu_experts": resident,
        "max_context": sizes.context,
        "cache_tokens": sizes.context,
        "max_num_requests": sizes.batch,
        **case.engine_options(tiny),
    }
    start = time.perf_counter()
    with LLM.synthetic(model, **options) as llm:
        runner: Any = llm.engine.runner
        facts = {
            "seconds": time.perf_counter() - start,
            "layers": model.num_hidden_layers,
            "experts_on_gpu": runner.placement.num_resident,
            "routed_experts": model.num_moe_layers * model.num_experts,
            "expert_format": llm.config.expert_format,
            "dense_format": llm.config.dense_format,
            "threads": runner.pool.num_threads,
            "isa": runner.isa,
            "graphs": runner.decoding.uses_graphs,
            "hand_over": None if runner.bridge is None else _mode_of(runner.bridge.stream),
        }
        give("load", facts)
        yield llm
    del llm, runner
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_model(case: Case, sizes: Sizes, device: str, tiny: bool, give: Give) -> None:
    """Decoding, and prompts of every size."""
    with opened(case, shape_of(case, tiny), sizes, device, tiny, give) as llm:
        bench = _Bench(llm, tiny)
        give("decode", bench.decode(sizes, batch=1))
        give(f"decode xb{sizes.batch}", bench.decode(sizes, batch=sizes.batch))
        for count in prompts_of(case, tiny):
            give(f"pp{count}", bench.prefill(count))


def measure_slices(case: Case, sizes: Sizes, device: str, tiny: bool, give: Give) -> None:
    """Two slices of a model that is too large, and what they say about the whole."""
    model = shape_of(case, tiny)
    free = available_ram()
    layers = (2, 4) if tiny else slices_of(model, free)
    give("slices", {"layers": list(layers), "ram_available": free})
    steps: list[tuple[int, float]] = []
    for count in layers:
        part = replace(model, num_hidden_layers=count)
        with opened(case, part, sizes, device, tiny, give) as llm:
            bench = _Bench(llm, tiny)
            figures = bench.decode(sizes, batch=1)
            steps.append((count, figures["wall_ms"] / 1e3))
            give(f"decode of {count} layers", figures)
            if count == layers[1]:
                for size in prompts_of(case, tiny):
                    give(f"pp{size} of {count} layers", bench.prefill(size))
    whole = extrapolate(steps[0], steps[1], model.num_hidden_layers)
    give(f"decode of {model.num_hidden_layers} layers, extrapolated", whole)


def measure_soak(case: Case, sizes: Sizes, device: str, tiny: bool, give: Give) -> None:
    """Many steps, twice: times and memory stay as they are, tokens are the same."""
    with (
        opened(case, shape_of(case, tiny), sizes, device, tiny, give) as llm,
        llm.exclusive() as engine,
    ):
        _generate(engine, 3, 2)  # captures the graphs
        first, first_s = _generate(engine, sizes.soak_steps, 2)
        before = _device_memory()
        second, second_s = _generate(engine, sizes.soak_steps, 2)
        give(
            "soak",
            {
                **drift(first_s[1:] + second_s[1:], sizes.soak_part),
                "tokens": sum(map(len, first)),
                "tokens_equal": first == second,
                "memory_before": before,
                "memory_after": _device_memory(),
            },
        )


def measure_kill(case: Case, sizes: Sizes, device: str, tiny: bool, give: Give) -> None:
    """A worker that throws, in the middle of a prompt and of a graph; then a pool that is gone."""
    with (
        opened(case, shape_of(case, tiny), sizes, device, tiny, give) as llm,
        llm.exclusive() as engine,
    ):
        runner: Any = engine.runner
        for name, count in (("prompt", 16), ("decode", 1)):
            with _batch(engine, count) as batch:
                for _ in range(3):
                    good = runner.execute(batch)
                runner.bridge._native.fail_once(runner.bridge.num_layers - 1, 0)
                facts = _until_error(runner, batch)
                facts["recovers"] = torch.equal(runner.execute(batch), good)
                give(f"failing worker, {name}", facts)
        with _batch(engine, 1) as batch:
            runner.pool.close()
            give("pool that is gone, decode", _until_error(runner, batch))


@contextmanager
def _batch(engine: Engine, count: int) -> Iterator[Batch]:
    """A request of so many tokens."""
    with engine.scratch_request(list(range(3, 3 + count))) as request:
        yield Batch.build([request], [count], block_size=engine.config.block_size)


def _until_error(runner: Any, batch: Batch) -> dict[str, Any]:
    start = time.monotonic()
    try:
        runner.execute(batch)
    except RuntimeError as error:
        seconds = time.monotonic() - start
        return {"seconds": seconds, "error": str(error), "in_time": seconds < _MAX_ERROR_S}
    return {"seconds": None, "error": "none came", "in_time": False}


KINDS = {
    "model": measure_model,
    "slices": measure_slices,
    "soak": measure_soak,
    "kill": measure_kill,
}


class _Bench:
    """The profile of a model, its figures beside ceilings of the same minute."""

    def __init__(self, llm: LLM, tiny: bool):
        self._llm, self._tiny = llm, tiny
        self._profile = Profile(llm.engine)
        runner: Any = llm.engine.runner
        self._meter = Meter(runner.pool, isa=runner.isa, num_bytes=1 << 24 if tiny else None)
        self._gpu: dict[str, float | None] = {}
        if runner.device.type == "cuda":
            from moejet.gpu_ceilings import measure_gpu

            self._gpu = measure_gpu(runner.device)
            torch.cuda.reset_peak_memory_stats(runner.device)

    def decode(self, sizes: Sizes, batch: int) -> dict[str, Any]:
        depth = min(sizes.depth, sizes.context // batch - 2 * sizes.decode_steps - 64)
        readings = self._profile.decode(sizes.decode_steps, max(depth, 0), batch)
        return {"depth": depth, "batch": batch, **self._figures(readings)}

    def prefill(self, count: int) -> dict[str, Any]:
        """Long prompts once: a shorter one has warmed up all but the last chunk's sizes."""
        few = 1 if count > 2048 else 3
        return self._figures(self._profile.prefill(few, count, warm_up=min(count, 2048)))

    def _figures(self, readings: Any) -> dict[str, Any]:
        read = self._meter.read(0.02 if self._tiny else 0.2).value
        figures = derive(readings, Ceilings(dram_read=read, **self._gpu), self._profile.vram())
        return {**figures, "samples_ms": [1e3 * s for s in readings.wall_s]}


def _generate(engine: Engine, steps: int, requests: int) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens of `requests` prompts, and the seconds of every step."""
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    ids = [engine.add_request([5 + i, 17, 40 + i], params) for i in range(requests)]
    tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
    seconds = []
    while engine.has_work:
        start = time.perf_counter()
        deltas = engine.step()
        seconds.append(time.perf_counter() - start)
        for delta in deltas:
            tokens[delta.request_id] += delta.token_ids
    return list(tokens.values()), seconds


def _device_memory() -> dict[str, int] | None:
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return {"allocated": allocated, "reserved": reserved, "device_used": total - free}


def _mode_of(stream: Any) -> str:
    return str(getattr(stream, "mode", "simulated"))


def summary(figures: dict[str, Any]) -> str:
    """One line for people."""
    words = {
        "wall_ms": "{:.2f} ms",
        "tokens_per_s": "{:.1f} tokens/s",
        "cpu_share": "CPU {:.0%} of it",
        "cpu_of_dram": "at {:.0%} of DRAM",
        "overlap": "overlap {:.0%}",
        "handover_us": "hand-over {:.1f} us",
        "copy_of_ceiling": "copies at {:.0%} of PCIe",
        "drift": "drift {:+.1%}",
        "tokens_equal": "tokens equal: {}",
        "in_time": "in time: {}",
        "seconds": "{:.2f} s",
        "status": "{}",
    }
    shown = [
        text.format(figures[key]) for key, text in words.items() if figures.get(key) is not None
    ]
    return ", ".join(shown)
