"""Dense matrices of GGUF files computed from the bits that they have there: values, log-probabilities, memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.config import GGUF_FORMATS, EngineConfig
from moejet.layers.dense import GatedMLP
from moejet.layers.linear import Linear
from moejet.layers.mla import LatentUp
from moejet.plan import Machine, make_plan
from moejet.testing.checkpoints import random_prompt, reference_logprobs, tiny_checkpoint
from moejet.testing.gguf_files import dequantized_checkpoint, write_gguf
from moejet.weights.checkpoint import Checkpoint
from moejet.weights.gguf_model import GgufCheckpoint

Kind = str | Callable[[str], str]
# Rows of whole blocks of 256 everywhere; odd numbers of rows in lm_head and in every head's W_UK.
SIZES = {
    "vocab_size": 323,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 17,
    "v_head_dim": 64,
}
# W_UK as k_b_proj has rows of nope values.
SPLIT = {**SIZES, "qk_nope_head_dim": 256}
OPTIONS = {"cache_dtype": "fp32", "max_context": 256}


def make(
    tmp_path: Path, kind: Kind, sizes: dict[str, int], family: str = "moonlight", **options: bool
) -> tuple[Path, Path]:
    """A GGUF file, and a directory with the values that it stands for."""
    tied = options.pop("tied", False)
    options = {"split_kv_b": False, **options}
    root = tiny_checkpoint(tmp_path / "hf", family, tie_word_embeddings=tied, **sizes)
    file = write_gguf(root, tmp_path / "model.gguf", kind, **options)
    return file, dequantized_checkpoint(file, root, tmp_path / "truth")


def errors(llm: LLM, truth: Path, ids: list[int]) -> torch.Tensor:
    """Of the log-probabilities of ids."""
    scores = torch.tensor(llm.score(ids), dtype=torch.float64)
    return (scores - reference_logprobs(truth, ids, torch.float64)).abs()


def stacked_heads(up: LatentUp, name: str) -> torch.Tensor:
    matrices = getattr(up, name)
    return torch.stack([matrices.dequantize(head) for head in range(up.heads)])


def packed_values(llm: LLM) -> dict[str, tuple[torch.Tensor, str]]:
    """(values, format) of every dense matrix by its name in the checkpoint, of kv_b_proj by the names of its parts."""
    model = llm.engine.runner.model
    found: dict[str, tuple[torch.Tensor, str]] = {}

    def add(name: str, linear: Linear) -> None:
        found[name] = linear.packed.dequantize(0), str(linear.packed.weights.format)

    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}.self_attn"
        attention = layer.attention
        q_name = "q_proj"
        if attention.q_a_proj is not None:
            add(f"{prefix}.q_a_proj", attention.q_a_proj)
            q_name = "q_b_proj"
        add(f"{prefix}.{q_name}", attention.q_proj)
        add(f"{prefix}.kv_a_proj_with_mqa", attention.kv_a_proj)
        add(f"{prefix}.o_proj", attention.o_proj)
        for name in ("w_uk", "w_uk_transposed", "w_uv"):
            format = str(getattr(attention.up, name).weights.format)
            found[f"{prefix}.kv_b_proj.{name}"] = stacked_heads(attention.up, name), format
        is_dense = isinstance(layer.mlp, GatedMLP)
        mlp = layer.mlp if is_dense else layer.mlp.shared_experts
        prefix = f"model.layers.{i}.mlp" + ("" if is_dense else ".shared_experts")
        formats = (mlp.packed.format, mlp.packed.format, mlp.packed.down_format)
        for name, value, format in zip(
            ("gate", "up", "down"), mlp.packed.dequantize(0), formats, strict=True
        ):
            found[f"{prefix}.{name}_proj"] = value, format
    add("lm_head", model.lm_head)
    return found


def check_values(llm: LLM, truth: Path, *, converted: tuple[str, ...] = ()) -> None:
    """To the bit, but for names that end in one of `converted`, which are int8."""
    values, config = Checkpoint.open(truth), llm.model_config
    for name, (got, format) in packed_values(llm).items():
        if ".kv_b_proj." in name:
            stem, part = name.rsplit(".", 1)
            kv_b = values.read(f"{stem}.weight")
            w_uk, w_uv = kv_b.view(config.num_attention_heads, -1, kv_b.shape[1]).split(
                [config.qk_nope_head_dim, config.v_head_dim], 1
            )
            expected = {"w_uk": w_uk, "w_uk_transposed": w_uk.transpose(1, 2), "w_uv": w_uv}[part]
        else:
            tied = name == "lm_head" and config.tie_word_embeddings
            expected = values.read("model.embed_tokens.weight" if tied else f"{name}.weight")
        if name.endswith(converted):
            assert format == "int8", name
            assert float((got - expected).norm() / expected.norm()) < 0.01, name
        else:
            assert format in (*GGUF_FORMATS, "bf16"), name
            assert torch.equal(got, expected), name


@pytest.fixture(scope="module", params=GGUF_FORMATS)
def of_one_format(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("gguf"), request.param.upper(), SIZES)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "amx_emulated"])
def test_computed_from_their_own_bits(
    isa: str, of_one_format: tuple[Path, Path], usable_isa
) -> None:
    """In steps of 65 tokens, which tiles compute where there are tiles, and of one."""
    isa = usable_isa(isa)
    file, truth = of_one_format
    for step in (65, 1):
        with LLM(file, isa=isa, max_batch_tokens=step, **OPTIONS) as llm:
            assert llm.config.dense_format == "native"
            if step == 1:
                check_values(llm, truth, converted=("w_uk_transposed",))
            wrong = errors(llm, truth, random_prompt(66, 66))
        # Int8 activations may turn the choice between two experts whose scores are close.
        assert float(wrong.median()) < 0.07, f"{step=}"
        assert float(wrong.mean()) < 0.15, f"{step=}"


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_split_kv_b_keeps_the_other_direction(
    kind: str, isa: str, tmp_path: Path, usable_isa
) -> None:
    """k_b is W_UK transposed; here beside a low-rank query."""
    sizes = {**SPLIT, "q_lora_rank": 256}
    file, truth = make(tmp_path, kind, sizes, "deepseek_v3", split_kv_b=True)
    with LLM(file, isa=usable_isa(isa), **OPTIONS) as llm:
        check_values(llm, truth, converted=("w_uk",))
        wrong = errors(llm, truth, random_prompt(65, 65))
    assert float(wrong.median()) < 0.1


def mixed(name: str) -> str:
    """As published files mix types, and beyond that."""
    kinds = {
        "blk.0.attn_q": "Q5_K",
        "blk.1.attn_q": "BF16",
        "attn_kv_a_mqa": "Q8_0",
        "attn_k_b": "Q5_0",
        "blk.0.ffn_up.": "Q6_K",  # gate is another
        "blk.1.ffn_gate_shexp": "BF16",  # so is up, not down
        "blk.1.ffn_up_shexp": "BF16",
        "output.": "Q6_K",
    }
    return next(
        (kind for part, kind in kinds.items() if name.startswith(part) or f".{part}" in name),
        "Q4_K",
    )


def test_formats_of_their_own_and_stand_ins(
    tmp_path: Path, usable_isa, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moejet")
    file, truth = make(tmp_path, mixed, SPLIT, split_kv_b=True)
    with LLM(file, isa=usable_isa("avx2"), **OPTIONS) as llm:
        formats = {name: format for name, (_, format) in packed_values(llm).items()}
        stand_ins = ("w_uk", "w_uk_transposed", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")
        stand_ins += ("shared_experts.gate_proj", "shared_experts.up_proj")
        check_values(llm, truth, converted=stand_ins)
        wrong = errors(llm, truth, random_prompt(65, 65))
    assert float(wrong.median()) < 0.1
    attention = "model.layers.1.self_attn."
    assert formats[f"{attention}q_proj"] == "bf16"
    assert formats["model.layers.0.self_attn.q_proj"] == "q5_k"
    assert formats[f"{attention}kv_a_proj_with_mqa"] == "q8_0"
    assert formats[f"{attention}kv_b_proj.w_uv"] == formats[f"{attention}o_proj"] == "q4_k"
    assert formats["lm_head"] == "q6_k"
    assert formats["model.layers.0.mlp.down_proj"] == "q4_k"
    assert "dense matrices of type BF16, Q4_K, Q5_0, Q6_K are packed as int8" in caplog.text
    caplog.clear()
    with LLM(file, isa=usable_isa("avx2"), dense_format="int8", **OPTIONS) as llm:
        assert {format for _, format in packed_values(llm).values()} == {"int8"}
    assert "dense matrices" not in caplog.text


def test_a_tied_output_keeps_the_bits_of_the_embedding(tmp_path: Path, usable_isa) -> None:
    file, truth = make(tmp_path, "Q6_K", SIZES, tied=True)
    with LLM(file, isa=usable_isa("avx2"), **OPTIONS) as llm:
        check_values(llm, truth, converted=("w_uk_transposed",))
        embedding = Checkpoint.open(truth).read("model.embed_tokens.weight")
        assert torch.equal(llm.engine.runner.model.embed_tokens.weight, embedding.bfloat16())
        assert float(errors(llm, truth, random_prompt(65, 65)).median()) < 0.1


def test_unquantised_files(tmp_path: Path, usable_isa) -> None:
    file, _ = make(tmp_path, "F16", SIZES)
    for asked, used in (("auto", "int8"), ("native", "bf16"), ("fp8", "fp8")):
        with LLM(file, isa=usable_isa("avx2"), dense_format=asked, **OPTIONS) as llm:
            assert llm.config.dense_format == used
            assert {format for _, format in packed_values(llm).values()} == {used}


def test_the_second_start_maps_the_same_bits(
    tmp_path: Path, usable_isa, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache file belongs to one choice of dense formats."""
    monkeypatch.setenv("MOEJET_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "moejet")
    file, _ = make(tmp_path, mixed, SPLIT, split_kv_b=True)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    results = []
    for dense_format, is_cached in (("auto", False), ("native", True), ("int8", False)):
        caplog.clear()
        options = {"isa": usable_isa("avx2"), "dense_format": dense_format, "packed_cache": "on"}
        with LLM(file, **options, **OPTIONS) as llm:
            tokens = llm.generate([random_prompt(20, 20)], params)[0].outputs[0].token_ids
            results.append((tokens, llm.score(random_prompt(65, 65))))
        assert ("mapped packed weights" in caplog.text) == is_cached
    assert results[0] == results[1] != results[2]
    assert len(list((tmp_path / "cache").glob("*.packed"))) == 2


@pytest.mark.parametrize("split_kv_b", [False, True])
@pytest.mark.parametrize("kind", ["Q4_K", mixed])
def test_the_plan_counts_the_bytes_that_are_held(
    kind: Kind, split_kv_b: bool, tmp_path: Path, usable_isa
) -> None:
    """Of head sizes as published models have them; norms and padding are little then."""
    sizes = {
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "intermediate_size": 1024,
        "vocab_size": 1024,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 256,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
    }
    family = "deepseek_v3" if split_kv_b else "moonlight"
    if split_kv_b:
        sizes |= {"q_lora_rank": 256, "n_group": 1, "topk_group": 1}
    root = tiny_checkpoint(tmp_path / "hf", family, **sizes)
    file = write_gguf(root, tmp_path / "model.gguf", kind, split_kv_b=split_kv_b)
    planned = GgufCheckpoint.open(file).config
    for dense_format in ("auto", "int8"):
        options = {**OPTIONS, "dense_format": dense_format}
        plan = make_plan(
            planned, EngineConfig(model="x", **options), machine=Machine(), cache_tokens=256
        )
        with LLM(file, isa=usable_isa("avx2"), **options) as llm:
            state = llm.engine.runner.model.state()
            held = sum(value.nbytes for value in state.values())
            dense = sum(
                value.nbytes
                for name, value in state.items()
                if not isinstance(value, torch.Tensor) and not name.endswith(".experts")
            )
            assert llm.cost.packed_bytes == pytest.approx(dense, rel=0.01)
        parts = {part.name: part.num_bytes for part in plan.parts}
        weights = sum(size for name, size in parts.items() if "experts" in name or "embed" in name)
        assert weights == pytest.approx(held, rel=0.01)
        assert parts["attention, shared experts, output"] == pytest.approx(dense, rel=0.01)
        assert plan.dense_format == ("native" if dense_format == "auto" else "int8")
