"""What a model takes of a GPU's memory, and of RAM beside it, before anything is loaded.

Weights are counted by making the layers without memory (device "meta"): the plan has what the engine will have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moejet.config import DEFAULT_MAX_CONTEXT, FORMAT_BITS, EngineConfig, ModelConfig
from moejet.device_batch import MAX_ABSORBED_TOKENS, padded_sizes
from moejet.experts.expert_cache import table_row
from moejet.experts.placement import Placement, counts_that_fit
from moejet.experts.resident_experts import resident_bytes
from moejet.experts.ring_size import RingSize
from moejet.layers.gpu import GpuDenseWeights
from moejet.layers.linear import Linear, RMSNorm
from moejet.model_cost import ModelCost
from moejet.models.deepseek import DecoderLayer
from moejet.weights.packed_layout import PackedLayout

# CUDA's context and kernels, graphs, fragments of the allocator.
RESERVE_BYTES = 1 << 30
_EXPANDED_BYTES = 256 << 20
# With expert_cache="auto", of what is left for experts.
_CACHE_SHARE = 0.5
# Fetches of one step, and buffers for packed experts on their way.
FETCH_BYTES, _MOST_BUFFERS = 256 << 20, 8
# As in kernels/linear.py and moe_experts.py; logits as in gpu_runner.py.
_SLAB_BYTES, _DOWN_BYTES, _LOGITS_BYTES = 24 << 20, 64 << 20, 64 << 20


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes on the GPU (dense, .., ring) and in RAM (cpu_experts, pinned), and who lives where.

    expert_cache: slots for copies of experts, and what fetches need · ring: that experts in RAM stream through; none
    where all live on the GPU.
    """

    dense: int
    cache: int
    buffers: int
    experts: int
    expert_cache: int
    ring: int
    cpu_experts: int
    pinned: int
    placement: Placement

    @classmethod
    def of(
        cls, model: ModelConfig, config: EngineConfig, *, vram_bytes: int, cache_tokens: int
    ) -> GpuMemory:
        """With as many experts on the GPU as fit, or gpu_experts and expert_cache of them even if they do not."""
        config = config.for_model(model)
        dense, buffers = dense_bytes(model, config, cache_tokens), step_bytes(model, config)
        cache = cache_tokens * ModelCost.of(model, config).latent_bytes
        formats = config.expert_formats_of(model)
        sizes = [
            resident_bytes(model.hidden_size, model.moe_intermediate_size, *f) for f in formats
        ]
        left = vram_bytes - dense - cache - buffers - RESERVE_BYTES
        counts, cached = _divide(model, config, sizes, left)
        ring = None
        if any(count < model.num_experts for count in counts):
            ring = ring_size(model, config)
        if ring is not None:
            counts, cached = _divide(model, config, sizes, left - ring.device_bytes)
        matrix = model.hidden_size * model.moe_intermediate_size
        in_ram = 0.0
        for count, (gate_up, down) in zip(counts, formats, strict=True):
            bits = 2 * FORMAT_BITS[gate_up] + FORMAT_BITS[down]
            in_ram += (model.num_experts - count) * matrix * bits / 8
        return cls(
            dense=dense,
            cache=cache,
            buffers=buffers,
            experts=sum(size * count for size, count in zip(sizes, counts, strict=True)),
            expert_cache=cache_bytes(model, config, sizes, cached),
            ring=0 if ring is None else ring.device_bytes,
            cpu_experts=round(in_ram),
            pinned=pinned_bytes(model, config, has_cache=any(cached))
            + (0 if ring is None else ring.host_bytes),
            placement=Placement.of_counts(model.num_experts, counts, cached),
        )

    @property
    def on_device(self) -> int:
        """All of it, the reserve included."""
        weights = self.dense + self.experts + self.expert_cache + self.ring
        return weights + self.cache + self.buffers + RESERVE_BYTES


def ring_size(model: ModelConfig, config: EngineConfig) -> RingSize | None:
    """Of the ring for experts in RAM; None where none ever stream. config: as `for_model` returns it.

    Experts in fp32 would become int8 on the way: nobody who wants fp32 wants that, unless it is asked for.
    """
    formats = config.expert_formats_of(model)
    wanted = config.stream_prefill_tokens
    is_exact = any("fp32" in pair for pair in formats)
    if wanted == 0 or not formats or (wanted == "auto" and is_exact):
        return None
    shape = (model.hidden_size, model.moe_intermediate_size, model.num_experts)
    return RingSize.of(*shape, formats)


