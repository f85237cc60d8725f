"""moejet.weights.gguf_model: configuration and names of every family, every form of a tensor, and what is refused."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from torch import Tensor

from moejet.config import ModelConfig
from moejet.experts.cpu_experts import CpuExperts, create_pool
from moejet.layers.dense import DenseWeights
from moejet.models.deepseek import DeepseekForCausalLM
from moejet.presets import PRESETS
from moejet.resolve import resolve_config
from moejet.testing.checkpoints import FAMILIES, tiny_checkpoint
from moejet.testing.gguf_files import dequantized_checkpoint, write_gguf
from moejet.weights import stored
from moejet.weights.checkpoint import Checkpoint, TensorInfo
from moejet.weights.gguf import GgufFiles
from moejet.weights.gguf_model import GgufCheckpoint, hf_config
from moejet.weights.loader import load_weights
from moejet.weights.spec import TensorSpec

KV_B = "kv_b_proj.weight"
SIZES = {"moe_intermediate_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"), "deepseek_v3", **SIZES)


class Target:
    """Wants every tensor of a Hugging Face checkpoint and keeps what it gets, kv_b_proj also in two halves."""

    def __init__(self, root: Path):
        self.got: dict[str, Tensor] = {}
        self.specs = {
            info.name: TensorSpec(info.shape, self._loader(info.name))
            for info in Checkpoint.open(root)
        }
        self.heads = ModelConfig.from_hf(root).num_attention_heads
        nope = ModelConfig.from_hf(root).qk_nope_head_dim
        for name, spec in self.specs.items():
            if not name.endswith(KV_B):
                continue
            (rows, rank), halves = spec.shape, {}
            per_head = rows // self.heads
            for half, shape in (("k", (rank, nope)), ("v", (per_head - nope, rank))):
                half_name = name.replace("kv_b", f"{half}_b")
                loader = self._loader(half_name)
                halves[half_name] = TensorSpec((self.heads, *shape), loader)
            self.specs[name] = dataclasses.replace(spec, parts=halves)

    def _loader(self, name: str) -> Callable[[Tensor], object]:
        def load(tensor: Tensor) -> None:
            assert name not in self.got, "loaded twice"
            assert tensor.is_contiguous()
            self.got[name] = tensor.clone()

        return load

    def check(self, truth: Path) -> None:
        checkpoint = Checkpoint.open(truth)
        for name in [name for name in self.got if name.endswith("k_b_proj.weight")]:
            k_b = self.got.pop(name).transpose(1, 2)
            v_b = self.got.pop(name.replace("k_b", "v_b"))
            whole = torch.cat((k_b, v_b), 1).flatten(0, 1)
            self.got[name.replace("k_b", "kv_b")] = whole
        assert set(self.got) == set(checkpoint.tensors)
        for name, tensor in self.got.items():
            assert torch.equal(tensor.float(), checkpoint.read(name)), name


def edit_file(
    file: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], object], **keys: Any
) -> Path:
    """Writes the file's F32 tensors anew after `change`, with its metadata and `keys` added."""
    files = GgufFiles.open(file)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(file).tensors}
    change(tensors)
    out = file.with_name("edited.gguf")
    writer = gguf.GGUFWriter(out, "deepseek2")
    for key, value in {**files.metadata, **keys}.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, list | np.ndarray):
            writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
        else:
            kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
            writer.add_key_value(key, value, GGUFValueType[kinds[type(value)]])
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def from_gguf(config: ModelConfig, **changes: str) -> ModelConfig:
    """What the configuration of an unquantised file says in addition, but for dense_formats."""
    formats = (("bf16", "bf16"),) * config.num_moe_layers
    return dataclasses.replace(config, quantization="gguf", expert_formats=formats, **changes)


