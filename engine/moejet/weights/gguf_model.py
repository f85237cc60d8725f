"""From a GGUF file of architecture "deepseek2" to a ModelConfig and to tensors under their Hugging Face names.

llama.cpp's converter renames tensors, stacks experts, and keeps everything else: no weight is permuted, so rotary
dimensions stay interleaved as published. Since 2025 it also splits kv_b_proj [H (N + V), C] into attn_k_b [H, C, N],
transposed per head for the absorbed form, and attn_v_b [H, V, C]; both forms are read. What the format does not record
is refused unless it follows from something else, and the configuration goes through `ModelConfig.from_hf`, the one
reader of such keys.

Names and keys: gguf-py/gguf/constants.py, conversion/deepseek.py and src/models/deepseek2.cpp of
https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moejet.config import EngineConfig, ModelConfig
from moejet.presets import PRESETS
from moejet.weights.checkpoint import Checkpoint, TensorInfo
from moejet.weights.gguf import GgufFiles
from moejet.weights.gguf_formats import GgufFormats
from moejet.weights.gguf_types import SUPPORTED_TYPES, is_supported
from moejet.weights.spec import TensorSpec

logger = logging.getLogger(__name__)

ARCHITECTURE = "deepseek2"
_SOFTMAX, _SIGMOID = 1, 2
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<name>[^.]+)(\.(?P<kind>weight|bias))?")
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# Stacked experts [E, rows, K] -> what each slice of a row range is.
_EXPERTS = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
# Keys that change the result, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_group_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "interleave_moe_layer_step": (0, 1),
}
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_LISTED = 10


class GgufCheckpoint(Checkpoint):
    """A GGUF model as a checkpoint: experts one by one, names as in Hugging Face files; opens headers only."""

    described_in = "metadata"

    def __init__(
        self,
        root: Path,
        tensors: dict[str, TensorInfo],
        *,
        config: ModelConfig,
        formats: GgufFormats,
        files: GgufFiles,
    ):
        super().__init__(root, tensors)
        self.config = config
        self.formats = formats
        self.metadata = files.metadata

    @classmethod
    def open(cls, path: str | Path) -> GgufCheckpoint:
        """Opens the model that this .gguf file holds or is a shard of.

        Raises ValueError for another architecture, for metadata that describes no model that we compute exactly, and
        for tensors of a type that is not read.
        """
        root = Path(path)
        files = GgufFiles.open(root)
        try:
            config = ModelConfig.from_hf(hf_config(files.metadata, files.tensors))
            tensors = dict(_hf_tensors(files, config))
            formats = GgufFormats.of(tensors, config)
            config = dataclasses.replace(
                config,
                quantization="gguf",
                expert_formats=formats.experts,
                dense_formats=formats.dense,
            )
        except ValueError as error:
            raise ValueError(f"{root.name} cannot be loaded: {error}") from error
        return cls(root, tensors, config=config, formats=formats, files=files)

    @property
    def generation_config(self) -> dict[str, Any]:
        """The recommended sampling, spelled as generation_config.json does."""
        found = {n: self.metadata.get(f"general.sampling.{key}") for key, n in _SAMPLING.items()}
        return {
            n: _decimal(v) if isinstance(v, float) else v for n, v in found.items() if v is not None
        }

    def adapt(self, specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Wants k_b and v_b in place of kv_b where the file has those."""
        adapted: dict[str, TensorSpec] = {}
        for name, spec in specs.items():
            adapted |= {name: spec} if spec.parts is None or name in self.tensors else spec.parts
        return adapted

    def log_conversions(self, config: EngineConfig) -> None:
        """Says what does not keep the bits that it has in the file. config: with its formats decided."""
        if config.expert_format == "native" and self.formats.converted_experts:
            kinds = ", ".join(self.formats.converted_experts)
            logger.info("experts of type %s are packed as int8", kinds)
        if config.dense_format == "native" and self.formats.converted_dense:
            kinds = ", ".join(self.formats.converted_dense)
            logger.info("dense matrices of type %s are packed as int8", kinds)


def _hf_tensors(files: GgufFiles, config: ModelConfig) -> Iterator[tuple[str, TensorInfo]]:
    """(Hugging Face name, tensor or slice of one) of everything; foreign names stay, for the loader to report."""
    unsupported: list[str] = []
    for info in files.tensors.values():
        match = _BLOCK.match(info.name)
        if match is not None and int(match["layer"]) >= config.num_hidden_layers:
            # Multi-token prediction: left out by the loader, by its layer.
            name = f"model.layers.{match['layer']}.{info.name}"
            yield name, dataclasses.replace(info, name=name)
            continue
        if not is_supported(info.dtype):
            unsupported.append(f"{info.name} ({info.dtype.removeprefix('GGUF:')})")
            continue
        for named in _rename(info, config, files.tensors):
            yield named.name, named
    if unsupported:
        more = f", and {len(unsupported) - _LISTED} more" if len(unsupported) > _LISTED else ""
        raise ValueError(
            f"{len(unsupported)} tensors are of types that are not supported: "
            f"{', '.join(unsupported[:_LISTED])}{more}; supported: {', '.join(SUPPORTED_TYPES)} "
            "(use another quantisation of the model, such as Q4_K_M)"
        )


