"""Tiny random checkpoints of every supported family, made and judged by transformers' own model classes.

`tiny_checkpoint` writes a directory that looks like a published one: config.json in the family's own spelling, tensors
under their published names (one per expert, although transformers keeps experts stacked), a tokenizer with a chat
template. Weights are scaled so that logits spread (standard deviation about 3): greedy choices then have margins, and
routing, position and residual errors all change the output. `moejet.testing.damage` spoils checkpoints for error tests.

transformers is imported on first use: this module is for tests and benchmarks only.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moejet.testing.byte_tokenizer import write_json, write_tokenizer
from moejet.validation import require_choice

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 144,
    "moe_intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": True,
}


def _yarn(mscale: float, **extra: Any) -> dict[str, Any]:
    # A short original length puts most tested positions into the scaled part.
    return {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        **extra,
    }


# Family -> what its config.json says beyond _COMMON, in the spelling of the published files.
_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2_lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": _yarn(0.707),
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": 40,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 4.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": _yarn(1.0),
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "q_lora_rank": 48,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": _yarn(1.0),
    },
    "moonlight": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
    },
    "glm4_moe_lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "q_lora_rank": 40,
        "qk_nope_head_dim": 24,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-5,
        "eos_token_id": [1, 4],
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "kimi_k2": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "q_lora_rank": 48,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": _yarn(1.0, beta_fast=1.0),
    },
}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)

# DeepSeek-R1's conversation form: past answers without their reasoning, the next one opened with <think>.


def hf_config(family: str, **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model of `family` as a dict; an override of None removes nothing, it is written as null.

    `rope_style="new"` moves rope_theta and rope_scaling into rope_parameters, `rope_style="old"` does the reverse;
    every other override must be a key of the file or is added to it.
    """
    require_choice("family", family, FAMILIES)
    config = {**copy.deepcopy(_COMMON), **copy.deepcopy(_FAMILIES[family])}
    style = overrides.pop("rope_style", None)
    config.update(overrides)
    return config if style is None else _respell_rope(config, style)


def _respell_rope(config: dict[str, Any], style: str) -> dict[str, Any]:
    merged = {
        **(config.pop("rope_scaling", None) or {}),
        **(config.pop("rope_parameters", None) or {}),
    }
    theta = merged.pop("rope_theta", None) or config.pop("rope_theta", 10000.0)
    config.pop("rope_theta", None)
    kind = merged.pop("type", None) or merged.pop("rope_type", "default")
    merged.pop("rope_type", None)
    if style == "new":
        config["rope_parameters"] = {"rope_theta": theta, "rope_type": kind, **merged}
    elif style == "old":
        config["rope_theta"] = theta
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **merged}
    else:
        raise ValueError(f"rope_style={style!r} must be 'old' or 'new'")
    return config


