"""Whether a model runs on a GPU, and the runner for one."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moejet.config import EngineConfig, ModelConfig
from moejet.environment import env_device
from moejet.experts.bridge import CpuBridge, CudaStream, Stream
from moejet.experts.cache_policy import CachePolicy
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.expert_cache import CudaFetchStream, ExpertCache, FetchStream
from moejet.experts.expert_ring import ExpertRing
from moejet.experts.hybrid_experts import HybridExperts
from moejet.experts.placement import Placement
from moejet.experts.resident_experts import ResidentExperts
from moejet.experts.simulated_stream import SimulatedFetchStream, SimulatedStream
from moejet.gpu_memory import (
    FETCH_BYTES,
    RESERVE_BYTES,
    GpuMemory,
    bridge_tokens,
    fetch_buffers,
    ring_size,
)
from moejet.gpu_runner import GpuRunner
from moejet.layers.gpu import GpuDenseWeights
from moejet.models.deepseek import DeepseekForCausalLM
from moejet.plan import GIB

if TYPE_CHECKING:
    from moejet._C import ThreadPool

logger = logging.getLogger(__name__)

# The simulated device is for comparisons with exact results.
ACTIVATIONS = {"cuda": torch.bfloat16, "cpu": torch.float32}
# Swaps of the expert cache: a choice takes 0.3 ms for 58 layers of 256 experts (2 GHz core).
_STEPS_OF_A_CHOICE = 4
# Of a simulated device, where vram_gib does not say.
_SIMULATED_BYTES = 64 * GIB
# What is free changes a little from start to start. Placements, and with them the packed cache, had better not.
_BUDGET_STEP = 256 << 20


def choose_device(config: EngineConfig, model_config: ModelConfig) -> str:
    """ "cpu", "cuda" or "simulated". Raises ValueError where the options ask for what cannot be.

    config: as `for_model` returns it.
    """
    wanted = env_device() if config.device == "auto" else config.device
    obstacle = "" if wanted == "cpu" else gpu_obstacle(config, model_config, wanted)
    if obstacle and wanted != "auto":
        raise ValueError(f"device={wanted!r} is not possible: {obstacle}")
    if obstacle and torch.cuda.is_available():
        logger.info("the GPU is not used: %s", obstacle)
    device = "cpu" if obstacle else "cuda" if wanted == "auto" else wanted
    for name, off in (
        ("vram_gib", (None,)),
        ("gpu_experts", (None,)),
        ("expert_cache", (0, "auto")),
    ):
        if device == "cpu" and getattr(config, name) not in off:
            reason = obstacle or "the model runs on the CPU (device='cpu')"
            raise ValueError(f"{name}={getattr(config, name)!r} needs a GPU: {reason}")
    return device


def gpu_obstacle(config: EngineConfig, model_config: ModelConfig, device: str) -> str:
    """Why a GPU cannot be used, or nothing."""
    if device != "simulated":
        if not torch.cuda.is_available():
            return "torch sees no CUDA device (`moejet doctor` says why)"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
    if config.deterministic:
        return "deterministic=True is for the CPU only"
    if config.dense_format == "fp32":
        return "dense_format='fp32' is for the CPU only (use 'bf16')"
    if device == "simulated":
        return ""
    size = config.block_size
    if size & (size - 1):
        return f"block_size={size} must be a power of two there"
    for name in ("kv_lora_rank", "qk_rope_head_dim"):
        size = getattr(model_config, name)
        if size < 16 or size & (size - 1):
            return f"the model's {name}={size} must be a power of two and at least 16 there"
    if config.cache_dtype == "fp8" and model_config.kv_lora_rank < 64:
        return (
            f"cache_dtype='fp8' needs a kv_lora_rank of 64 there, not {model_config.kv_lora_rank}"
        )
    return ""


def vram_budget(config: EngineConfig, device: str) -> int:
    """Bytes of GPU memory that may be used: vram_gib, else all that is free, in steps of 256 MiB."""
    if device == "simulated":
        return _SIMULATED_BYTES if config.vram_gib is None else round(config.vram_gib * GIB)
    gc.collect()
    torch.cuda.empty_cache()  # what a model that is closed has left to torch's allocator is free too
    free, total = torch.cuda.mem_get_info()
    if config.vram_gib is None:
        return int(free - free % _BUDGET_STEP)
    budget = round(config.vram_gib * GIB)
    if budget > total:
        raise ValueError(
            f"vram_gib={config.vram_gib:g} is more than the {total / GIB:.1f} GiB of the GPU: lower it"
        )
    return budget


@dataclass(frozen=True, slots=True)
class GpuSetup:
    """A runner and what releases it."""

    runner: GpuRunner
    close: Callable[[], None]


def create_gpu_runner(
    config: EngineConfig,
    model_config: ModelConfig,
    *,
    device: str,
    num_blocks: int,
    max_context: int,
    pool: ThreadPool,
    isa: str,
) -> GpuSetup:
    """A model without its weights, on "cuda" or "simulated"; the plan has been checked."""
    budget = vram_budget(config, device)
    memory = GpuMemory.of(
        model_config, config, vram_bytes=budget, cache_tokens=num_blocks * config.block_size
    )
    close: Callable[[], None] = lambda: None  # noqa: E731
    if device == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
        _limit_memory(place, budget)
        stream: Stream = CudaStream(place)
        fetches: FetchStream = CudaFetchStream(place)
    else:
        place = torch.device("cpu")
        simulated = SimulatedStream()
        stream, close, fetches = simulated, simulated.close, SimulatedFetchStream()
    try:
        runner = _runner(
            config,
            model_config,
            place=place,
            stream=stream,
            fetches=fetches,
            placement=memory.placement,
            has_ring=memory.ring > 0,
            num_blocks=num_blocks,
            max_context=max_context,
            pool=pool,
            isa=isa,
        )
    except BaseException:
        fetches.close()
        close()
        raise
    runner.memory, runner.vram_bytes = memory, budget
    logger.info(
        "%s: %d of %d routed experts there, slots for %d others, %.2f GiB of %.2f planned",
        device,
        memory.placement.num_resident,
        model_config.num_moe_layers * model_config.num_experts,
        memory.placement.num_cached,
        memory.on_device / GIB,
        budget / GIB,
    )
    close_stream = close

    def close_all() -> None:
        try:
            runner.close()
        finally:
            close_stream()

    return GpuSetup(runner, close_all)


def _limit_memory(place: torch.device, budget: int) -> None:
    """From now on torch's allocator refuses what goes beyond the budget; the context and the kernels are not its."""
    total = torch.cuda.get_device_properties(place).total_memory
    allowed = torch.cuda.memory_reserved(place) + budget - RESERVE_BYTES // 2
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(allowed / total, 0.01)), place)


