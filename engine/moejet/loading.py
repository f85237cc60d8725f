"""Builds an engine: configuration, memory check, model, weights, cache, tokenizer."""

from __future__ import annotations

import gc
import logging
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moejet import topology
from moejet.block_pool import BlockPool
from moejet.config import DEFAULT_MAX_CONTEXT, INVARIANT_ISAS, EngineConfig, ModelConfig
from moejet.engine import Engine
from moejet.environment import env_cache_dir
from moejet.experts.cpu_experts import CpuExperts, create_pool
from moejet.extension import resolve_isa
from moejet.gpu_loading import choose_device, create_gpu_runner, vram_budget
from moejet.gpu_runner import GpuRunner
from moejet.json_file import read_json_object
from moejet.layers.dense import DenseWeights
from moejet.model_cost import ModelCost
from moejet.models.deepseek import DeepseekForCausalLM
from moejet.plan import GIB, Machine, make_plan, process_bytes
from moejet.prefix_tier import attach_prefixes, prefix_directory
from moejet.request import SamplingParams
from moejet.resolve import resolve_model
from moejet.runner import ModelRunner, Runner
from moejet.step_head import read_step_head
from moejet.tokenizer import Tokenizer
from moejet.weights.checkpoint import Checkpoint
from moejet.weights.gguf_model import GgufCheckpoint
from moejet.weights.gguf_tokenizer import gguf_tokenizer
from moejet.weights.gpu_weights import GPU_LAYOUT_VERSION
from moejet.weights.loader import load_weights
from moejet.weights.packed_cache import (
    MIN_BYTES as MIN_CACHED_BYTES,
)
from moejet.weights.packed_cache import (
    PLACEMENT,
    BackgroundWriter,
    CacheFile,
    PartlyFilled,
    cache_key,
    weights_key,
)

logger = logging.getLogger(__name__)

_DEFAULT_CACHE_TOKENS = 8192
# Random weights that are on a GPU at a time: there is little room beside a model that fills it.
_DRAWN_VALUES = 1 << 25


def load_engine(config: EngineConfig) -> Engine:
    """Loads a checkpoint. Raises ValueError with a remedy for anything wrong with it."""
    path = resolve_model(config.model, config.revision)
    checkpoint = GgufCheckpoint.open(path) if path.is_file() else None
    model_config, tokenizer = _describe(path, checkpoint)
    if checkpoint is None:
        default_params = _read_default_params(path)
    else:
        default_params = _default_params(checkpoint.generation_config, path)
    if tokenizer.vocab_size > model_config.vocab_size:
        logger.warning(
            "the tokenizer has %d tokens, the model %d",
            tokenizer.vocab_size,
            model_config.vocab_size,
        )
    config = config.for_model(model_config)
    config = replace(config, device=choose_device(config, model_config))
    if checkpoint is not None:
        checkpoint.log_conversions(config)
    engine = _create_engine(config, model_config, tokenizer)
    try:
        num_nodes = len(engine.runner.pool.memory_nodes)
        key = cache_key(path, config, model_config, num_nodes)
        file = _cache_file(engine, path, key)
        is_loaded = file is not None and _load_cached(engine, file)
    except BaseException:
        engine.close()
        raise
    if is_loaded is None:
        engine.close()
        del engine
        gc.collect()  # what is mapped, and a GPU's memory, go with it
        engine = _create_engine(config, model_config, tokenizer)
    try:
        if not is_loaded:
            _load(engine, path, checkpoint, _cache_file(engine, path, key))
        engine.runner.weights_loaded()
        attach_prefixes(engine, key | _device_key(config))
    except BaseException:
        engine.close()
        raise
    engine.default_params = default_params
    engine.step_head = read_step_head(path, model_config.hidden_size)
    if engine.step_head is not None and engine.runner.samples:
        logger.warning("the checkpoint's step head is not used on a GPU")
    return engine