class Asked(dict[str, str]):
    """Formats of no matrix, and the names that were asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return default


def names_in_layers(config: ModelConfig) -> set[str]:
    """Of all matrices whose format the model's layers look up."""
    pool, asked = create_pool(1), Asked()
    DeepseekForCausalLM(
        config,
        make_experts=lambda layer: CpuExperts(1, 32, 32, format="int8", pool=pool),
        dense=DenseWeights("int8", pool, own=asked),
        max_context=8,
    )
    pool.close()
    return asked.names


@pytest.mark.parametrize("split_kv_b", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, split_kv_b: bool, tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "hf", family, num_hidden_layers=2)
    file = write_gguf(root, tmp_path / "m.gguf", "F32", split_kv_b=split_kv_b)
    checkpoint = GgufCheckpoint.open(file)
    expected = ModelConfig.from_hf(root)
    # One architecture, three names for it.
    kind = "deepseek_v2" if family.startswith("deepseek_v2") else "deepseek_v3"
    config = dataclasses.replace(checkpoint.config, dense_formats=())
    assert config == from_gguf(expected, model_type=kind)
    assert dict(checkpoint.config.dense_formats) == dict.fromkeys(names_in_layers(config), "bf16")
    target = Target(root)
    report = load_weights(checkpoint, target.specs, show_progress=False)
    assert report.ignored == report.absent == ()
    assert report.num_bytes == checkpoint.num_bytes
    target.check(root)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_tensors_arrive_dequantised(
    quantization: str, plain: Path, tmp_path: Path
) -> None:
    file = write_gguf(plain, tmp_path / "m.gguf", quantization, shard_tensors=5)
    target = Target(plain)
    load_weights(GgufCheckpoint.open(file), target.specs, show_progress=False)
    target.check(dequantized_checkpoint(file, plain, tmp_path / "truth"))


def test_the_configuration_alone(plain: Path, tmp_path: Path) -> None:
    file = write_gguf(plain, tmp_path / "m.gguf", shard_tensors=15)
    expected = from_gguf(ModelConfig.from_hf(plain))
    config = resolve_config(str(file))
    assert config == resolve_config(str(tmp_path))
    assert dataclasses.replace(config, dense_formats=()) == expected