def _rename(
    info: TensorInfo, config: ModelConfig, tensors: dict[str, TensorInfo]
) -> list[TensorInfo]:
    stem, _, kind = info.name.rpartition(".")
    if stem in _TOP and kind == "weight":
        return [dataclasses.replace(info, name=f"{_TOP[stem]}.weight")]
    match = _BLOCK.fullmatch(info.name)
    if match is None:
        return [info]
    prefix, name = f"model.layers.{match['layer']}", match["name"]
    if name == "exp_probs_b":
        return [dataclasses.replace(info, name=f"{prefix}.mlp.gate.e_score_correction_bias")]
    if name in _EXPERTS and match["kind"] == "weight":
        return _experts(info, f"{prefix}.mlp.experts", _EXPERTS[name])
    if name in ("attn_k_b", "attn_v_b"):
        if f"blk.{match['layer']}.attn_kv_b.weight" in tensors:
            return []  # some files hold both forms
        if len(info.shape) == 2 and info.shape[0] % config.num_attention_heads == 0:
            heads = config.num_attention_heads
            info = dataclasses.replace(info, shape=(heads, info.shape[0] // heads, info.shape[1]))
    if name not in _IN_LAYER or match["kind"] is None:
        return [info]
    return [dataclasses.replace(info, name=f"{prefix}.{_IN_LAYER[name]}.{match['kind']}")]


def _experts(info: TensorInfo, prefix: str, parts: tuple[str, ...]) -> list[TensorInfo]:
    """Slices [rows, K] of [E, rows * parts, K]; blocks lie within rows, so every slice is contiguous."""
    if len(info.shape) != 3 or info.shape[1] % len(parts):
        raise ValueError(f"{info.name} is {list(info.shape)}, not [experts, rows, columns]")
    num_experts, rows, columns = info.shape
    num_bytes = info.num_bytes // (num_experts * len(parts))
    return [
        TensorInfo(
            f"{prefix}.{expert}.{part}.weight",
            info.dtype,
            (rows // len(parts), columns),
            info.file,
            info.offset + (expert * len(parts) + i) * num_bytes,
            num_bytes,
        )
        for expert in range(num_experts)
        for i, part in enumerate(parts)
    ]


def hf_config(metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    """What config.json would say; ValueError names key and value where it cannot be known or is not computed."""
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"general.architecture={architecture!r} is not supported; supported: {ARCHITECTURE!r} "
            "(DeepSeek-V2, V3, R1, Kimi-K2, Moonlight, GLM-4.7-Flash)"
        )
    meta = _Metadata(metadata)
    for key, neutral in _NEUTRAL.items():
        value = metadata.get(f"{ARCHITECTURE}.{key}", neutral[0])
        if not isinstance(value, int | float) or value not in neutral:
            raise ValueError(f"{ARCHITECTURE}.{key}={value!r} is not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("tensor token_embd.weight is missing or no matrix")
    rope_dim = meta.integer("rope.dimension_count")
    key_length = meta.integer("attention.key_length_mla", meta.integer("attention.key_length", 0))
    if key_length <= rope_dim:
        raise ValueError(f"key length {key_length} does not exceed rope.dimension_count={rope_dim}")
    num_layers = _num_layers(meta, tensors)
    config: dict[str, Any] = {
        "vocab_size": meta.integer("vocab_size", embedding.shape[0]),
        "hidden_size": meta.integer("embedding_length"),
        "intermediate_size": meta.integer("feed_forward_length"),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": meta.integer("block_count") - num_layers,
        "num_attention_heads": meta.integer("attention.head_count"),
        "q_lora_rank": meta.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": meta.integer("attention.kv_lora_rank"),
        "qk_nope_head_dim": key_length - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": meta.integer(
            "attention.value_length_mla", meta.integer("attention.value_length", 0)
        ),
        "n_routed_experts": meta.integer("expert_count"),
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "n_shared_experts": meta.integer("expert_shared_count", 0),
        "first_k_dense_replace": meta.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": meta.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": meta.flag("expert_weights_norm", default=False),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.integer("context_length"),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(meta),
        "rope_interleave": True,
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(eos_token_ids(metadata)),
    }
    return config | _router(meta, config, tensors)


def eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end a reply: end of text, of a turn, of a message."""
    names = ("eos", "eot", "eom")
    ids = {
        f"tokenizer.ggml.{n}_token_id": metadata.get(f"tokenizer.ggml.{n}_token_id") for n in names
    }
    for key, value in ids.items():
        if value is not None and type(value) is not int:
            raise ValueError(f"{key}={value!r} must be a token id")
    return tuple(dict.fromkeys(i for i in ids.values() if i is not None))


def _num_layers(meta: _Metadata, tensors: dict[str, TensorInfo]) -> int:
    """Blocks without those for multi-token prediction, which come last."""
    num_blocks = meta.integer("block_count")
    extra = {int(m["layer"]) for n in tensors if (m := _BLOCK.match(n)) and m["name"] == "nextn"}
    return min([num_blocks - meta.integer("nextn_predict_layers", 0), *extra])


def _router(
    meta: _Metadata, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> dict[str, Any]:
    has_bias = any("exp_probs_b" in name for name in tensors)
    # Files from before the key: only models with sigmoid gates have this bias.
    scoring = meta.integer("expert_gating_func", 0) or (_SIGMOID if has_bias else _SOFTMAX)
    if scoring not in (_SOFTMAX, _SIGMOID):
        raise ValueError(
            f"{ARCHITECTURE}.expert_gating_func={scoring} is not supported; supported: 1 (softmax), "
            "2 (sigmoid)"
        )
    groups = _expert_groups(meta, config)
    if scoring == _SIGMOID:
        return {"model_type": "deepseek_v3", "scoring_func": "sigmoid", **groups}
    method = "group_limited_greedy" if groups["n_group"] > 1 else "greedy"
    return {
        "model_type": "deepseek_v2",
        "scoring_func": "softmax",
        "topk_method": method,
        **groups,
    }


def _expert_groups(meta: _Metadata, config: dict[str, Any]) -> dict[str, int]:
    """n_group and topk_group; converters of before autumn 2025 left them out, so published shapes stand in."""
    num_groups = meta.integer("expert_group_count", -1)
    if num_groups >= 0:
        num_groups = max(num_groups, 1)
        used = meta.integer("expert_group_used_count", 0 if num_groups == 1 else None)
        return {"n_group": num_groups, "topk_group": max(used, 1)}
    keys = ("hidden_size", "num_hidden_layers", "num_experts_per_tok")
    for preset in PRESETS.values():
        same = all(getattr(preset, key) == config[key] for key in keys)
        if same and preset.num_experts == config["n_routed_experts"]:
            return {"n_group": preset.n_group, "topk_group": preset.topk_group}
    raise ValueError(
        f"{ARCHITECTURE}.expert_group_count is missing and the shape is of no known model: convert it "
        "again with a current llama.cpp"
    )


def _rope_scaling(meta: _Metadata) -> dict[str, Any] | None:
    """YaRN as config.json spells it; mscale is not recorded, all published models have it equal to mscale_all_dim."""
    kind = meta.text("rope.scaling.type", "none")
    factor = meta.number("rope.scaling.factor", 0.0)
    if kind == "none" and factor in (0.0, 1.0):
        return None
    if kind != "yarn":
        raise ValueError(
            f"{ARCHITECTURE}.rope.scaling.type={kind!r} with factor {factor} is not supported; "
            "supported: yarn, none"
        )
    scaling = {
        "type": "yarn",
        "factor": meta.number("rope.scaling.factor"),
        "original_max_position_embeddings": meta.integer("rope.scaling.original_context_length"),
        "beta_fast": meta.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    # The converter multiplies by 0.1, the factor in YaRN's formula.
    mscale = round(10.0 * meta.number("rope.scaling.yarn_log_multiplier", 0.0), 6)
    return scaling | ({"mscale": mscale, "mscale_all_dim": mscale} if mscale else {})


def _decimal(value: float) -> float:
    """Floats are stored in 32 bits; their shortest decimal gives back the 1e-06 that config.json says."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


class _Metadata:
    """The architecture's own keys, typed; every refusal names key and value."""

    def __init__(self, metadata: dict[str, Any]):
        self.metadata = metadata

    def _get(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
        full = f"{ARCHITECTURE}.{key}"
        value = self.metadata.get(full, default)
        if value is None:
            raise ValueError(f"metadata lacks {full!r}: convert the model again")
        if type(value) not in kinds:
            raise ValueError(f"{full}={value!r} must be of type {kinds[0].__name__}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._get(key, (int,), default))

    def number(self, key: str, default: float | None = None) -> float:
        return _decimal(self._get(key, (float, int), default))

    def flag(self, key: str, *, default: bool) -> bool:
        return bool(self._get(key, (bool,), default))

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, (str,), default))