def _describe(path: Path, checkpoint: GgufCheckpoint | None) -> tuple[ModelConfig, Tokenizer]:
    """Configuration and tokenizer of a directory, or of a GGUF file, which has them in its metadata."""
    if checkpoint is None:
        return ModelConfig.from_hf(path), Tokenizer.from_path(path)
    try:
        return checkpoint.config, gguf_tokenizer(checkpoint.metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load_cached(engine: Engine, file: CacheFile) -> bool | None:
    """Fills the model from the packed cache. None: it failed in the middle, the engine must be thrown away."""
    verify = engine.config.packed_cache == "verify"
    try:
        maps = not isinstance(engine.runner, GpuRunner) or engine.runner.ring is None
        is_loaded = file.load(engine.runner.model.state(), verify=verify, maps=maps)
    except PartlyFilled:
        return None
    if is_loaded:
        logger.info("mapped packed weights from %s", file.path)
    return is_loaded


def _load(
    engine: Engine, path: Path, checkpoint: Checkpoint | None, file: CacheFile | None
) -> None:
    """Fills the model from the checkpoint, and then the cache file in the background.

    checkpoint: None to open it at `path` · file: None to cache nothing.
    """
    config, model = engine.config, engine.runner.model
    checkpoint = checkpoint or Checkpoint.open(path)
    load_weights(checkpoint, model.tensor_specs(), show_progress=config.show_progress)
    if file is not None:
        engine.at_close.callback(BackgroundWriter(file, model.state()).finish)


def _cache_file(engine: Engine, path: Path, key: dict[str, Any]) -> CacheFile | None:
    """Where the packed weights of this engine are kept, None if they are not. key: of `cache_key`."""
    config, directory = engine.config, env_cache_dir()
    if config.packed_cache == "off" or directory is None:
        return None
    cost = ModelCost.of(engine.model_config, config)
    if config.packed_cache == "auto" and cost.weight_bytes < MIN_CACHED_BYTES:
        return None
    unused = 0
    if isinstance(engine.runner, GpuRunner):
        placement = engine.runner.placement
        key = key | _device_key(config) | {"gpu_layout": GPU_LAYOUT_VERSION}
        key[PLACEMENT] = [list(experts) for experts in placement.resident]
        # Layers all of whose experts live on the GPU have no memory for them here.
        some = [len(r) for r in placement.resident if len(r) < placement.num_experts]
        unused = round(sum(some) * cost.expert_bytes)
    return CacheFile(directory, config.model, key, path, unused_bytes=unused)


def _device_key(config: EngineConfig) -> dict[str, Any]:
    """What a GPU adds to what decides about latents: nothing on the CPU, so that files of earlier versions fit."""
    return {} if config.device == "cpu" else {"device": config.device}


def build_engine(config: EngineConfig, model_config: ModelConfig) -> Engine:
    """An engine of the given shape with random weights and no tokenizer."""
    config = config.for_model(model_config)
    config = replace(config, device=choose_device(config, model_config))
    engine = _create_engine(config, model_config, None)
    model = engine.runner.model
    device = engine.runner.latent_cache.device  # a GPU draws a hundred times as fast
    generator = torch.Generator(device).manual_seed(config.seed or 0)
    for name, spec in model.tensor_specs().items():
        if ".experts." not in name:
            spec.load(_random_weight(name, spec.shape, generator))
    for layer, moe in enumerate(model.moe_layers):
        moe.experts.fill_random(seed=layer + 1)
    num_nodes = len(engine.runner.pool.memory_nodes)
    sources: list[Any] = [["synthetic", config.seed or 0]]
    try:
        engine.runner.weights_loaded()
        key = weights_key(sources, config, model_config, num_nodes)
        attach_prefixes(engine, key | _device_key(config))
    except BaseException:
        engine.close()
        raise
    return engine


def _create_engine(
    config: EngineConfig, model_config: ModelConfig, tokenizer: Tokenizer | None
) -> Engine:
    max_context, num_blocks = plan_cache(config, model_config)
    if config.prefix_disk_gib:
        prefix_directory(config)
    check_memory(config, model_config, num_blocks * config.block_size)
    with ExitStack() as at_close:
        pool = create_pool(config.num_threads)
        at_close.callback(pool.close)
        isa = resolve_isa(config.isa)
        if config.deterministic and isa not in INVARIANT_ISAS:
            isa = resolve_isa(INVARIANT_ISAS[-1])
        if config.device == "cpu":
            dense_format, own = config.dense_formats_of(model_config)
            dense = DenseWeights(dense_format, pool, isa, config.arithmetic, own)
            model = create_model(config, model_config, dense, max_context)
            runner: Runner = ModelRunner(
                model, model_config, config, num_blocks=num_blocks, dense=dense
            )
        else:
            setup = create_gpu_runner(
                config,
                model_config,
                device=config.device,
                num_blocks=num_blocks,
                max_context=max_context,
                pool=pool,
                isa=isa,
            )
            runner = setup.runner
            at_close.callback(setup.close)
        engine = Engine(
            runner,
            model_config,
            config,
            block_pool=BlockPool(num_blocks, config.block_size),
            tokenizer=tokenizer,
            max_context=max_context,
        )
        engine.at_close = at_close.pop_all()
        return engine


def create_model(
    config: EngineConfig, model_config: ModelConfig, dense: DenseWeights, max_context: int
) -> DeepseekForCausalLM:
    """The model without its weights.

    config: as `for_model` returns it · dense: gives the experts its pool, isa and arithmetic too.
    """
    formats = config.expert_formats_of(model_config)
    return DeepseekForCausalLM(
        model_config,
        make_experts=lambda layer: CpuExperts(
            model_config.num_experts,
            model_config.hidden_size,
            model_config.moe_intermediate_size,
            format=formats[layer][0],
            down_format=formats[layer][1],
            pool=dense.pool,
            isa=dense.isa,
            arithmetic=dense.arithmetic,
        ),
        dense=dense,
        max_context=max_context,
    )


def plan_cache(config: EngineConfig, model_config: ModelConfig) -> tuple[int, int]:
    """(max_context, number of cache blocks). Raises ValueError where the options contradict each other."""
    limit = model_config.max_position_embeddings
    if config.max_context is not None and config.max_context > limit:
        raise ValueError(
            f"max_context={config.max_context} exceeds the model's max_position_embeddings={limit}: "
            "lower max_context"
        )
    max_context = config.max_context or min(limit, DEFAULT_MAX_CONTEXT)
    cache_tokens = config.cache_tokens or max(max_context, _DEFAULT_CACHE_TOKENS)
    if config.max_context is not None and cache_tokens < config.max_context:
        raise ValueError(
            f"cache_tokens={cache_tokens} cannot hold one request of max_context="
            f"{config.max_context}: raise cache_tokens or lower max_context"
        )
    return min(max_context, cache_tokens), math.ceil(cache_tokens / config.block_size)


def check_memory(config: EngineConfig, model_config: ModelConfig, cache_tokens: int) -> None:
    """Raises ValueError if the plan exceeds the memory available now, before anything is allocated."""
    # This process is there already.
    available = topology.available_bytes()
    present = process_bytes(model_config)
    on_gpu = config.device in ("cuda", "simulated")
    vram = vram_budget(config, config.device) if on_gpu else None
    machine = Machine(None if available is None else available + present, vram)
    plan = make_plan(model_config, config, machine=machine, cache_tokens=cache_tokens)
    if plan.fits:
        return
    is_short = vram is not None and plan.bytes_in("VRAM") > vram
    place = "VRAM" if is_short else "RAM"
    needed = plan.bytes_in(place) - (0 if is_short else present)
    found = vram if is_short else available
    parts = ", ".join(
        f"{part.name} {part.num_bytes / GIB:.1f}"
        for part in plan.parts
        if part.num_bytes >= GIB / 20
        and not part.name.startswith("process")
        and (part.place == place or vram is None)
    )
    of = "of GPU memory " if is_short else ""
    raise ValueError(
        f"the model needs {needed / GIB:.1f} GiB {of}({parts}; experts "
        f"as {plan.expert_format}, other weights as {plan.dense_format}, cache for "
        f"{cache_tokens} tokens), and {(found or 0) / GIB:.1f} GiB are available: use "
        + "; ".join(plan.advice)
    )


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values that keep activations near unit size: norms 1, biases 0, matrices uniform with variance 1 / fan-in."""
    if "norm" in name:
        return torch.ones(shape)
    if len(shape) == 1:
        return torch.zeros(shape)
    fan_in = 1 if name.endswith("embed_tokens.weight") else shape[-1]
    limit = math.sqrt(3.0 / fan_in)
    values = torch.empty(shape, dtype=torch.bfloat16)
    if generator.device.type == "cpu":
        return values.uniform_(-limit, limit, generator=generator)
    for part in torch.split(values.view(-1), _DRAWN_VALUES):
        drawn = torch.empty(part.shape, dtype=part.dtype, device=generator.device)
        part.copy_(drawn.uniform_(-limit, limit, generator=generator))
    return values


def _read_default_params(path: Path) -> SamplingParams:
    """The sampling that generation_config.json recommends."""
    file = path / "generation_config.json"
    if not file.is_file():
        return SamplingParams()
    raw = read_json_object(file)
    if raw.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    return _default_params(raw, file)


def _default_params(raw: dict[str, Any], file: Path) -> SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen = {name: raw[name] for name in names if raw.get(name) is not None}
    try:
        return SamplingParams(**chosen)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
