"""Quantised checkpoints against transformers on the values they stand for, for every family.

Native formats lose nothing: greedy tokens equal. Requantised experts stay within the limits of their format.
"""

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.testing.checkpoints import (
    FAMILIES,
    random_prompt,
    reference_greedy,
    reference_logprobs,
    tiny_checkpoint,
)
from moejet.testing.quantised import quantise_checkpoint
from moejet.testing.tolerances import LOGPROB_LIMITS

EXACT = {"dense_format": "fp32", "cache_dtype": "fp32", "max_context": 256, "isa": "avx2"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
# Multiples of 32, as int4 groups need; 160 leaves a block of 128 at the edge cut off.
SIZES = {"hidden_size": 160, "moe_intermediate_size": 96, "vocab_size": 320}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    made = {}

    def get(family: str, method: str):
        if (family, method) not in made:
            root = tmp_path_factory.mktemp(f"{family}-{method}")
            plain = tiny_checkpoint(root / "plain", family, **SIZES)
            made[family, method] = quantise_checkpoint(plain, root / method, method, num_shards=3)
        return made[family, method]

    return get


@pytest.mark.parametrize("method", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_native_fp8(family, method, quantised, usable_isa):
    if method == "fp8_ue8m0" and family not in ("deepseek_v3", "kimi_k2"):
        pytest.skip("published with fp32 scales")
    usable_isa("avx2")
    path, prompt = quantised(family, method), random_prompt(21, 1)
    with LLM(path, expert_format="native", **EXACT) as llm:
        assert llm.config.expert_format == "fp8"
        result = llm.generate([prompt], GREEDY)[0].outputs[0]
        ids = random_prompt(50, 2)
        got = torch.tensor(llm.score(ids), dtype=torch.float64)
    made = list(result.token_ids)
    assert made == reference_greedy(path / "dequantized", prompt, 40, guess=made)
    expected = reference_logprobs(path / "dequantized", ids)
    assert float((got - expected).abs().max()) < LOGPROB_LIMITS["fp32"]


@pytest.mark.parametrize("family", FAMILIES)
def test_native_int4(family, quantised, usable_isa):
    """The int4 kernels quantise activations to int8; in fp32 the same values give the same tokens."""
    usable_isa("avx2")
    path, prompt, ids = quantised(family, "int4"), random_prompt(21, 1), random_prompt(120, 3)
    expected = reference_logprobs(path / "dequantized", ids)
    with LLM(path, **EXACT) as llm:
        assert llm.config.expert_format == "int4_g32"
        got = torch.tensor(llm.score(ids), dtype=torch.float64)
    assert float((got - expected).abs().mean()) < 0.05
    with LLM(path, expert_format="fp32", **EXACT) as llm:
        result = llm.generate([prompt], GREEDY)[0].outputs[0]
        got = torch.tensor(llm.score(ids), dtype=torch.float64)
    made = list(result.token_ids)
    assert made == reference_greedy(path / "dequantized", prompt, 40, guess=made)
    assert float((got - expected).abs().max()) < LOGPROB_LIMITS["fp32"]


def test_int4_codes_and_scales_are_kept(quantised, usable_isa):
    from safetensors.torch import load_file

    path = quantised("kimi_k2", "int4")
    stored = load_file(path / "dequantized" / "model.safetensors")
    with LLM(path, isa=usable_isa("avx2"), max_context=64) as llm:
        for layer, moe in enumerate(llm.engine.runner.model.moe_layers, start=1):
            for expert in (0, 11):
                got = moe.experts.dequantize(expert)
                for name, value in zip(("gate", "up", "down"), got, strict=True):
                    key = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                    assert torch.equal(value, stored[key])


@pytest.mark.parametrize(
    ("method", "expert_format", "limit"),
    [("fp8", "int8", 0.05), ("fp8", "int4_g32", 0.5), ("int4", "int8", 0.05), ("int4", "fp8", 0.2)],
)
def test_requantised(method, expert_format, limit, quantised, usable_isa):
    usable_isa("avx2")
    path, ids = quantised("deepseek_v3", method), random_prompt(120, 4)
    expected = reference_logprobs(path / "dequantized", ids)
    with LLM(path, expert_format=expert_format, **EXACT) as llm:
        got = torch.tensor(llm.score(ids), dtype=torch.float64)
    assert float((got - expected).abs().mean()) < limit


@pytest.mark.parametrize(("dense_format", "limit"), [("int8", 0.3), ("bf16", 0.1), ("fp8", 0.3)])
def test_dense_weights_from_fp8(dense_format, limit, quantised, usable_isa):
    path, ids = quantised("deepseek_v3", "fp8"), random_prompt(120, 5)
    expected = reference_logprobs(path / "dequantized", ids)
    options = {**EXACT, "dense_format": dense_format, "isa": usable_isa("avx2")}
    with LLM(path, expert_format="native", **options) as llm:
        got = torch.tensor(llm.score(ids), dtype=torch.float64)
    assert float((got - expected).abs().mean()) < limit
