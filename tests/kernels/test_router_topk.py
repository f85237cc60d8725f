"""The Triton router: compiled ahead of time for every architecture, run on a GPU."""

from dataclasses import replace

import pytest
import torch

from moejet.ops.router_topk import router_topk, router_topk_ref, selection_of
from moejet.presets import PRESETS

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.router_topk import router_topk as launch
from moejet.testing.aot import assert_fits, launches_compiled_for

NAMES = ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2"]
LARGE = replace(PRESETS["kimi-k2"], num_experts=1024, num_experts_per_tok=32)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        *(("deepseek-v3", sm) for sm in CARDS),
        ("deepseek-v2", 86),
        ("deepseek-v2-lite", 120),
        ("kimi-k2", 90),
        ("large", 86),
    ],
)
def test_compiles(name, capability):
    config = LARGE if name == "large" else PRESETS[name]
    card = CARDS[capability]
    bias = None
    if config.scoring_func == "sigmoid":
        bias = torch.empty(config.num_experts, device="meta")
    with launches_compiled_for(card) as compiled:
        launch(torch.empty(4, config.num_experts, device="meta"), bias, **selection_of(config))
    assert_fits(compiled[0], card)
    assert compiled[0].spilled == 0


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 4096])
@pytest.mark.parametrize(
    "config", [*(PRESETS[name] for name in NAMES), LARGE], ids=[*NAMES, "large"]
)
def test_on_the_gpu(config, tokens):
    """Logits are multiples of 1/4, so that scores are equal or far apart, whatever exp's last place."""
    logits = (torch.randn(tokens, config.num_experts) * 12).round() / 4
    bias = None
    if config.scoring_func == "sigmoid":
        bias = (torch.randn(config.num_experts) * 16).round() / 256
    expected_ids, expected = router_topk_ref(logits.double().float(), bias, config)
    ids, weights = router_topk(logits.cuda(), None if bias is None else bias.cuda(), config)
    torch.testing.assert_close(weights.cpu(), expected, atol=1e-6, rtol=1e-5)
    # With a bias two different sums may still round to neighbours.
    agree = (ids.cpu() == expected_ids).float().mean()
    assert agree == 1 if bias is None else agree > 0.999