def _divide(
    model: ModelConfig, config: EngineConfig, sizes: Sequence[int], left: int
) -> tuple[list[int], list[int]]:
    """(experts that live on the GPU, slots for copies) of each layer, of `left` bytes."""
    everything, wanted = sum(sizes) * model.num_experts, config.expert_cache
    cached = [0] * len(sizes)
    if wanted == "auto" and any("fp32" in pair for pair in config.expert_formats_of(model)):
        wanted = 0  # they would become int8, as in `ring_size`
    if isinstance(wanted, int):
        cached = counts_that_fit(sizes, model.num_experts, everything, wanted)
    overhead = 0
    if wanted and (wanted != "auto" or left < everything):
        overhead = cache_bytes(model, config, sizes, [1] * len(sizes)) - sum(sizes)
    if config.gpu_experts is not None:
        counts = counts_that_fit(sizes, model.num_experts, everything, config.gpu_experts)
    else:
        share = 0 if wanted != "auto" or left >= everything else int(left * _CACHE_SHARE)
        used = sum(size * count for size, count in zip(sizes, cached, strict=True))
        counts = counts_that_fit(sizes, model.num_experts, left - used - max(share, overhead))
    rooms = [model.num_experts - count for count in counts]
    if wanted == "auto":
        used = sum(size * count for size, count in zip(sizes, counts, strict=True))
        cached = counts_that_fit(sizes, rooms, left - used - overhead)
    return counts, [min(pair) for pair in zip(cached, rooms, strict=True)]


def packed_layouts(model: ModelConfig, config: EngineConfig) -> list[PackedLayout]:
    """Of each layer's experts on their way to the GPU."""
    shape = model.hidden_size, model.moe_intermediate_size
    return [PackedLayout(*shape, *formats) for formats in config.expert_formats_of(model)]


def cache_bytes(
    model: ModelConfig, config: EngineConfig, sizes: Sequence[int], cached: Sequence[int]
) -> int:
    """On the GPU, of so many slots in each layer: their own, a packed expert's, and the tables."""
    if not any(cached):
        return 0
    slots = sum(size * count for size, count in zip(sizes, cached, strict=True))
    tables = 2 * 4 * len(sizes) * table_row(model.num_experts)
    return slots + _largest_packed(model, config) + tables + 4 * model.num_experts


def _largest_packed(model: ModelConfig, config: EngineConfig) -> int:
    return max(layout.expert_bytes for layout in packed_layouts(model, config))