def test_large_tables_are_decoded_to_bf16(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_FP32_WEIGHTS", 20_000)
    file = write_gguf(plain, tmp_path / "m.gguf", "Q8_0")
    target = Target(plain)
    load_weights(GgufCheckpoint.open(file), target.specs, show_progress=False)
    truth = Checkpoint.open(dequantized_checkpoint(file, plain, tmp_path / "truth"))
    embedding = target.got["model.embed_tokens.weight"]
    assert torch.equal(embedding, truth.read("model.embed_tokens.weight").bfloat16())
    assert target.got["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float32


def test_other_forms_of_the_same_tensors(plain: Path, tmp_path: Path) -> None:
    """Both forms of kv_b at once, k_b and v_b as matrices, gate and up in one stack, a bias without suffix."""
    split = write_gguf(plain, tmp_path / "split.gguf", "F32")

    def reshape(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        for half in ("k", "v"):
            name = f"blk.0.attn_{half}_b.weight"
            tensors[name] = tensors[name].reshape(-1, tensors[name].shape[-1])
        stacks = [tensors.pop(f"blk.1.ffn_{p}_exps.weight") for p in ("gate", "up")]
        tensors["blk.1.ffn_gate_up_exps.weight"] = np.concatenate(stacks, 1)
        tensors["blk.1.exp_probs_b"] = tensors.pop("blk.1.exp_probs_b.bias")

    target = Target(plain)
    load_weights(GgufCheckpoint.open(edit_file(split, reshape)), target.specs, show_progress=False)
    target.check(plain)

    whole = write_gguf(plain, tmp_path / "whole.gguf", "F32", split_kv_b=False)
    halves = {t.name: np.array(t.data) for t in gguf.GGUFReader(split).tensors if "_b." in t.name}
    both = edit_file(
        whole,
        lambda t: t.update({n: -v for n, v in halves.items() if "attn" in n and "q_b" not in n}),
    )
    target = Target(plain)
    load_weights(GgufCheckpoint.open(both), target.specs, show_progress=False)
    target.check(plain)


def test_multi_token_prediction_is_left_out(plain: Path, tmp_path: Path) -> None:
    file = write_gguf(plain, tmp_path / "m.gguf", "F32")

    def add(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors["blk.2.nextn.eh_proj.weight"] = np.zeros((4, 4), np.float32)
        tensors["blk.2.attn_norm.weight"] = np.zeros(96, np.float32)

    for keys in ({"deepseek2.nextn_predict_layers": 1}, {}):
        checkpoint = GgufCheckpoint.open(
            edit_file(file, add, **{"deepseek2.block_count": 3, **keys})
        )
        assert checkpoint.config.num_hidden_layers == 2
        assert checkpoint.config.num_nextn_predict_layers == 1
        target = Target(plain)
        report = load_weights(checkpoint, target.specs, show_progress=False)
        assert len(report.ignored) == 2
        target.check(plain)


def test_differences_are_refused_before_loading(plain: Path, tmp_path: Path) -> None:
    file = write_gguf(plain, tmp_path / "m.gguf", "F32")

    def spoil(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        del tensors["blk.0.attn_v_b.weight"]
        tensors["rope_freqs.weight"] = np.ones(4, np.float32)
        tensors["blk.1.attn_sinks.weight"] = np.ones(4, np.float32)
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:-1].copy()

    target = Target(plain)
    with pytest.raises(ValueError, match="do not match its metadata") as caught:
        load_weights(GgufCheckpoint.open(edit_file(file, spoil)), target.specs, show_progress=False)
    message = str(caught.value)
    assert "1 missing: model.layers.0.self_attn.v_b_proj.weight" in message
    assert "model.layers.0.mlp.up_proj.weight is [159, 96], not [160, 96]" in message
    assert "2 unexpected: rope_freqs.weight, blk.1.attn_sinks.weight" in message
    assert target.got == {}


def test_unsupported_types_are_named(plain: Path, tmp_path: Path) -> None:
    file = write_gguf(plain, tmp_path / "m.gguf", "Q8_0")
    blob = file.read_bytes()
    for name in (b"blk.0.ffn_up.weight", b"output.weight"):
        at = blob.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
        assert blob[at] == 8
        # MXFP4 blocks are as many and smaller: the header stays valid.
        blob = blob[:at] + b"\x27" + blob[at + 1 :]
    file.write_bytes(blob)
    with pytest.raises(ValueError, match="2 tensors are of types that are not supported") as caught:
        GgufCheckpoint.open(file)
    assert "blk.0.ffn_up.weight (MXFP4)" in str(caught.value)
    assert "supported: F32, F16, Q4_0" in str(caught.value)


# Keys of a tiny model; what its tensors must say besides.
def metadata(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 27,
        "deepseek2.context_length": 163840,
        "deepseek2.embedding_length": 2048,
        "deepseek2.feed_forward_length": 10944,
        "deepseek2.attention.head_count": 16,
        "deepseek2.attention.key_length": 192,
        "deepseek2.attention.value_length": 128,
        "deepseek2.attention.kv_lora_rank": 512,
        "deepseek2.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "deepseek2.expert_count": 64,
        "deepseek2.expert_used_count": 6,
        "deepseek2.expert_shared_count": 2,
        "deepseek2.expert_feed_forward_length": 1408,
        "deepseek2.expert_weights_scale": 1.0,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.rope.dimension_count": 64,
        "deepseek2.rope.freq_base": 10000.0,
        "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.factor": 40.0,
        "deepseek2.rope.scaling.original_context_length": 4096,
        "deepseek2.rope.scaling.yarn_log_multiplier": float(np.float32(0.0707)),
        "tokenizer.ggml.bos_token_id": 100000,
        "tokenizer.ggml.eos_token_id": 100001,
    }
    for key, value in changes.items():
        full = key.replace("__", ".")
        full = full if full.startswith(("general.", "tokenizer.")) else f"deepseek2.{full}"
        base[full] = value
        if value is None:
            del base[full]
    return base


def tensors(*names: str, vocab_size: int = 102400) -> dict[str, TensorInfo]:
    result = {n: TensorInfo(n, "F32", (4, 4), Path("x"), 0, 64) for n in ("output.weight", *names)}
    embedding = TensorInfo("token_embd.weight", "F32", (vocab_size, 2048), Path("x"), 0, 64)
    return result | {"token_embd.weight": embedding}


def test_files_of_old_converters() -> None:
    """V2-Lite as converted in 2024: no gating function, no groups, no mla lengths."""
    config = ModelConfig.from_hf(hf_config(metadata(), tensors()))
    assert config == PRESETS["deepseek-v2-lite"]


def test_groups_of_known_shapes() -> None:
    """V3 before the group keys: its groups follow from its shape, another shape's are not guessed."""
    keys: dict[str, Any] = {
        "block_count": 61,
        "embedding_length": 7168,
        "feed_forward_length": 18432,
        "attention__head_count": 128,
        "attention__q_lora_rank": 1536,
        "expert_count": 256,
        "expert_used_count": 8,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 2048,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "leading_dense_block_count": 3,
        "rope__scaling__yarn_log_multiplier": float(np.float32(0.1)),
        "tokenizer__ggml__bos_token_id": 0,
        "tokenizer__ggml__eos_token_id": 1,
    }
    names = tensors("blk.3.exp_probs_b.bias", vocab_size=129280)
    config = ModelConfig.from_hf(hf_config(metadata(**keys), names))
    assert config == dataclasses.replace(PRESETS["deepseek-v3"], num_nextn_predict_layers=0)
    with pytest.raises(
        ValueError, match=r"expert_group_count is missing and the shape is of no known"
    ):
        hf_config(metadata(**keys | {"expert_count": 128}), names)
    asked = metadata(**keys | {"expert_count": 128, "expert_group_count": 0})
    assert ModelConfig.from_hf(hf_config(asked, names)).n_group == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general__architecture": "llama"},
            r"general\.architecture='llama' is not supported; supported",
        ),
        ({"general__architecture": None}, r"general\.architecture=None"),
        ({"block_count": None}, r"lacks 'deepseek2\.block_count'"),
        ({"block_count": "61"}, r"block_count='61' must be of type int"),
        ({"block_count": True}, r"block_count=True must be of type int"),
        ({"expert_gating_func": 3}, r"expert_gating_func=3 is not supported; supported: 1"),
        ({"expert_weights_norm": True}, "norm_topk_prob=True is not supported for deepseek_v2"),
        ({"rope__scaling__type": "linear"}, r"rope\.scaling\.type='linear' with factor 40\.0"),
        ({"rope__scaling__type": None}, r"rope\.scaling\.type='none' with factor 40\.0"),
        ({"rope__scaling__yarn_attn_factor": 1.5}, r"yarn_attn_factor=1\.5 is not supported"),
        ({"rope__scaling__yarn_ext_factor": 0.0}, r"yarn_ext_factor=0\.0 is not supported"),
        ({"attention__temperature_scale": 0.1}, r"temperature_scale=0\.1 is not supported"),
        ({"attention__sliding_window": 4096}, r"sliding_window=4096 is not supported"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps=nan must be a finite"),
        ({"attention__key_length": 64}, r"key length 64 does not exceed rope\.dimension_count=64"),
        ({"expert_used_count": 65, "expert_group_count": 1}, "num_experts_per_tok=65 exceeds"),
        ({"tokenizer__ggml__eos_token_id": "1"}, r"eos_token_id='1' must be a token id"),
        ({"embedding_length": 0, "expert_group_count": 1}, "hidden_size=0 must be a positive"),
    ],
)
def test_refused_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf_config(metadata(**changes), tensors()))


def test_a_model_without_embedding() -> None:
    with pytest.raises(ValueError, match=r"token_embd\.weight is missing"):
        hf_config(metadata(), {})
