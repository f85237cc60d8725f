"""Genuine GGUF files of tiny checkpoints, written and read back with the `gguf` package and none of our own reading.

`write_gguf` does what llama.cpp's converter does to a checkpoint directory; `dequantized_checkpoint` turns the file
back into a directory that transformers loads: the truth for what the engine computes from the file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moejet.testing.checkpoints import write_safetensors
from moejet.weights.checkpoint import Checkpoint

Array = npt.NDArray[Any]
_EXPERT = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.weight")
_KV_B = "self_attn.kv_b_proj.weight"


def write_gguf(
    root: Path,
    file: Path,
    quantization: str | Callable[[str], str] = "F16",
    *,
    split_kv_b: bool = True,
    shard_tensors: int = 0,
    pre_tokenizer: str = "gpt-2",
    edit: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Converts the checkpoint directory `root` and returns the file, or the first shard.

    quantization: ggml type of matrices whose rows are whole blocks (others are F16; norms, router and biases F32), or a
    function that gives it for the name of a tensor in the file.
    Types that the gguf package cannot make (Q4_K, ...) get random blocks of the same spread, so the model is another ·
    split_kv_b: as attn_k_b and attn_v_b, the newer form · shard_tensors: per file, 0 for one file ·
    edit: changes the metadata {key: (value, GGUFValueType)} before it is written.
    """
    import gguf

    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, "deepseek2", split_max_tensors=shard_tensors)
    metadata = _metadata(config, split_kv_b=split_kv_b) | _vocabulary(root, config, pre_tokenizer)
    if edit is not None:
        edit(metadata)
    for key, (value, kind) in metadata.items():
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    for name, value in _converted_tensors(root, config, split_kv_b=split_kv_b).items():
        if name.startswith("step_head."):  # of the tiny reasoner; no converter knows it
            continue
        new_name = names.get_name(
            name.replace("correction_bias", "correction.bias"), (".weight", ".bias")
        )
        assert new_name is not None, name
        keep = value.ndim == 1 or name.endswith("mlp.gate.weight")
        wanted = quantization if isinstance(quantization, str) else quantization(new_name)
        kind = _stored_type("F32" if keep else wanted, value.shape[-1])
        data = _encode(value, kind)
        writer.add_tensor(new_name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(file.parent.glob(f"{file.stem}-*.gguf")) if shard_tensors else file


def dequantized_checkpoint(first: Path, root: Path, out: Path) -> Path:
    """A directory `out` with config.json and tokenizer of `root` and the weights of the GGUF files, in fp32."""
    import gguf

    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    names = _hf_names(config)
    tensors: dict[str, torch.Tensor] = {}
    stem = re.sub(r"-\d{5}-of-", "-*-of-", first.name)
    for file in sorted(first.parent.glob(stem)):
        for tensor in gguf.GGUFReader(file).tensors:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            tensors[names[tensor.name]] = torch.from_numpy(value.copy())
    for name in list(tensors):
        if ".mlp.experts." in name:
            prefix, projection = name.removesuffix(".weight").rsplit(".", 1)
            for expert, weight in enumerate(tensors.pop(name)):
                tensors[f"{prefix}.{expert}.{projection}.weight"] = weight.clone()
        elif name.endswith("k_b_proj.weight"):
            k_b = tensors.pop(name).view(heads, -1, nope).transpose(1, 2)
            v_b = tensors.pop(name.replace("k_b_proj", "v_b_proj"))
            kv_b = torch.cat((k_b, v_b.view(heads, -1, v_b.shape[-1])), 1)
            tensors[name.replace("k_b_proj", "kv_b_proj")] = kv_b.flatten(0, 1).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    for extra in (*root.glob("*.json"), *root.glob("*.jinja")):
        shutil.copy(extra, out)
    write_safetensors(out, tensors)
    return out


def random_blocks(shape: tuple[int, ...], kind: str, std: float, seed: int = 0) -> Array:
    """Bytes of random blocks whose weights have about this standard deviation, uint8 [..., bytes per row]."""
    import gguf

    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0,))
    halves = (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else halves
    rng = np.random.default_rng(seed)
    num_blocks = int(np.prod(shape)) // block
    blocks = rng.integers(0, 256, (num_blocks, num_bytes), dtype=np.uint8)
    for scale in (1e-3, None):
        if scale is None:
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
            scale = 1e-3 * std / float(values.std())
        for at in halves:
            # A dmin of twice the scale centres the codes roughly; its sign is subtracted.
            d = scale * rng.uniform(0.8, 1.2, num_blocks) * (1.0 if at == halves[0] else 2.0)
            blocks[:, at : at + 2] = d.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _encode(value: Array, kind: str) -> Array:
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        return value.astype(np.float32 if kind == "F32" else np.float16)
    try:
        return np.asarray(gguf.quants.quantize(value, number))
    except NotImplementedError:
        return random_blocks(value.shape, kind, float(value.std()), seed=value.size)


def _stored_type(kind: str, columns: int) -> str:
    import gguf

    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return kind if columns % block == 0 else "F16"


def _converted_tensors(root: Path, config: dict[str, Any], *, split_kv_b: bool) -> dict[str, Array]:
    """Tensors with experts stacked and kv_b_proj split, still under Hugging Face's names."""
    checkpoint = Checkpoint.open(root)
    result: dict[str, Array] = {}
    stacks: dict[str, list[Array]] = {}
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for name in sorted(checkpoint.tensors, key=_natural):
        value = checkpoint.read(name).float().numpy()
        match = _EXPERT.fullmatch(name)
        if match:
            key = f"{match['prefix']}.{match['projection']}.weight"
            stacks.setdefault(key, []).append(value)
        elif split_kv_b and name.endswith(_KV_B):
            kv_b = value.reshape(heads, -1, value.shape[-1])
            k_b = kv_b[:, :nope].swapaxes(1, 2)
            result[name.replace("kv_b_proj", "k_b_proj")] = np.ascontiguousarray(k_b)
            result[name.replace("kv_b_proj", "v_b_proj")] = np.ascontiguousarray(kv_b[:, nope:])
        else:
            result[name] = value
    return result | {name: np.stack(parts) for name, parts in stacks.items()}


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _hf_names(config: dict[str, Any]) -> dict[str, str]:
    """GGUF name -> Hugging Face name, by asking the gguf package for every name that a checkpoint may have."""
    import gguf

    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, layers)
    attention: tuple[str, ...] = (
        "q_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "o_proj",
    )
    attention += ("k_b_proj", "v_b_proj", "q_a_layernorm", "kv_a_layernorm")
    per_layer = ["input_layernorm", "post_attention_layernorm", "mlp.gate"]
    per_layer += [f"self_attn.{name}" for name in attention]
    for group in ("", "shared_experts.", "experts."):
        per_layer += [f"mlp.{group}{p}_proj" for p in ("gate", "up", "down")]
    stems = ["model.embed_tokens", "model.norm", "lm_head"]
    stems += [f"model.layers.{i}.{name}" for i in range(layers) for name in per_layer]
    result = {}
    for stem in stems:
        for suffix in (".weight", ".bias"):
            name = names.get_name(stem + suffix, (".weight", ".bias"))
            if name is not None:
                result[name] = stem + suffix
    for i in range(layers):
        result[f"blk.{i}.exp_probs_b.bias"] = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
    return result


