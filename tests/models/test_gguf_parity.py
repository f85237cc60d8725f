"""GGUF files through the whole engine: greedy tokens equal transformers' on the dequantised weights.

Where tokens are compared, experts and dense matrices are kept in fp32, so nothing is lost. Experts in their own format
multiply activations in int8.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.testing.byte_tokenizer import CHAT_TEMPLATE
from moejet.testing.checkpoints import (
    FAMILIES,
    random_prompt,
    reference_greedy,
    reference_logprobs,
    tiny_checkpoint,
)
from moejet.testing.gguf_files import dequantized_checkpoint, write_gguf
from moejet.testing.tolerances import LOGPROB_LIMITS
from moejet.weights.checkpoint import Checkpoint

NUM_GREEDY = 24
EXACT = {"expert_format": "fp32", "dense_format": "fp32", "cache_dtype": "fp32", "max_context": 256}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_GREEDY, ignore_eos=True)
# Every matrix but those that multiply small head dimensions has rows of whole blocks.
SIZES_32 = {"moe_intermediate_size": 96, "intermediate_size": 160}
SIZES_256 = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 512}


def prompt(seed: int) -> list[int]:
    return random_prompt(21, seed)


def check_greedy(made: Sequence[int], truth: Path, ids: list[int]) -> None:
    """In float64: near a tie of two experts, transformers in float32 is the one that goes astray."""
    expected = reference_greedy(truth, ids, NUM_GREEDY, torch.float64, guess=made)
    assert list(made) == expected


def check(file: Path, root: Path, tmp_path: Path, isa: str) -> None:
    truth = dequantized_checkpoint(file, root, tmp_path / "dequantised")
    ids = prompt(1)
    with LLM(file, isa=isa, **EXACT) as llm:
        result = llm.generate([ids], GREEDY)[0]
        scores = torch.tensor(llm.score(ids), dtype=torch.float64)
    check_greedy(result.outputs[0].token_ids, truth, ids)
    expected = reference_logprobs(truth, ids, torch.float64)
    assert float((scores - expected).abs().max()) < LOGPROB_LIMITS["fp32"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_f16(family: str, tmp_path: Path, usable_isa) -> None:
    root = tiny_checkpoint(tmp_path / "hf", family, dtype=torch.bfloat16)
    file = write_gguf(root, tmp_path / "model.gguf", "F16")
    check(file, root, tmp_path, usable_isa("avx2"))


@pytest.mark.parametrize("split_kv_b", [False, True])
@pytest.mark.parametrize("quantization", ["BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised(quantization: str, split_kv_b: bool, tmp_path: Path, usable_isa) -> None:
    root = tiny_checkpoint(tmp_path / "hf", "deepseek_v3", **SIZES_32)
    file = write_gguf(root, tmp_path / "model.gguf", quantization, split_kv_b=split_kv_b)
    check(file, root, tmp_path, usable_isa("avx2"))


@pytest.mark.parametrize("quantization", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_256(quantization: str, tmp_path: Path, usable_isa) -> None:
    root = tiny_checkpoint(tmp_path / "hf", "moonlight", num_hidden_layers=2, **SIZES_256)
    file = write_gguf(root, tmp_path / "model.gguf", quantization)
    check(file, root, tmp_path, usable_isa("avx2"))


def test_shards_given_as_a_directory(tmp_path: Path, usable_isa) -> None:
    root = tiny_checkpoint(tmp_path / "hf", "deepseek_v2", tie_word_embeddings=True, **SIZES_32)
    (tmp_path / "gguf").mkdir()
    file = write_gguf(root, tmp_path / "gguf" / "m.gguf", "Q8_0", shard_tensors=7)
    assert file.name.startswith("m-00001-of-")
    truth = dequantized_checkpoint(file, root, tmp_path / "dequantised")
    with LLM(tmp_path / "gguf", isa=usable_isa("avx2"), **EXACT) as llm:
        result = llm.generate([prompt(3)], GREEDY)[0]
        check_greedy(result.outputs[0].token_ids, truth, prompt(3))


def test_recommended_sampling(tmp_path: Path, usable_isa) -> None:
    root = tiny_checkpoint(tmp_path / "hf", "moonlight", num_hidden_layers=1)
    kinds = gguf.GGUFValueType
    sampling = {
        "general.sampling.temp": (0.6, kinds.FLOAT32),
        "general.sampling.top_p": (0.95, kinds.FLOAT32),
        "general.sampling.top_k": (20, kinds.INT32),
    }
    for wrong in (False, True):
        if wrong:
            sampling["general.sampling.top_p"] = (7.0, kinds.FLOAT32)
        file = write_gguf(root, tmp_path / "m.gguf", edit=lambda meta: meta.update(sampling))
        if wrong:
            with pytest.raises(ValueError, match=r"m\.gguf: top_p=7\.0"):
                LLM(file, isa=usable_isa("avx2"), **EXACT)
        else:
            with LLM(file, isa=usable_isa("avx2"), **EXACT) as llm:
                assert llm.engine.default_params == SamplingParams(
                    temperature=0.6, top_p=0.95, top_k=20
                )


def test_a_wrong_tokenizer_is_named(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "hf", "moonlight", num_hidden_layers=1)
    file = write_gguf(root, tmp_path / "m.gguf", pre_tokenizer="tekken")
    with pytest.raises(
        ValueError, match=r"m\.gguf: tokenizer\.ggml\.pre='tekken' is not supported"
    ):
        LLM(file, **EXACT)


def scores_and_truth(llm: LLM, truth: Path, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.tensor(llm.score(ids), dtype=torch.float64)
    return scores, reference_logprobs(truth, ids, torch.float64)


def check_experts(llm: LLM, truth: Path, exact: bool) -> None:
    """What the kernels compute with against the values of the file."""
    values = Checkpoint.open(truth)
    first = llm.model_config.first_k_dense_replace
    for layer, moe in enumerate(llm.engine.runner.model.moe_layers, start=first):
        for expert in (0, moe.experts.weights.num_experts - 1):
            for name, got in zip(
                ("gate", "up", "down"), moe.experts.dequantize(expert), strict=True
            ):
                expected = values.read(
                    f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                )
                if exact:
                    assert torch.equal(got, expected)
                else:
                    assert float((got - expected).norm() / expected.norm()) < 0.01


NATIVE = {"dense_format": "fp32", "cache_dtype": "fp32", "max_context": 256}


@pytest.fixture(scope="module", params=["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def native_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """(type, a file of it, a directory with the values that it stands for)."""
    path = tmp_path_factory.mktemp(request.param)
    root = tiny_checkpoint(path / "hf", "moonlight", num_hidden_layers=2, **SIZES_256)
    file = write_gguf(root, path / "model.gguf", request.param)
    return request.param, file, dequantized_checkpoint(file, root, path / "truth")


@pytest.mark.parametrize("isa", ["avx2", "avx512", "amx_emulated"])
def test_experts_computed_from_their_own_bits(
    isa: str, native_file: tuple[str, Path, Path], usable_isa
) -> None:
    quantization, file, truth = native_file
    with LLM(file, isa=usable_isa(isa), **NATIVE) as llm:
        assert llm.config.expert_format == "native"
        assert llm.model_config.expert_formats == ((quantization.lower(),) * 2,)
        check_experts(llm, truth, exact=True)
        scores, expected = scores_and_truth(llm, truth, prompt(7))
    assert float((scores - expected).abs().mean()) < 0.05


@pytest.mark.parametrize(
    "quantization", ["Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K"]
)
def test_types_without_kernels_become_int8(
    quantization: str, tmp_path: Path, usable_isa, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moejet")
    root = tiny_checkpoint(tmp_path / "hf", "moonlight", num_hidden_layers=2, **SIZES_256)
    file = write_gguf(root, tmp_path / "model.gguf", quantization)
    truth = dequantized_checkpoint(file, root, tmp_path / "truth")
    with LLM(file, isa=usable_isa("avx2"), **NATIVE) as llm:
        assert llm.model_config.expert_formats == (("int8", "int8"),)
        check_experts(llm, truth, exact=False)
        scores, expected = scores_and_truth(llm, truth, prompt(7))
    assert f"experts of type {quantization} are packed as int8" in caplog.text
    assert float((scores - expected).abs().mean()) < 0.1


def test_layers_with_formats_of_their_own(tmp_path: Path, usable_isa) -> None:
    """As Q4_K_M files are: some down projections have more bits; here one layer has none quantised as well."""
    root = tiny_checkpoint(tmp_path / "hf", "moonlight", num_hidden_layers=4, **SIZES_256)

    def kind(name: str) -> str:
        if "blk.3." in name:
            return "BF16" if "down" in name else "Q8_0"
        return "Q6_K" if "blk.1.ffn_down" in name else "Q4_K"

    file = write_gguf(root, tmp_path / "model.gguf", kind)
    truth = dequantized_checkpoint(file, root, tmp_path / "truth")
    with LLM(file, isa=usable_isa("avx2"), **NATIVE) as llm:
        formats = llm.model_config.expert_formats
        assert formats == (("q4_k", "q6_k"), ("q4_k", "q4_k"), ("q8_0", "int8"))
        scores, expected = scores_and_truth(llm, truth, prompt(8))
        held = sum(moe.experts.nbytes for moe in llm.engine.runner.model.moe_layers)
        assert llm.cost.routed_bytes == pytest.approx(held, rel=0.03)
    assert float((scores - expected).abs().mean()) < 0.05


def test_unquantised_files_are_quantised_like_others(tmp_path: Path, usable_isa) -> None:
    root = tiny_checkpoint(tmp_path / "hf", "moonlight", num_hidden_layers=2)
    file = write_gguf(root, tmp_path / "model.gguf", "F16")
    for asked, used in (("auto", "int4_g32"), ("native", "bf16")):
        with LLM(file, isa=usable_isa("avx2"), expert_format=asked, max_context=64) as llm:
            assert llm.config.expert_format == used


@pytest.mark.parametrize(
    "options",
    [
        {"expert_format": "int4_g32", "dense_format": "int8"},
        {"expert_format": "bf16", "dense_format": "bf16"},
    ],
)
def test_other_formats_load(options: dict[str, str], tmp_path: Path) -> None:
    """Dequantised weights go through every packing."""
    root = tiny_checkpoint(tmp_path / "hf", "deepseek_v3", **SIZES_32)
    file = write_gguf(root, tmp_path / "m.gguf", "Q8_0")
    truth = dequantized_checkpoint(file, root, tmp_path / "truth")
    ids = prompt(5)
    with (
        LLM(file, max_context=256, **options) as ours,
        LLM(truth, max_context=256, **options) as same,
    ):
        assert ours.score(ids) == same.score(ids)


def test_packed_weights_are_cached(
    tmp_path: Path, usable_isa, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By all shards: a change in the last one is noticed."""
    monkeypatch.setenv("MOEJET_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "moejet")
    root = tiny_checkpoint(tmp_path / "hf", "moonlight", num_hidden_layers=2)
    file = write_gguf(root, tmp_path / "m.gguf", shard_tensors=15)
    scores = []
    for expected in (False, True, False):
        caplog.clear()
        with LLM(file, isa=usable_isa("avx2"), packed_cache="on", **EXACT) as llm:
            scores.append(llm.score(prompt(6)))
        assert ("mapped packed weights" in caplog.text) == expected
        if expected:
            os.utime(max(tmp_path.glob("m-*.gguf")), (0, 0))
    assert scores[0] == scores[1] == scores[2]


def test_text_and_conversations(tmp_path: Path, usable_isa) -> None:
    """The tokenizer, the template and the end of a reply come from the file as they do from a directory."""
    root = tiny_checkpoint(tmp_path / "hf", "glm4_moe_lite", dtype=torch.bfloat16)
    file = write_gguf(root, tmp_path / "model.gguf", "BF16")
    messages = [{"role": "user", "content": "the cat and the hat"}]
    params = SamplingParams(temperature=0.0, max_tokens=40)
    replies = []
    for path in (root, file):
        with LLM(path, isa=usable_isa("avx2"), **EXACT) as llm:
            assert llm.engine.tokenizer.chat_template == CHAT_TEMPLATE
            assert llm.engine.model_config.eos_token_ids == (1, 4)
            text = llm.generate(["Grüße, the hat"], params)[0].outputs[0]
            chat = llm.chat(messages, params)
            replies.append((text.token_ids, text.text, text.finish_reason, chat[0].outputs[0].text))
    assert replies[0] == replies[1]
