"""From a Hugging Face config.json to the fields of a `ModelConfig`: the only reader of its keys.

A key that changes the computation and whose value we do not implement raises ValueError; keys that do not are ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from moejet.json_file import read_json_object
from moejet.rope_config import RopeConfig

Quantization = Literal["fp8", "int4", "gguf"]

# model_type -> (scoring_func, topk_method) where the file does not say.
_FAMILIES: dict[str, tuple[str, str]] = {
    "deepseek_v2": ("softmax", "greedy"),
    "deepseek_v3": ("sigmoid", "noaux_tc"),
    "kimi_k2": ("sigmoid", "noaux_tc"),
    "glm4_moe_lite": ("sigmoid", "noaux_tc"),
}


def read_hf_config(source: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The fields; see `ModelConfig.from_hf`."""
    raw = source if isinstance(source, dict) else _read_config_json(Path(source))
    if "text_config" in raw and raw.get("model_type") in ("kimi_k25", "kimi_vl"):
        outer = raw
        raw = dict(outer["text_config"])
        inherited = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
        for key in (*inherited, "quantization_config", "compression_config"):
            if key in outer:
                raw.setdefault(key, outer[key])
        if raw.get("model_type") == "kimi_k25":
            raw["model_type"] = "kimi_k2"
    return _HfReader(raw).fields()