def _metadata(config: dict[str, Any], *, split_kv_b: bool) -> dict[str, Any]:
    """{key: (value, type)} as the converter writes them."""
    import gguf

    kinds = gguf.GGUFValueType
    heads, rope_dim = config["num_attention_heads"], config["qk_rope_head_dim"]
    key_length = config["qk_nope_head_dim"] + rope_dim
    rank = config["kv_lora_rank"]
    integers = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": 1 if split_kv_b else heads,
        "attention.key_length": rank + rope_dim if split_kv_b else key_length,
        "attention.value_length": rank if split_kv_b else config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "expert_used_count": config["num_experts_per_tok"],
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "rope.dimension_count": rope_dim,
        "vocab_size": config["vocab_size"],
    }
    if split_kv_b:
        integers["attention.key_length_mla"] = key_length
        integers["attention.value_length_mla"] = config["v_head_dim"]
    if config.get("q_lora_rank"):
        integers["attention.q_lora_rank"] = config["q_lora_rank"]
    # GLM's config.json does not name its gate, and neither do files made from it.
    gating = {"softmax": 1, "sigmoid": 2}.get(config.get("scoring_func", ""))
    if gating is not None:
        integers["expert_gating_func"] = gating
    merged = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    floats = {
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "rope.freq_base": merged.get("rope_theta", config.get("rope_theta")),
    }
    result: dict[str, Any] = {}
    if merged.get("type") == "yarn":
        floats["rope.scaling.factor"] = merged["factor"]
        floats["rope.scaling.yarn_log_multiplier"] = 0.1 * merged["mscale_all_dim"]
        floats["rope.scaling.yarn_beta_fast"] = merged["beta_fast"]
        floats["rope.scaling.yarn_beta_slow"] = merged["beta_slow"]
        integers["rope.scaling.original_context_length"] = merged[
            "original_max_position_embeddings"
        ]
        result["deepseek2.rope.scaling.type"] = ("yarn", kinds.STRING)
    if config["norm_topk_prob"]:
        result["deepseek2.expert_weights_norm"] = (True, kinds.BOOL)
    result |= {f"deepseek2.{key}": (value, kinds.UINT32) for key, value in integers.items()}
    return result | {f"deepseek2.{key}": (value, kinds.FLOAT32) for key, value in floats.items()}


def _vocabulary(root: Path, config: dict[str, Any], pre_tokenizer: str) -> dict[str, Any]:
    import gguf

    kinds, types = gguf.GGUFValueType, gguf.TokenType
    raw = json.loads((root / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((root / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    kind_of = [types.UNUSED] * len(tokens)
    for token, i in raw["model"]["vocab"].items():
        tokens[i], kind_of[i] = token, types.NORMAL
    for token in raw["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kind_of[token["id"]] = types.CONTROL if token["special"] else types.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    eos = config["eos_token_id"]
    eos = eos if isinstance(eos, list) else [eos]
    key = "tokenizer.ggml."
    result = {
        f"{key}model": ("gpt2", kinds.STRING),
        f"{key}pre": (pre_tokenizer, kinds.STRING),
        f"{key}tokens": (tokens, kinds.ARRAY),
        f"{key}token_type": ([int(kind) for kind in kind_of], kinds.ARRAY),
        f"{key}merges": (merges, kinds.ARRAY),
        f"{key}bos_token_id": (config["bos_token_id"], kinds.UINT32),
        f"{key}add_bos_token": (True, kinds.BOOL),
        "tokenizer.chat_template": (settings["chat_template"], kinds.STRING),
    }
    for name, token_id in zip(("eos", "eot", "eom"), eos, strict=False):
        result[f"{key}{name}_token_id"] = (token_id, kinds.UINT32)
    return result
