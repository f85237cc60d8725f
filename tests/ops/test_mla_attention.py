"""Absorbed and expanded attention against the float64 reference, on shuffled, padded block tables."""

from dataclasses import replace

import pytest
import torch

from moejet.experts.cpu_experts import create_pool
from moejet.layers.linear import DenseWeights
from moejet.layers.mla import LatentUp, PackedLatentUp
from moejet.ops import mla_attention as op
from moejet.presets import PRESETS

HEADS, NOPE, ROPE, RANK, VALUE, BLOCK = 3, 10, 6, 12, 14, 4
CONFIG = replace(
    PRESETS["deepseek-v3"],
    num_attention_heads=HEADS,
    qk_nope_head_dim=NOPE,
    qk_rope_head_dim=ROPE,
    kv_lora_rank=RANK,
    v_head_dim=VALUE,
)


def _case(query_lens, context_lens, cache_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    total = sum(query_lens)
    widths = [-(-c // BLOCK) for c in context_lens]
    order = torch.randperm(sum(widths) + 3, generator=generator).tolist()
    tables = torch.full((len(widths), max(widths)), -1, dtype=torch.int64)
    for i, width in enumerate(widths):
        for j in range(width):
            tables[i, j] = order.pop()
    cache = randn(sum(widths) + 3, BLOCK, RANK + ROPE)
    q = randn(total, HEADS, NOPE + ROPE)  # split views: not contiguous, as in the layer
    up = LatentUp(CONFIG)
    up.load(randn(HEADS * (NOPE + VALUE), RANK) / 3)
    options = {"query_lens": query_lens, "context_lens": context_lens}
    options |= {"v_head_dim": VALUE, "scale": 0.3}
    return [q[..., :NOPE], q[..., NOPE:], up, cache.to(cache_dtype), tables], options


CASES = [
    ([1], [1]),
    ([1], [9]),
    ([5], [5]),
    ([3], [17]),
    ([1, 7, 2], [6, 7, 30]),
]


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize(("query_lens", "context_lens"), CASES)
def test_matches_float64(monkeypatch, expanded, query_lens, context_lens):
    monkeypatch.setattr(op, "prefers_expanded", lambda *a, **k: expanded)
    args, lens = _case(query_lens, context_lens)
    expected = op.mla_attention_ref(*args, **lens)
    torch.testing.assert_close(op.mla_attention(*args, **lens), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("expanded", [False, True])
def test_query_blocks_do_not_change_the_result(monkeypatch, expanded):
    monkeypatch.setattr(op, "prefers_expanded", lambda *a, **k: expanded)
    args, lens = _case([11], [19])
    whole = op.mla_attention(*args, **lens)
    monkeypatch.setattr(op, "_MAX_SCORE_BYTES", 4 * HEADS * 19 * 2)
    torch.testing.assert_close(op.mla_attention(*args, **lens), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("expanded", [False, True])
def test_bf16_cache_is_read_exactly(monkeypatch, expanded):
    monkeypatch.setattr(op, "prefers_expanded", lambda *a, **k: expanded)
    args, lens = _case([1, 4], [12, 9], cache_dtype=torch.bfloat16)
    expected = op.mla_attention_ref(*args, **lens)
    torch.testing.assert_close(op.mla_attention(*args, **lens), expected, atol=2e-5, rtol=1e-4)


def test_requests_of_both_kinds_in_one_batch(monkeypatch):
    monkeypatch.setattr(op, "prefers_expanded", lambda query_len, **k: query_len > 2)
    args, lens = _case([1, 7, 2, 5], [6, 7, 30, 11])
    expected = op.mla_attention_ref(*args, **lens)
    torch.testing.assert_close(op.mla_attention(*args, **lens), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("format", ["bf16", "int8"])
@pytest.mark.parametrize("expanded", [False, True])
def test_packed_up_projections(monkeypatch, format, expanded):
    """Packed W_UK and W_UV give what their own dequantised values give, up to activation rounding."""
    monkeypatch.setattr(op, "prefers_expanded", lambda *a, **k: expanded)
    args, lens = _case([3, 6], [17, 6])
    pool = create_pool(1)
    packed = PackedLatentUp(
        CONFIG, DenseWeights(format, pool, "avx2" if format == "bf16" else "auto")
    )
    exact = args[2]
    packed.load(torch.cat((exact.w_uk, exact.w_uv), dim=1).flatten(0, 1))
    expected = op.mla_attention_ref(*args, **lens)
    args[2] = packed
    got = op.mla_attention(*args, **lens)
    error = float((got - expected).norm() / expected.norm())
    assert error < (0.01 if format == "bf16" else 0.04)
    pool.close()


def test_the_choice_follows_the_operation_count():
    dims = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    assert not op.prefers_expanded(1, **dims)
    assert not op.prefers_expanded(64, **dims)
    assert op.prefers_expanded(512, **dims)
