"""moejet.testing.checkpoints and tolerances: the yardsticks themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moejet.config import ModelConfig
from moejet.testing import damage
from moejet.testing.checkpoints import (
    FAMILIES,
    hf_config,
    reference_greedy,
    reference_logits,
    reference_logprobs,
    tiny_checkpoint,
)
from moejet.testing.tolerances import DIFF_LIMITS, assert_close, calc_diff, logprob_error
from moejet.tokenizer import Tokenizer

PROMPT = list(range(7, 100))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path: Path, family: str) -> None:
    root = tiny_checkpoint(tmp_path, family)
    config = ModelConfig.from_hf(root)
    raw = json.loads((root / "config.json").read_text())
    assert config.model_type == raw["model_type"]
    names = set(load_file(root / "model.safetensors"))
    last = config.num_hidden_layers - 1
    for projection in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(config.num_experts):
            assert f"model.layers.{last}.mlp.experts.{expert}.{projection}.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    has_bias = f"model.layers.{last}.mlp.gate.e_score_correction_bias" in names
    assert has_bias == (config.topk_method == "noaux_tc")
    logits = reference_logits(root, PROMPT)
    assert logits.shape == (len(PROMPT), config.vocab_size)
    assert 2.0 < logits.std() < 4.0
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).median() > 0.3
    exact = reference_logits(root, PROMPT, torch.float64)
    assert exact.dtype == torch.float64
    assert_close(logits, exact, "fp32")
    assert len(set(reference_greedy(root, [0, 9, 20], 12))) > 6
    assert Tokenizer.from_path(root).vocab_size <= config.vocab_size


def test_a_guess_changes_no_greedy_token(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path, "deepseek_v3")
    right = reference_greedy(root, PROMPT, 12)
    wrong = [*right[:5], (right[5] + 1) % 320, *right[6:]]
    for guess in (right, wrong, right[:3], [*right, 7], [4] * 12, [right[0]]):
        assert reference_greedy(root, PROMPT, 12, guess=guess) == right
    assert reference_greedy(root, PROMPT, 1, guess=right) == right[:1]
    assert reference_greedy(root, PROMPT, 0, guess=right) == []


def test_logprobs_are_of_the_token_that_follows(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path, "moonlight")
    expected = reference_logits(root, PROMPT).double().log_softmax(-1)
    got = reference_logprobs(root, PROMPT)
    assert got.tolist() == [expected[i, token] for i, token in enumerate(PROMPT[1:])]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_matters(tmp_path: Path, family: str) -> None:
    """An engine that ignored the router, an expert, the bias, position scaling or a norm would be found out."""
    root = tiny_checkpoint(tmp_path, family)
    before = reference_logits(root, PROMPT)

    def change(name_end: str) -> float:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            name = next(n for n in sorted(tensors) if n.endswith(name_end))
            tensors[name] = tensors[name].flip(0).contiguous()

        damage.edit_tensors(root, edit)
        changed = calc_diff(reference_logits_of_changed(root), before)
        damage.edit_tensors(root, edit)
        return changed

    ends = ["mlp.gate.weight", "experts.0.gate_proj.weight", "experts.1.down_proj.weight"]
    ends += ["shared_experts.up_proj.weight", "kv_a_layernorm.weight", "kv_b_proj.weight"]
    ends += ["model.norm.weight", "input_layernorm.weight"]
    if ModelConfig.from_hf(root).topk_method == "noaux_tc":
        ends.append("e_score_correction_bias")
    for end in ends:
        assert change(end) > 1e-4, end


def reference_logits_of_changed(root: Path) -> torch.Tensor:
    # The cached model is told apart by the time of config.json.
    config = root / "config.json"
    config.write_text(config.read_text())
    return reference_logits(root, PROMPT)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2"])
def test_both_rope_spellings_mean_the_same(tmp_path: Path, family: str) -> None:
    roots = [tiny_checkpoint(tmp_path / s, family, rope_style=s) for s in ("old", "new")]
    configs = [json.loads((root / "config.json").read_text()) for root in roots]
    assert "rope_scaling" in configs[0]
    assert "rope_parameters" not in configs[0]
    assert "rope_parameters" in configs[1]
    assert "rope_theta" not in configs[1]
    assert ModelConfig.from_hf(roots[0]).rope == ModelConfig.from_hf(roots[1]).rope
    logits = [reference_logits(root, PROMPT) for root in roots]
    assert torch.equal(*logits)


def test_same_seed_same_files(tmp_path: Path) -> None:
    roots = [tiny_checkpoint(tmp_path / name, "deepseek_v3") for name in "ab"]
    for file in roots[0].iterdir():
        assert file.read_bytes() == (roots[1] / file.name).read_bytes(), file.name
    other = tiny_checkpoint(tmp_path / "c", "deepseek_v3", seed=1)
    assert calc_diff(reference_logits(other, PROMPT), reference_logits(roots[0], PROMPT)) > 0.1


def test_variants_hold_the_same_model(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", "deepseek_v2_lite")
    sharded = tiny_checkpoint(tmp_path / "sharded", "deepseek_v2_lite", num_shards=4)
    assert len(list(sharded.glob("*.safetensors"))) == 4
    assert torch.equal(reference_logits(plain, PROMPT), reference_logits(sharded, PROMPT))


def test_bfloat16(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path, "moonlight", dtype=torch.bfloat16)
    for name, tensor in load_file(root / "model.safetensors").items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), name


def test_overrides(tmp_path: Path) -> None:
    root = tiny_checkpoint(
        tmp_path,
        "deepseek_v3",
        num_hidden_layers=2,
        tie_word_embeddings=True,
        attention_bias=True,
        first_k_dense_replace=0,
    )
    names = set(load_file(root / "model.safetensors"))
    assert "lm_head.weight" not in names
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in names
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.bias" in names
    assert 1.0 < reference_logits(root, PROMPT).std() < 5.0
    with pytest.raises(ValueError, match="family='gpt' must be one of"):
        hf_config("gpt")


def test_name_prefix(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path, "kimi_k2", name_prefix="language_model.")
    assert all(n.startswith("language_model.") for n in load_file(root / "model.safetensors"))


def test_calc_diff() -> None:
    x = np.random.default_rng(0).normal(size=(50, 40))
    assert calc_diff(x, x) == 0.0
    assert calc_diff(np.zeros(3), np.zeros(3)) == 0.0
    assert calc_diff(x, -x) == pytest.approx(2.0)
    assert calc_diff(x, np.zeros_like(x)) == pytest.approx(1.0)
    textbook = 1 - 2 * (x * 1.01 * x).sum() / ((x * 1.01) ** 2 + x**2).sum()
    assert calc_diff(x * 1.01, x) == pytest.approx(textbook, rel=1e-6)
    assert calc_diff(torch.from_numpy(x).bfloat16(), x) < DIFF_LIMITS["bf16"]
    assert calc_diff(x.astype(np.float32), x) < DIFF_LIMITS["fp32"]
    with pytest.raises(ValueError, match="sizes differ"):
        calc_diff(x, x[0])


def test_assert_close() -> None:
    x = np.array([1.0, np.nan, np.inf, -np.inf, 2.0])
    assert assert_close(x, x, "fp32") == 0.0
    with pytest.raises(AssertionError, match="NaN positions differ"):
        assert_close(np.nan_to_num(x, posinf=np.inf, neginf=-np.inf), x, "fp32")
    with pytest.raises(AssertionError, match=r"layer 3: calc_diff .* exceeds 1e-10"):
        assert_close(x * 1.001, x, "fp32", what="layer 3")
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close(x[:2], x, "fp32")
    with pytest.raises(ValueError, match="output_format='fp7' must be one of"):
        assert_close(x, x, "fp7")


def test_logprob_error() -> None:
    logits = np.array([[0.0, 1.0, -30.0]])
    assert logprob_error(logits + 5, logits) == pytest.approx(0.0, abs=1e-12)
    assert logprob_error(logits * [1, 1, 2], logits) < 1e-10, "unlikely tokens do not count"
    assert logprob_error(logits * [1, 2, 1], logits) > 0.1
