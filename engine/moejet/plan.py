"""Where every gigabyte of a model goes, whether it fits, and how fast it will be: before anything is loaded.

`make_plan` needs a model's configuration and this machine's figures, no weights. The same plan is made before every
load and refuses what cannot fit. Memory is that of `ModelCost` plus what a step needs and the process itself, each at
its most: full batches, full contexts.

Speed. One token reads its active weights and the cache once; a prompt multiplies them. With read rate B and arithmetic
ceiling P of the machine, and the shares of them that this version's kernels reach (`bench/LOG.md`),

    decode    bytes / (B * 0.75) + attention operations / (P_attention * 0.6) + 12 us per layer + 0.4 ms
    prefill   operations / (P * 0.55), or reading all experts if that takes longer

With a GPU, decode is what the CPU's share of the experts allows, bytes / (B * 0.75) + 12 us per layer + 0.4 ms; the
GPU's own time is not predicted, nor are prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moejet.config import EngineConfig, ExpertFormat, ModelConfig
from moejet.model_cost import ModelCost

GIB = 2**30
_DECODE_SHARE = 0.75
_ATTENTION_SHARE = 0.6
_PREFILL_SHARE = 0.55
_LAYER_SECONDS = 12e-6
_STEP_SECONDS = 0.4e-3
# Python, torch and this package with its threads, before a model is there; and a byte-level BPE tokenizer per token.
_PROCESS_BYTES, _TOKENIZER_BYTES = 260 << 20, 780
_PROMPT_TOKENS = 512
# As in csrc/moe.cpp and linear.cpp: tokens and routed rows of one chunk.
_CHUNK_TOKENS, _CHUNK_ROWS = 1024, 8192
# As in csrc/attention.cpp: rows (of all heads) and split sums that are there at one time, and the ways to split.
_WAVE_ROWS, _WAVE_PARTIALS, _MIN_SPLIT_KEYS, _MAX_SPLITS = 8192, 16 << 20, 128, 64
_CONTEXT_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes memory; `place` is "RAM" or "VRAM"."""

    name: str
    place: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan is made for; None where it is unknown.

    read_gbps: reading memory, all threads · expert_tops, attention_tflops: multiply-adds in the arithmetic of experts
    and of attention, in 10^12 operations per second.
    """

    ram_bytes: int | None = None
    vram_bytes: int | None = None
    read_gbps: float | None = None
    expert_tops: float | None = None
    attention_tflops: float | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted tokens per second of one request, `depth` tokens into its context."""

    depth: int
    decode: float | None
    prefill: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of a model in memory, and what follows from them."""

    model: str
    expert_format: str
    dense_format: str
    cache_tokens: int
    parts: tuple[Part, ...]
    machine: Machine
    speeds: tuple[Speed, ...]
    gpu_experts: int  # of all layers, that would fit into VRAM
    advice: tuple[str, ...]

    def bytes_in(self, place: str) -> int:
        return sum(part.num_bytes for part in self.parts if part.place == place)

    @property
    def fits(self) -> bool:
        """True as well where it is not known how much memory there is."""
        ram, vram = self.machine.ram_bytes, self.machine.vram_bytes
        return (ram is None or self.bytes_in("RAM") <= ram) and (
            vram is None or self.bytes_in("VRAM") <= vram
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "ram_bytes": self.bytes_in("RAM"),
            "vram_bytes": self.bytes_in("VRAM"),
            "fits": self.fits,
        }


def make_plan(
    model_config: ModelConfig,
    config: EngineConfig,
    *,
    machine: Machine,
    cache_tokens: int,
    depths: Sequence[int] = (0,),
) -> Plan:
    """The plan of one configuration, "auto" formats resolved.

    cache_tokens: capacity of the latent cache · depths: contexts for which speed is predicted.
    """
    config = config.for_model(model_config)
    parts, gpu_experts = _parts(model_config, config, machine, cache_tokens)
    plan = Plan(
        model=config.model,
        expert_format=config.expert_format,
        dense_format=config.dense_format,
        cache_tokens=cache_tokens,
        parts=parts,
        machine=machine,
        speeds=tuple(_speed(model_config, config, machine, depth, gpu_experts) for depth in depths),
        gpu_experts=gpu_experts,
        advice=(),
    )
    return plan if plan.fits else replace(plan, advice=_advice(plan, model_config, config))


def _parts(
    model_config: ModelConfig, config: EngineConfig, machine: Machine, cache_tokens: int
) -> tuple[tuple[Part, ...], int]:
    cost = ModelCost.of(model_config, config)
    cache = cache_tokens * cost.latent_bytes
    buffers = step_bytes(model_config, config, cache_tokens)
    logits = logits_bytes(model_config, config)
    process = Part("process, tokenizer", "RAM", process_bytes(model_config))
    experts = round(cost.routed_bytes)
    if machine.vram_bytes is not None:
        return _gpu_parts(model_config, config, machine.vram_bytes, cache_tokens)
    return (
        Part("routed experts", "RAM", experts),
        Part("attention, shared experts, output", "RAM", round(cost.packed_bytes)),
        Part("embedding, routers", "RAM", round(cost.dense_bytes - cost.packed_bytes)),
        Part("latent cache", "RAM", cache),
        Part("buffers of a step", "RAM", buffers),
        Part("logits", "RAM", logits),
        process,
    ), 0


def _gpu_parts(
    model_config: ModelConfig, config: EngineConfig, vram_bytes: int, cache_tokens: int
) -> tuple[tuple[Part, ...], int]:
    from moejet.gpu_memory import RESERVE_BYTES, GpuMemory

    memory = GpuMemory.of(model_config, config, vram_bytes=vram_bytes, cache_tokens=cache_tokens)
    on_gpu = memory.placement.num_resident
    all_experts = model_config.num_moe_layers * model_config.num_experts
    table = model_config.vocab_size * model_config.hidden_size
    slots = []
    if num := memory.placement.num_cached:
        slots.append(Part(f"copies of up to {num} others", "VRAM", memory.expert_cache))
    return (
        Part("attention, shared experts, routers, output", "VRAM", memory.dense),
        Part("latent cache", "VRAM", memory.cache),
        Part("buffers of a step", "VRAM", memory.buffers),
        Part("kernels and reserve", "VRAM", RESERVE_BYTES),
        Part(f"{on_gpu} of {all_experts} routed experts", "VRAM", memory.experts),
        *slots,
        Part("ring for streamed experts", "VRAM", memory.ring),
        Part("the other routed experts", "RAM", memory.cpu_experts),
        Part("embedding", "RAM", 2 * table),
        Part("buffers of the CPU's share", "RAM", expert_scratch_bytes(model_config, config)),
        Part("pinned buffers", "RAM", memory.pinned),
        Part("process, tokenizer", "RAM", process_bytes(model_config)),
    ), on_gpu


def process_bytes(model_config: ModelConfig) -> int:
    """What is there before the model's weights are."""
    return _PROCESS_BYTES + _TOKENIZER_BYTES * model_config.vocab_size


