"""Absorbed and expanded attention against the float64 reference, on shuffled, padded block tables."""

import pytest
import torch

from moejet.ops import mla_attention as op

HEADS, NOPE, ROPE, RANK, VALUE, BLOCK = 3, 10, 6, 12, 14, 4


def _case(query_lens, context_lens, dtype=torch.float32, seed=0):
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
    tensors = (
        q[..., :NOPE],
        q[..., NOPE:],
        randn(HEADS, NOPE, RANK) / 3,
        randn(HEADS, RANK, VALUE) / 3,
        cache,
    )
    lens = {"query_lens": query_lens, "context_lens": context_lens, "scale": 0.3}
    return [t.to(dtype) for t in tensors] + [tables], lens


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


def test_bf16_stays_close():
    args, lens = _case([1, 4], [12, 9], dtype=torch.bfloat16)
    expected = op.mla_attention_ref(*args, **lens).float()
    got = op.mla_attention(*args, **lens).float()
    torch.testing.assert_close(got, expected, atol=5e-2, rtol=5e-2)


def test_the_choice_follows_the_operation_count():
    dims = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    assert not op.prefers_expanded(1, **dims)
    assert not op.prefers_expanded(64, **dims)
    assert op.prefers_expanded(512, **dims)
