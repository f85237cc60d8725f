"""What an engine runs with, in one line: formats, memory, threads, context, place, and what decided where it shows."""

from __future__ import annotations

from moejet import topology
from moejet.config import ModelConfig
from moejet.engine import Engine
from moejet.experts.cpu_experts import available_cpus
from moejet.extension import resolve_isa
from moejet.gpu_loading import gpu_obstacle
from moejet.gpu_runner import GpuRunner
from moejet.model_cost import ModelCost
from moejet.progress import counted, gib


def describe_choices(engine: Engine) -> str:
    """Such as "int4_g32 experts, int8 dense (from bf16): 8.7 of 31.3 GiB RAM · 8 threads, avx512 · ..."."""
    return " · ".join((_weights(engine), _compute(engine), _context(engine), _place(engine)))


def _weights(engine: Engine) -> str:
    config, model = engine.config, engine.model_config
    cost = ModelCost.of(model, config)
    num_bytes = cost.weight_bytes
    if isinstance(engine.runner, GpuRunner) and (memory := engine.runner.memory) is not None:
        num_bytes = memory.cpu_experts + 2 * model.vocab_size * model.hidden_size
    experts = sorted({name for pair in cost.expert_formats for name in pair})
    dense = sorted({cost.dense_format, *cost.dense_formats.values()})
    total = _ram_bytes()
    of = "" if total is None else f" of {gib(total)}"
    names = f"{'/'.join(experts)} experts, {'/'.join(dense)} dense ({_source(model, experts)})"
    return f"{names}: {gib(num_bytes)}{of} RAM"


def _source(model: ModelConfig, experts: list[str]) -> str:
    given = {None: "bf16", "int4": "int4_g32"}.get(model.quantization, model.quantization)
    is_kept = experts == [given] or (given == "gguf" and set(experts) - {"int4_g32", "int8"})
    return "as in the checkpoint" if is_kept else f"from {given}"


def _ram_bytes() -> int | None:
    """This machine's memory, or what a control group leaves of it."""
    limits = (topology.memory().total_bytes, topology.cgroup_limits().memory_limit_bytes)
    return min((limit for limit in limits if limit is not None), default=None)


def _compute(engine: Engine) -> str:
    num_threads, isa = engine.runner.pool.num_threads, engine.runner.isa
    cores, widest = len(available_cpus()), resolve_isa("auto")
    per_core = "one per core" if num_threads == cores else f"cores: {cores}"
    threads = f"{counted(num_threads, 'thread')} ({per_core})"
    return f"{threads}, {isa}" + ("" if isa == widest else f" (widest: {widest})")


def _context(engine: Engine) -> str:
    limit, cache = engine.model_config.max_position_embeddings, engine.runner.latent_cache
    of = "" if engine.max_context == limit else f" of {limit}"
    size = gib(cache.numel() * cache.element_size())
    return f"context {engine.max_context}{of} (cache {size})"


def _place(engine: Engine) -> str:
    runner, model = engine.runner, engine.model_config
    if isinstance(runner, GpuRunner):
        num = model.num_moe_layers * model.num_experts
        where = f"{runner.placement.num_resident} of {num} experts and the rest"
        used = 0 if runner.memory is None else runner.memory.on_device
        return f"GPU: {where}, {gib(used)} of {gib(runner.vram_bytes)}"
    reason = gpu_obstacle(engine.config, model, "cuda")
    return f"no GPU: {reason}" if reason else "no GPU, as asked"