def tiny_checkpoint(
    path: str | Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    fused_experts: bool = False,
    name_prefix: str = "",
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint of `family` into the directory `path` (created) and returns it.

    dtype: of the stored tensors (the router bias stays fp32, as published) · num_shards > 1 writes an index ·
    fused_experts: experts stacked as [E, 2I, D] and [E, D, I] instead of one tensor each ·
    name_prefix: put before every tensor name, as multimodal checkpoints do · overrides: see `hf_config`.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    config = hf_config(family, **overrides)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    model = _build(config)
    _initialise(model, config, seed)
    tensors = _published_tensors(model, dtype, fused_experts=fused_experts)
    write_safetensors(root, {name_prefix + k: v for k, v in tensors.items()}, num_shards=num_shards)
    write_json(root / "config.json", config)
    write_tokenizer(root, config["vocab_size"])
    eos = config["eos_token_id"]
    write_json(root / "generation_config.json", {"bos_token_id": 0, "eos_token_id": eos})
    return root


def write_safetensors(root: Path, tensors: dict[str, Tensor], *, num_shards: int = 1) -> None:
    """Writes model.safetensors, or `num_shards` shards of consecutive tensors with their index."""
    from safetensors.torch import save_file

    if num_shards == 1:
        save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    per_shard = math.ceil(len(names) / num_shards)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[shard * per_shard : (shard + 1) * per_shard]
        save_file({name: tensors[name] for name in part}, root / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(root / "model.safetensors.index.json", index)


def load_reference(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a checkpoint directory, in `dtype`, eager attention and experts, cached.

    kimi_k2 loads as deepseek_v3, whose architecture it is (transformers has no class of that name).
    """
    root = Path(path).resolve()
    return _load_reference(str(root), (root / "config.json").stat().st_mtime_ns, dtype)


@lru_cache(maxsize=4)
def _load_reference(path: str, _modified: int, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    config = _config_object(json.loads((Path(path) / "config.json").read_text(encoding="utf-8")))
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    # transformers only warns about names that it cannot place and would leave random values there.
    unplaced = {k: v for k, v in report.items() if v and k != "error_msgs"}
    if any(unplaced.get(k) for k in ("missing_keys", "mismatched_keys")):
        raise ValueError(f"transformers could not load {path}: {unplaced}")
    return model.to(dtype).eval()


def reference_logits(
    path: str | Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits of every position of one sequence by transformers: [T, V] float32 (float64 for that dtype)."""
    model = load_reference(path, dtype)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return logits if dtype == torch.float64 else logits.float()


def reference_logprobs(
    path: str | Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Log-probabilities of every token but the first by transformers: [T - 1] float64."""
    logits = reference_logits(path, token_ids, dtype)[:-1].double()
    following = torch.tensor(list(token_ids)[1:]).unsqueeze(1)
    return torch.log_softmax(logits, -1).gather(1, following).squeeze(1)


def reference_greedy(
    path: str | Path,
    prompt_ids: Sequence[int],
    n: int,
    dtype: torch.dtype = torch.float32,
    *,
    guess: Sequence[int] = (),
) -> list[int]:
    """`n` greedy tokens after the prompt, without a cache; eos does not stop it.

    guess: what the result is expected to be. It decides how long this takes, never the result: each position of a
    sequence says which token follows, so a right guess is confirmed by one pass and a wrong one corrected.
    """
    made: list[int] = []
    while len(made) < n:
        ahead = list(guess[len(made) : n - 1])
        logits = reference_logits(path, [*prompt_ids, *made, *ahead], dtype)
        best: list[int] = logits[-1 - len(ahead) :].argmax(-1).tolist()
        right = 0
        while right < len(ahead) and ahead[right] == best[right]:
            right += 1
        made += best[: right + 1]
        if right < len(ahead):
            guess = ()  # after a wrong token the rest is wrong as well
    return made


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids that every tiny vocabulary has and that mean nothing special."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10, 250, (length,), generator=generator).tolist()
    return ids


def _config_object(raw: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    raw = copy.deepcopy(raw)
    model_type = raw.pop("model_type")
    # The stored dtype must not decide in what precision the reference computes.
    raw.pop("torch_dtype", None)
    if model_type == "glm4_moe_lite":
        # Its class reads the number of dense layers from this list only.
        dense = raw.get("first_k_dense_replace", 1)
        kinds = ["dense"] * dense + ["sparse"] * (raw["num_hidden_layers"] - dense)
        raw.setdefault("mlp_layer_types", kinds)
    return AutoConfig.for_model("deepseek_v3" if model_type == "kimi_k2" else model_type, **raw)


def _build(config: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    return build(_config_object(config), dtype=torch.float32)


def _initialise(model: Any, config: dict[str, Any], seed: int) -> None:
    """Random weights with unit-variance activations through the network; in place, by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std + mean

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(normal(tensor.shape, 0.1))
            elif "norm" in name:
                tensor.copy_(normal(tensor.shape, 0.15, mean=1.0))
            elif name.endswith(".bias"):
                tensor.copy_(normal(tensor.shape, 0.1))
            elif name.endswith("embed_tokens.weight"):
                # A tied embedding is also the output matrix: its scale then has to fit both.
                std = 3.0 / math.sqrt(tensor.shape[1]) if config["tie_word_embeddings"] else 1.0
                tensor.copy_(normal(tensor.shape, std))
            elif name.endswith("lm_head.weight"):
                if not config["tie_word_embeddings"]:
                    tensor.copy_(normal(tensor.shape, 3.0 / math.sqrt(tensor.shape[1])))
            else:
                # Query, key and router gains above one: flat attention or routing would hide errors.
                sharp = any(
                    s in name for s in ("q_proj", "q_b_proj", "kv_a_proj", "mlp.gate.weight")
                )
                gain = 1.5 if sharp else 1.0
                tensor.copy_(normal(tensor.shape, gain / math.sqrt(tensor.shape[-1])))


def _published_tensors(model: Any, dtype: torch.dtype, *, fused_experts: bool) -> dict[str, Tensor]:
    """state_dict under published names: experts one by one (or stacked), no tied lm_head."""
    result: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        keep = name.endswith("e_score_correction_bias")
        value = tensor.detach().to(torch.float32 if keep else dtype)
        if ".experts." not in name or fused_experts:
            result[name] = value.contiguous()
            continue
        prefix, projection = name.rsplit(".", 1)
        for expert, weight in enumerate(value):
            if projection == "gate_up_proj":
                gate, up = weight.chunk(2)
                result[f"{prefix}.{expert}.gate_proj.weight"] = gate.clone()
                result[f"{prefix}.{expert}.up_proj.weight"] = up.clone()
            else:
                result[f"{prefix}.{expert}.{projection}.weight"] = weight.clone()
    return result