def _runner(
    config: EngineConfig,
    model_config: ModelConfig,
    *,
    place: torch.device,
    stream: Stream,
    fetches: FetchStream,
    placement: Placement,
    has_ring: bool,
    num_blocks: int,
    max_context: int,
    pool: ThreadPool,
    isa: str,
) -> GpuRunner:
    dense_format, own = config.dense_formats_of(model_config)
    dtype = ACTIVATIONS[place.type]
    dense = GpuDenseWeights(dense_format, place, dtype, own)
    formats = config.expert_formats_of(model_config)
    shape = (
        model_config.num_experts,
        model_config.hidden_size,
        model_config.moe_intermediate_size,
    )

    def make_experts(layer: int) -> HybridExperts:
        resident, cached = placement.resident[layer], placement.cached[layer]
        format, down_format = formats[layer]
        there = here = None
        if resident or cached:
            there = ResidentExperts(
                resident,
                *shape,
                format=format,
                down_format=down_format,
                device=place,
                num_free=cached,
            )
        if len(resident) < model_config.num_experts:
            here = CpuExperts(
                *shape,
                format=format,
                down_format=down_format,
                pool=pool,
                isa=isa,
                arithmetic=config.arithmetic,
            )
        return HybridExperts(here, there)

    model = DeepseekForCausalLM(
        model_config, make_experts=make_experts, dense=dense, max_context=max_context
    )
    asked = [
        moe.experts
        for moe in model.moe_layers
        if isinstance(moe.experts, HybridExperts) and moe.experts.cpu is not None
    ]
    bridge = None
    if asked:
        bridge = CpuBridge(
            [experts.cpu for experts in asked if experts.cpu is not None],
            stream,
            top_k=model_config.num_experts_per_tok,
            max_tokens=bridge_tokens(config),
            dtype=dtype,
        )
        for number, experts in enumerate(asked):
            experts.attach(bridge, number)
    size = ring_size(model_config, config) if has_ring else None
    ring = None
    if size is not None and asked:
        in_ram = [(experts.cpu, experts.in_ram) for experts in asked if experts.cpu is not None]
        ring = ExpertRing(in_ram, size, place)
        for number, experts in enumerate(asked):
            experts.attach_ring(ring, number)
    return GpuRunner(
        model,
        model_config,
        config,
        num_blocks=num_blocks,
        max_context=max_context,
        dense=dense,
        pool=pool,
        isa=isa,
        bridge=bridge,
        expert_cache=_expert_cache(model_config, config, asked, fetches),
        ring=ring,
    )


def _expert_cache(
    model_config: ModelConfig,
    config: EngineConfig,
    layers: list[HybridExperts],
    stream: FetchStream,
) -> ExpertCache | None:
    """Of those layers that have free slots."""
    layers = [layer for layer in layers if layer.resident is not None and layer.resident.num_free]
    if not layers:
        stream.close()
        return None
    residents = [layer.require_resident() for layer in layers]
    experts = [layer.require_cpu() for layer in layers]
    policy = CachePolicy(
        experts[0].weights.num_experts,
        [resident.num_free for resident in residents],
        [cpu.packed_layout.expert_bytes for cpu in experts],
        fixed=[resident.slots for resident in residents],
        bytes_per_step=FETCH_BYTES,
    )
    buffers = fetch_buffers(model_config, config)
    return ExpertCache(layers, stream, policy, num_buffers=buffers, choose_every=_STEPS_OF_A_CHOICE)
