"""Scores of the interpreter may differ from torch's in the last place: weights are compared within that, and ids where
scores are exact (products of a few values) or far enough apart."""

import math
from dataclasses import replace

import pytest
import torch

from moejet.kernels.router_topk import router_topk
from moejet.ops.router_topk import router_topk_ref, selection_of
from moejet.presets import PRESETS

SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
SOFTMAX = {
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
}
GREEDY = {**SOFTMAX, "topk_method": "greedy"}


def _config(experts, k, n_group=1, topk_group=1, **changes):
    sizes = {
        "num_experts": experts,
        "num_experts_per_tok": k,
        "n_group": n_group,
        "topk_group": topk_group,
    }
    return replace(PRESETS["deepseek-v3"], **sizes, **changes)


def _compare(logits, bias, config):
    selection = selection_of(config)
    ids, weights = router_topk(logits, bias, **selection)
    expected_ids, expected = router_topk_ref(logits, bias, config)
    assert ids.dtype == torch.int32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, equal_nan=True)


@pytest.mark.parametrize(
    "config",
    [
        _config(256, 8, 8, 4, **SIGMOID),
        _config(384, 8, **SIGMOID),
        _config(6, 2, 3, 1, **SIGMOID),
        _config(4, 2, 4, 3, **SIGMOID),  # groups of one
        _config(160, 6, 8, 3, **SOFTMAX),
        _config(600, 12, **GREEDY),
        _config(3, 3, **GREEDY),
        _config(1, 1, **GREEDY),
    ],
    ids=lambda c: f"{c.num_experts}-{c.num_experts_per_tok}-{c.topk_method}",
)
def test_matches_the_reference(config):
    wide = torch.randn(3, config.num_experts + 3) * 3
    bias = torch.randn(config.num_experts) * 0.1 if config.scoring_func == "sigmoid" else None
    _compare(wide[:, : config.num_experts], bias, config)
    _compare(wide[:0, : config.num_experts], bias, config)


@pytest.mark.parametrize(
    "config", [_config(32, 8, 4, 2, **SIGMOID), _config(32, 8, 4, 2, **SOFTMAX)]
)
def test_ties_go_to_the_smaller_id(config):
    logits = torch.cat((torch.zeros(1, 32), torch.randint(3, (4, 32)).float()))
    _compare(logits, torch.zeros(32) if config.scoring_func == "sigmoid" else None, config)


def test_negative_biased_scores_and_as_many_experts_as_the_groups_have():
    config = _config(8, 4, 4, 2, **SIGMOID)
    _compare(torch.randn(3, 8), torch.full((8,), -3.0) + torch.rand(8), config)


@pytest.mark.parametrize(
    "config",
    [_config(16, 4, 4, 2, **SIGMOID), _config(16, 4, 4, 2, **SOFTMAX), _config(16, 4, **GREEDY)],
)
def test_nan_and_infinity(config):
    logits = torch.randn(5, 16)
    logits[0, 9] = math.nan
    logits[1, :] = math.nan
    logits[2, 3] = math.inf
    logits[3, :5] = -math.inf
    logits[4, :] = -math.inf
    _compare(logits, torch.rand(16) if config.scoring_func == "sigmoid" else None, config)
