"""Tiny checkpoints quantised as published ones are, beside the values that they mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moejet.testing.byte_tokenizer import write_json
from moejet.testing.checkpoints import write_safetensors


def quantise_checkpoint(
    source: Path, path: str | Path, method: str, *, num_shards: int = 1
) -> Path:
    """A copy of a checkpoint, quantised as published ones are, and in its `dequantized/` the values that it means.

    method: "fp8" (DeepSeek-V3: all projections), "fp8_ue8m0" (V3.1: power-of-two scales, stored as such) or "int4"
    (Kimi-K2-Thinking: routed experts as compressed-tensors' pack-quantized; sizes must be multiples of 32).
    """
    from safetensors.torch import load_file

    root = Path(path)
    (root / "dequantized").mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, value in load_file(file).items():
            wanted = name.endswith("_proj.weight") or name.endswith("_with_mqa.weight")
            if method == "int4":
                wanted = wanted and ".experts." in name
            if not wanted:
                tensors[name] = plain[name] = value
                continue
            parts, plain[name] = (
                _to_int4(value) if method == "int4" else _to_fp8(value, method == "fp8_ue8m0")
            )
            tensors |= {name.removesuffix("weight") + key: part for key, part in parts.items()}
    write_safetensors(root, tensors, num_shards=num_shards)
    write_safetensors(root / "dequantized", plain)
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, root)
            shutil.copy(file, root / "dequantized")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _quantization_config(method)
    write_json(root / "config.json", config)
    return root


def _to_fp8(value: Tensor, power_of_two: bool) -> tuple[dict[str, Tensor], Tensor]:
    rows, cols = value.shape
    high, wide = -(-rows // 128), -(-cols // 128)
    padded = torch.zeros(high * 128, wide * 128)
    padded[:rows, :cols] = value
    blocks = padded.view(high, 128, wide, 128).permute(0, 2, 1, 3)
    scale = blocks.abs().amax((2, 3)) / 448.0
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (blocks / scale[..., None, None]).to(torch.float8_e4m3fn)
    exact = codes.float() * scale[..., None, None]

    def whole(parts: Tensor) -> Tensor:
        joined = parts.permute(0, 2, 1, 3).reshape(high * 128, wide * 128)
        return joined[:rows, :cols].contiguous()

    stored = scale
    if power_of_two:
        stored = (torch.log2(scale) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    codes = whole(codes.view(torch.uint8)).view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": stored}, whole(exact)


def _to_int4(value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, cols = value.shape
    grouped = value.float().view(rows, -1, 32)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).to(torch.bfloat16)
    codes = (grouped / scale.float()).round().clamp(-8, 7)
    exact = (codes * scale.float()).view(rows, cols)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    unsigned = (codes + 8).to(torch.int32).view(rows, cols // 8, 8)
    packed = (unsigned << shifts).sum(-1, dtype=torch.int32)
    shape = torch.tensor([rows, cols], dtype=torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": scale.squeeze(-1),
        "weight_shape": shape,
    }, exact


def _quantization_config(method: str) -> dict[str, Any]:
    if method == "int4":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        group = {"weights": {**weights, "group_size": 32, "actorder": None}}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {**group, "targets": ["Linear"], "input_activations": None}
            },
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.gate$"],
            "quantization_status": "compressed",
        }
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return {**fp8, "activation_scheme": "dynamic"} | (
        {"scale_fmt": "ue8m0"} if method == "fp8_ue8m0" else {}
    )
