"""Model families: the same greedy tokens and logits as transformers' own experts."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import moejet.hf

# Routers, shared experts and attention differ; aria's weights are transposed.
FAMILIES = {
    "aria_text": {"moe_intermediate_size": 48, "moe_num_shared_experts": 1},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "dots1": {},
    "ernie4_5_moe": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "granitemoe": {},
    "hunyuan_v1_moe": {},
    "jamba": {"num_hidden_layers": 8},
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "solar_open": {},
}


def prompts() -> torch.Tensor:
    return torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_and_logits(family: str, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(family, **FAMILIES[family])
    with torch.no_grad():
        logits = model(prompts()).logits
        tokens = model.generate(prompts(), max_new_tokens=16, do_sample=False)
        model.set_experts_implementation("moejet")
        ours = model(prompts()).logits
        our_tokens = model.generate(prompts(), max_new_tokens=16, do_sample=False)
    assert moejet.hf.pack(model) > 0
    assert (ours - logits).abs().max() < 2e-5 * logits.abs().max()
    assert torch.equal(our_tokens, tokens)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt_oss", {}, r"GptOssExperts: .* biases .*GptOssExperts\._apply_gate"),
        ("nemotron_h", {}, r"NemotronHExperts: .* no gate .*ReLUSquaredActivation"),
        ("deepseek_v4", {}, r"DeepseekV4Experts: .*silu\(gate\) \* up .*DeepseekV4Experts\._apply"),
        ("mixtral", {"hidden_act": "gelu"}, r"MixtralExperts: .*silu\(gate\) \* up .*GELU"),
    ],
)
def test_other_arithmetic_is_refused(
    family: str, changes: dict[str, str], message: str, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model(family, implementation="moejet", **changes)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(prompts())
    with pytest.raises(ValueError, match=r"layers\.\d+\..*" + message.partition(":")[0]):
        moejet.hf.pack(model)