def logits_bytes(model_config: ModelConfig, config: EngineConfig) -> int:
    """fp32 logits of a step with max_num_requests, the rows that are sampled, and as much that the heap keeps."""
    return 3 * 4 * config.max_num_requests * model_config.vocab_size


def step_bytes(model_config: ModelConfig, config: EngineConfig, cache_tokens: int) -> int:
    """Activations of a step of max_batch_tokens, and the kernels' scratch memory."""
    c, tokens = model_config, config.max_batch_tokens
    heads = c.num_attention_heads
    columns = 5 * c.hidden_size + (c.q_lora_rank or 1) + c.latent_dim + c.num_experts
    columns += heads * (c.qk_head_dim + c.v_head_dim) + 2 * c.num_experts_per_tok
    scratch = expert_scratch_bytes(c, config)
    return round(4 * tokens * columns) + scratch + _attention_bytes(c, config, cache_tokens)


def expert_scratch_bytes(c: ModelConfig, config: EngineConfig) -> int:
    """The CPU kernels' scratch memory for experts."""
    tokens = config.max_batch_tokens
    chunk = min(tokens, _CHUNK_TOKENS, max(1, _CHUNK_ROWS // max(c.num_experts_per_tok, 1)))
    rows = chunk * max(c.num_experts_per_tok, 1)
    # int8 with a scale and an offset for 32, or fp32.
    formats = {name for pair in config.for_model(c).expert_formats_of(c) for name in pair}
    value = 4.0 if formats & {"fp8", "bf16", "fp32"} else 1.25
    scratch = value * (chunk * c.hidden_size + rows * c.moe_intermediate_size)
    # Shared experts run beside the routed ones, in memory of their own.
    scratch += value * chunk * (c.hidden_size + c.num_shared_experts * c.moe_intermediate_size)
    return round(scratch)


def _attention_bytes(c: ModelConfig, config: EngineConfig, cache_tokens: int) -> int:
    """Scratch memory of the form that takes most: queries in latent space, or keys and values rebuilt."""
    heads = c.num_attention_heads
    rows = min(_WAVE_ROWS, config.max_batch_tokens * heads)
    values = 3 * rows * c.kv_lora_rank  # into latent space, out of it, and its sums
    requests = 1
    while (
        requests <= config.max_num_requests
    ):  # that share the cache, each behind a context of its part
        context, splits = cache_tokens // requests, 1
        groups = -(-heads // 128)
        while (
            16 * splits**2 < context
            and 2 * splits * _MIN_SPLIT_KEYS <= context
            and 2 * splits * groups <= _MAX_SPLITS
        ):
            splits *= 2
        rows = min(_WAVE_ROWS, requests * heads)
        partials = min(_WAVE_PARTIALS, splits * rows * c.kv_lora_rank)
        values = max(values, 2 * rows * c.kv_lora_rank + partials)
        requests *= 2
    # bf16, and packed once more.
    rebuilt = 2 * _CONTEXT_BLOCK * heads * 2 * (c.qk_head_dim + c.v_head_dim)
    return max(4 * values, rebuilt)


def _speed(
    model_config: ModelConfig,
    config: EngineConfig,
    machine: Machine,
    depth: int,
    gpu_experts: int,
) -> Speed:
    cost = ModelCost.of(model_config, config)
    if machine.vram_bytes is not None:
        return Speed(depth, _hybrid_decode(cost, machine, gpu_experts), None)
    decode = prefill = None
    read = None if machine.read_gbps is None else machine.read_gbps * 1e9
    peak = None if machine.expert_tops is None else machine.expert_tops * 1e12
    attention = None if machine.attention_tflops is None else machine.attention_tflops * 1e12
    if read is not None:
        seconds = cost.decode_bytes(0) / (read * _DECODE_SHARE)
        seconds += _STEP_SECONDS + model_config.num_hidden_layers * _LAYER_SECONDS
        reading = depth * cost.latent_bytes / (read * _DECODE_SHARE)
        operations = cost.decode_operations(depth) - cost.decode_operations(0)
        computing = 0.0 if attention is None else operations / (attention * _ATTENTION_SHARE)
        decode = 1.0 / (seconds + max(reading, computing))
    if peak is not None and read is not None:
        linear = cost.prefill_operations(_PROMPT_TOKENS)
        more = cost.prefill_operations(_PROMPT_TOKENS, depth) - linear
        slower = min(peak, attention or peak)
        seconds = linear / (peak * _PREFILL_SHARE) + more / (slower * _PREFILL_SHARE)
        prefill = _PROMPT_TOKENS / max(seconds, cost.weight_bytes / read)
    return Speed(depth, decode, prefill)


def _hybrid_decode(cost: ModelCost, machine: Machine, gpu_experts: int) -> float | None:
    """Tokens per second at which the CPU computes its experts; None if it has none. The GPU may take longer."""
    c = cost.config
    share = 1.0 - gpu_experts / max(1, c.num_moe_layers * c.num_experts)
    if machine.read_gbps is None or share <= 0.0:
        return None
    asked = c.num_moe_layers * c.num_experts_per_tok * cost.expert_bytes * share
    seconds = asked / (machine.read_gbps * 1e9 * _DECODE_SHARE)
    return 1.0 / (seconds + _STEP_SECONDS + c.num_moe_layers * _LAYER_SECONDS)


def _advice(plan: Plan, model_config: ModelConfig, config: EngineConfig) -> tuple[str, ...]:
    """Changes that would make it fit, each on its own; if none does, how much memory is missing."""
    found = []
    formats: tuple[ExpertFormat, ...] = ("int8", "int4_g32")
    cost = ModelCost.of(model_config, config)
    for name in formats:
        smaller = ModelCost.of(model_config, replace(config, expert_format=name))
        saves = smaller.expert_bytes < cost.expert_bytes
        if saves and _would_fit(plan, model_config, config, expert_format=name):
            found.append(f"expert_format={name!r}")
            break
    if config.dense_format != "int4_g32" and _would_fit(
        plan, model_config, config, dense_format="int4_g32"
    ):
        found.append("dense_format='int4_g32'")
    if config.cache_dtype != "fp8" and _would_fit(plan, model_config, config, cache_dtype="fp8"):
        found.append("cache_dtype='fp8'")
    place = "RAM" if plan.machine.vram_bytes is None else "VRAM"
    limit = plan.machine.ram_bytes if place == "RAM" else plan.machine.vram_bytes
    if limit is not None:
        cache = plan.cache_tokens * cost.latent_bytes
        tokens = (limit - plan.bytes_in(place) + cache) // cost.latent_bytes
        if 1024 <= tokens < plan.cache_tokens:
            found.append(f"max_context (and cache_tokens) of {tokens // 1024 * 1024}")
    if found:
        return ("one of: " + "; ".join(found),)
    missing = [
        f"{(plan.bytes_in(place) - limit) / GIB:.1f} GiB more {place}"
        for place, limit in (("RAM", plan.machine.ram_bytes), ("VRAM", plan.machine.vram_bytes))
        if limit is not None and plan.bytes_in(place) > limit
    ]
    return (" and ".join(missing) + ", or a smaller model",)


def _would_fit(plan: Plan, model_config: ModelConfig, config: EngineConfig, **change: Any) -> bool:
    parts, _ = _parts(model_config, replace(config, **change), plan.machine, plan.cache_tokens)
    return replace(plan, parts=parts).fits