class _HfReader:
    """Reads one config.json dict, naming key and value in every refusal."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw
        model_type = raw.get("model_type")
        if model_type not in _FAMILIES:
            raise ValueError(
                f"model_type={model_type!r} is not supported; supported: "
                + ", ".join(sorted(_FAMILIES))
                + " and kimi_k25 (text)"
            )
        self.model_type: str = model_type

    def fields(self) -> dict[str, Any]:
        self._refuse_what_changes_the_result()
        scoring, method = _FAMILIES[self.model_type]
        quantization = self._quantization()
        # Only V2 files leave router keys out; elsewhere a missing key would be a silent guess.
        is_v2 = self.model_type == "deepseek_v2"
        n_group = self._int("n_group", 1 if is_v2 else None)
        return {
            "model_type": self.model_type,
            "vocab_size": self._int("vocab_size"),
            "hidden_size": self._int("hidden_size"),
            "intermediate_size": self._int("intermediate_size"),
            "moe_intermediate_size": self._int("moe_intermediate_size"),
            "num_hidden_layers": self._int("num_hidden_layers"),
            "num_attention_heads": self._int("num_attention_heads"),
            "kv_lora_rank": self._int("kv_lora_rank"),
            "qk_nope_head_dim": self._int("qk_nope_head_dim"),
            "qk_rope_head_dim": self._int("qk_rope_head_dim"),
            "v_head_dim": self._int("v_head_dim"),
            "num_experts": self._int("n_routed_experts"),
            "num_experts_per_tok": self._int("num_experts_per_tok"),
            "num_shared_experts": self._int("n_shared_experts", 0),
            "first_k_dense_replace": self._first_moe_layer(),
            "q_lora_rank": self._int("q_lora_rank", 0) or None,
            "n_group": n_group,
            "topk_group": self._int("topk_group", n_group if is_v2 else None),
            "scoring_func": self._str("scoring_func", scoring),
            "topk_method": self._str("topk_method", method),
            "norm_topk_prob": bool(
                self.raw.get("norm_topk_prob", self.model_type != "deepseek_v2")
            ),
            "routed_scaling_factor": self._float("routed_scaling_factor", 1.0 if is_v2 else None),
            "rms_norm_eps": self._float("rms_norm_eps", None),
            "rope": self._rope(),
            "rope_interleave": bool(self.raw.get("rope_interleave", True)),
            "max_position_embeddings": self._int("max_position_embeddings"),
            "tie_word_embeddings": bool(self.raw.get("tie_word_embeddings", False)),
            "attention_bias": bool(self.raw.get("attention_bias", False)),
            "bos_token_id": next(iter(self._ids("bos_token_id")), None),
            "eos_token_ids": self._ids("eos_token_id"),
            "num_nextn_predict_layers": self._int("num_nextn_predict_layers", 0),
            "quantization": quantization,
        }

    def _refuse_what_changes_the_result(self) -> None:
        for key, supported in (
            ("hidden_act", "silu"),
            ("moe_layer_freq", 1),
            ("mlp_bias", False),
            ("use_sliding_window", False),
        ):
            value = self.raw.get(key, supported)
            if value is not None and value != supported:
                raise ValueError(f"{key}={value!r} is not supported; supported: {supported!r}")
        kv_heads = self.raw.get("num_key_value_heads")
        if kv_heads not in (None, self.raw.get("num_attention_heads")):
            raise ValueError(
                f"num_key_value_heads={kv_heads!r} is not supported; MLA needs it equal to "
                f"num_attention_heads={self.raw.get('num_attention_heads')!r}"
            )
        if self.model_type == "deepseek_v2" and self.raw.get("norm_topk_prob"):
            raise ValueError(
                "norm_topk_prob=True is not supported for deepseek_v2; supported: False "
                "(no published V2 model sets it, and reference implementations disagree on it)"
            )

    def _first_moe_layer(self) -> int:
        layers = self._int("num_hidden_layers")
        types = self.raw.get("mlp_layer_types")
        if types is None:
            default = 1 if self.model_type == "glm4_moe_lite" else 0
            return min(self._int("first_k_dense_replace", default), layers)
        first = list(types).count("dense") if isinstance(types, list | tuple) else -1
        if first < 0 or list(types) != ["dense"] * first + ["sparse"] * (layers - first):
            raise ValueError(
                f"mlp_layer_types={types!r} is not supported; supported: dense layers first, "
                f"then sparse ones, {layers} in total"
            )
        return first

    def _rope(self) -> RopeConfig:
        merged = {**self._dict("rope_scaling"), **self._dict("rope_parameters")}
        kind = merged.get("rope_type", merged.get("type", "default"))
        theta = merged.get("rope_theta", self.raw.get("rope_theta", 10000.0))
        partial = merged.get("partial_rotary_factor", self.raw.get("partial_rotary_factor", 1.0))
        if partial not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor={partial!r} is not supported; supported: 1.0")
        if kind == "default":
            return RopeConfig(theta=float(theta))
        if kind != "yarn":
            raise ValueError(f"rope type {kind!r} is not supported; supported: default, yarn")
        max_positions = self._int("max_position_embeddings")
        original = int(merged.get("original_max_position_embeddings") or max_positions)
        factor = merged.get("factor")
        return RopeConfig(
            theta=float(theta),
            type="yarn",
            factor=float(max_positions / original if factor is None else factor),
            original_max_position_embeddings=original,
            beta_fast=float(merged.get("beta_fast") or 32),
            beta_slow=float(merged.get("beta_slow") or 1),
            mscale=float(merged.get("mscale") or 0.0),
            mscale_all_dim=float(merged.get("mscale_all_dim") or 0.0),
            attention_factor=merged.get("attention_factor"),
            truncate=bool(merged.get("truncate", True)),
        )

    def _quantization(self) -> Quantization | None:
        spec = self._dict("quantization_config") or self._dict("compression_config")
        if not spec:
            return None
        method = spec.get("quant_method")
        if method == "fp8":
            _expect("quantization_config", spec, {"fmt": (None, "e4m3")})
            _expect("quantization_config", spec, {"weight_block_size": ([128, 128],)})
            return "fp8"
        if method == "compressed-tensors":
            _check_packed_int4(spec)
            return "int4"
        raise ValueError(
            f"quantization_config.quant_method={method!r} is not supported; supported: fp8 (e4m3 in "
            "128 x 128 blocks), compressed-tensors (pack-quantized int4, groups of 32), GGUF files, "
            "and unquantised checkpoints"
        )

    def _get(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"config.json lacks {key!r}, which {self.model_type} needs")
            return default
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"config.json: {key}={value!r} must be of type {kinds[0].__name__}")
        return value

    def _int(self, key: str, default: int | None = None) -> int:
        return int(self._get(key, (int,), default))

    def _float(self, key: str, default: float | None) -> float:
        value = float(self._get(key, (float, int), default))
        if not math.isfinite(value):
            raise ValueError(f"config.json: {key}={value!r} must be a finite number")
        return value

    def _dict(self, key: str) -> dict[str, Any]:
        return dict(self._get(key, (dict,), {}))

    def _ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"config.json: {key}={value!r} must be a token id or a list of them")
        return tuple(ids)

    def _str(self, key: str, default: str) -> str:
        return str(self._get(key, (str,), default))


def _expect(where: str, spec: dict[str, Any], wanted: dict[str, tuple[Any, ...]]) -> None:
    """Raises ValueError unless every key of `wanted` has one of its values (None: the key may be missing)."""
    for key, values in wanted.items():
        if spec.get(key) not in values:
            raise ValueError(
                f"{where}.{key}={spec.get(key)!r} is not supported; supported: "
                + " or ".join(repr(value) for value in values if value is not None)
            )


def _check_packed_int4(spec: dict[str, Any]) -> None:
    """compressed-tensors: symmetric 4-bit weights in groups of 32, nothing else quantised."""
    _expect("quantization_config", spec, {"format": ("pack-quantized",)})
    groups = spec.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"quantization_config.config_groups={groups!r} names no quantised weights")
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise ValueError(f"{where}={group!r} must say how weights are quantised")
        _expect(where, group, {"input_activations": (None,), "output_activations": (None,)})
        wanted: dict[str, tuple[Any, ...]] = {"num_bits": (4,), "type": ("int",)}
        wanted |= {"symmetric": (True,), "group_size": (32,), "strategy": ("group",)}
        _expect(f"{where}.weights", group["weights"], {**wanted, "actorder": (None, False)})


def _read_config_json(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist: a model directory needs a config.json")
    return read_json_object(file)