def fetch_buffers(model: ModelConfig, config: EngineConfig) -> int:
    """Pinned buffers for packed experts."""
    return max(1, min(_MOST_BUFFERS, FETCH_BYTES // _largest_packed(model, config)))


def dense_bytes(model: ModelConfig, config: EngineConfig, cache_tokens: int) -> int:
    """Everything on the GPU but experts and cache: attention, shared experts, routers, norms, output, RoPE."""
    format, own = config.dense_formats_of(model)
    check_formats(format)
    limits = (config.max_context or DEFAULT_MAX_CONTEXT, model.max_position_embeddings)
    rope = 4 * min(*limits, cache_tokens) * model.qk_rope_head_dim
    return _dense_bytes(model, format, tuple(sorted(own.items()))) + rope


def check_formats(dense_format: str) -> None:
    """Raises ValueError for a format that only the CPU has."""
    if dense_format == "fp32":
        raise ValueError("dense_format='fp32' is for the CPU only: use 'bf16', or device='cpu'")


class _NoExperts:
    """In place of a layer's routed experts, which are counted elsewhere."""

    pool = None

    def state(self, prefix: str) -> dict[str, Tensor]:
        return {}


@lru_cache(maxsize=32)
def _dense_bytes(model: ModelConfig, format: str, own: tuple[tuple[str, str], ...]) -> int:
    dense = GpuDenseWeights(format, torch.device("meta"), torch.bfloat16, dict(own))
    total = 0

    def make_experts(_: int) -> Any:
        return _NoExperts()

    for layer in range(model.num_hidden_layers):
        made = DecoderLayer(model, layer, make_experts=make_experts, dense=dense)
        total += _held(made.state(""))
    head = Linear("lm_head", model.hidden_size, model.vocab_size, dense=dense)
    total += int(head.packed.nbytes)
    return total + _held(RMSNorm(model.hidden_size, 1e-6, dense=dense).state(""))


def _held(state: dict[str, Any]) -> int:
    return sum(int(value.nbytes) for value in state.values())


def key_chunk(model: ModelConfig) -> int:
    """Keys of a prompt's attention that are expanded at a time."""
    per_key = 2 * model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
    return max(512, min(16384, _EXPANDED_BYTES // per_key))


def step_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """An upper bound of what a step of max_batch_tokens has on the GPU beside weights and cache, bf16 activations."""
    c, tokens = model, config.max_batch_tokens
    heads, hidden = c.num_attention_heads, c.hidden_size
    value = 2
    # The residual stream in fp32; embeddings, norm, attention, routed, resident and shared experts, one temporary.
    stream = tokens * hidden * (4 + 7 * value)
    q = tokens * heads * (c.qk_head_dim + c.v_head_dim) * value
    latents = tokens * ((c.q_lora_rank or 0) * 2 + c.latent_dim) * value
    chunk = key_chunk(c)
    prompt = chunk * (heads * (c.qk_nope_head_dim + c.v_head_dim) + 2 * c.latent_dim) * value
    prompt += tokens * heads * (4 * c.v_head_dim + 4)  # what carries over from chunk to chunk
    few = min(tokens, max(MAX_ABSORBED_TOKENS, config.max_num_requests))
    absorbed = few * heads * c.kv_lora_rank * (2 * value + 4 * _splits(config.max_num_requests))
    width = max(c.intermediate_size, c.num_shared_experts * c.moe_intermediate_size)
    mlp = tokens * 3 * width * value
    pairs = tokens * max(c.num_experts_per_tok, 1)
    experts = pairs * (c.moe_intermediate_size * value + 16) + _DOWN_BYTES + 4 * 512 * pairs
    logits = max(_LOGITS_BYTES, 4 * _padded(config) * c.vocab_size) * 2
    largest = max(2 * q + max(prompt, absorbed), mlp, experts)
    inputs = 2 * (_padded(config) * hidden * 4 + 4 * tokens * hidden)
    return stream + latents + largest + logits + inputs + _SLAB_BYTES


def _splits(requests: int) -> int:
    """Parts of a context that attend at the same time; many for few requests."""
    return max(1, min(64, 512 // max(requests, 1)))


def _padded(config: EngineConfig) -> int:
    return padded_sizes(min(config.max_num_requests, config.max_batch_tokens))[-1]


def bridge_tokens(config: EngineConfig) -> int:
    """Rows of the largest batch, padding included."""
    return max(config.max_batch_tokens, _padded(config))


def pinned_bytes(model: ModelConfig, config: EngineConfig, *, has_cache: bool = False) -> int:
    """Host memory that the GPU reaches: what goes to the CPU and back, a step's inputs, its logits; fetched experts."""
    rows = bridge_tokens(config)
    between = rows * (2 * 2 * model.hidden_size + 8 * model.num_experts_per_tok)
    size = between + 4 * rows * model.hidden_size + 4 * _padded(config) * model.vocab_size
    if has_cache:
        size += fetch_buffers(model, config) * _largest_packed(model, config)
        size += 2 * 4 * model.num_moe_layers * table_row(model.num_experts)
    return size


def device_tensors(runner: Any) -> Sequence[Tensor]:
    """Every tensor that a runner keeps on its device for weights and cache; for tests and reports."""
    found: list[Tensor] = [runner.latent_cache, runner.model.rope]
    for name, value in runner.model.state().items():
        if isinstance(value, Tensor) and name != "embed_tokens":
            found.append(value)
    if runner.ring is not None:
        found.extend(runner.ring.tensors)
    for moe in runner.model.moe_layers:
        if moe.experts.resident is not None:
            found.append(moe.experts.resident.slot_of_expert)
    return found if runner.expert_cache is None else found + runner.expert_cache.device_tensors
