"""RMSNorm, RoPE, latent store, router and silu-mul against direct float64 formulas."""

import math

import pytest
import torch

from moejet.config import ModelConfig
from moejet.ops.rms_norm import rms_norm
from moejet.ops.rope import apply_rope, rope_inv_freq, rope_table
from moejet.ops.router_topk import router_topk
from moejet.ops.store_latent import store_latent
from moejet.presets import PRESETS
from moejet.rope_config import RopeConfig


@pytest.mark.parametrize("shape", [(1, 7), (3, 64), (2, 3, 33)])
def test_rms_norm(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape), torch.randn(shape[-1])
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = rms_norm(x, weight, 1e-5, out_dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


def test_rope_rotates_pairs_and_depends_on_distance_only():
    rope = RopeConfig(theta=100.0)
    table = rope_table(rope, 8, 64)
    torch.manual_seed(0)
    q, k = torch.randn(1, 8), torch.randn(1, 8)

    def dot(i: int, j: int, interleave: bool) -> float:
        a = apply_rope(q, table[i : i + 1], interleave=interleave)
        b = apply_rope(k, table[j : j + 1], interleave=interleave)
        return float((a * b).sum())

    for interleave in (True, False):
        assert dot(5, 2, interleave) == pytest.approx(dot(45, 42, interleave), abs=1e-4)
        assert dot(5, 2, interleave) != pytest.approx(dot(5, 3, interleave), abs=1e-4)
    pairs = torch.view_as_complex(q.view(1, 4, 2).double())
    angles = 7 * 100.0 ** (-torch.arange(4).double() / 4)
    rotated = pairs * torch.polar(torch.ones(4).double(), angles)
    got = apply_rope(q, table[7:8], interleave=True).double()
    torch.testing.assert_close(got[0, :4], rotated[0].real, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[0, 4:], rotated[0].imag, atol=1e-5, rtol=0)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    rope = PRESETS["deepseek-v3"].rope
    inv_freq = rope_inv_freq(rope, 64)
    plain = rope_inv_freq(RopeConfig(), 64)
    assert inv_freq[0] == plain[0]
    assert float(inv_freq[-1]) == pytest.approx(float(plain[-1]) / 40)
    assert PRESETS["deepseek-v3"].softmax_scale == pytest.approx(
        192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    )


def test_store_latent_writes_only_its_slots():
    cache = torch.full((3, 4, 5), -1.0)
    c_kv, k_pe = torch.arange(6.0).view(2, 3), torch.arange(4.0).view(2, 2)
    store_latent(c_kv, k_pe, cache, torch.tensor([9, 2]))
    assert cache[2, 1].tolist() == [0, 1, 2, 0, 1]
    assert cache[0, 2].tolist() == [3, 4, 5, 2, 3]
    assert int((cache == -1).all(-1).sum()) == 10


def _router_config(**changes) -> ModelConfig:
    from dataclasses import replace

    base = {"num_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}
    return replace(PRESETS["deepseek-v3"], **{**base, **changes})


def test_bias_selects_but_does_not_weigh():
    config = _router_config(n_group=1, topk_group=1, routed_scaling_factor=2.0)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0, -2.0, 0.5, 0.1]])
    bias = torch.zeros(8)
    bias[5] = 10.0
    ids, weights = router_topk(logits, bias, config)
    assert sorted(ids[0].tolist()) == [3, 5]
    scores = torch.sigmoid(logits[0, ids[0].long()])
    torch.testing.assert_close(weights[0], scores / scores.sum() * 2.0)


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy"])
def test_group_limits_against_a_plain_loop(method):
    scoring = "sigmoid" if method == "noaux_tc" else "softmax"
    config = _router_config(
        scoring_func=scoring, topk_method=method, norm_topk_prob=method == "noaux_tc"
    )
    torch.manual_seed(3)
    logits, bias = torch.randn(50, 8), torch.randn(8) * 0.3
    ids, weights = router_topk(logits, bias if method == "noaux_tc" else None, config)
    for t in range(50):
        row = logits[t].double()
        scores = torch.sigmoid(row) if scoring == "sigmoid" else torch.softmax(row, 0)
        choice = (scores + bias.double() if scoring == "sigmoid" else scores).tolist()
        groups = [choice[g * 2 : g * 2 + 2] for g in range(4)]
        rank = [sum(g) if scoring == "sigmoid" else max(g) for g in groups]
        kept = sorted(range(4), key=lambda g: -rank[g])[:2]
        allowed = [e for e in range(8) if e // 2 in kept]
        expected = sorted(allowed, key=lambda e: -choice[e])[:2]
        assert ids[t].tolist() == expected
        chosen = scores[expected]
        if method == "noaux_tc":
            chosen = chosen / chosen.sum()
        torch.testing.assert_close(weights[t].double(), chosen * 2.5, atol=1e-5, rtol=1e-5)
