"""The attention operation against its float64 reference, on shuffled, padded block tables.

tests/csrc/test_attention.py has the kernels' own tests.
"""

from dataclasses import replace

import pytest
import torch

from moejet.experts.cpu_experts import create_pool
from moejet.layers.linear import DenseWeights
from moejet.layers.mla import LatentUp
from moejet.ops import mla_attention as op
from moejet.presets import PRESETS

NOPE, ROPE, RANK, VALUE, BLOCK = 10, 6, 12, 14, 4
CASES = [
    ([1], [1]),
    ([1], [9]),
    ([5], [5]),
    ([1, 7, 2], [6, 7, 30]),
    ([40, 1, 33], [40, 70, 90]),
]


@pytest.fixture(scope="module")
def pool():
    made = create_pool(1)
    yield made
    made.close()


def _case(
    pool, query_lens, context_lens, *, heads=3, format="fp32", dtype=torch.float32, isa="auto"
):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    widths = [-(-c // BLOCK) for c in context_lens]
    order = torch.randperm(sum(widths) + 3, generator=generator).tolist()
    tables = torch.full((len(widths), max(widths)), -1, dtype=torch.int64)
    for i, width in enumerate(widths):
        for j in range(width):
            tables[i, j] = order.pop()
    cache = randn(sum(widths) + 3, BLOCK, RANK + ROPE)
    q = randn(sum(query_lens), heads, NOPE + ROPE)
    config = replace(
        PRESETS["deepseek-v3"],
        num_attention_heads=heads,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        kv_lora_rank=RANK,
        v_head_dim=VALUE,
    )
    up = LatentUp(config, DenseWeights(format, pool, isa))
    up.load(randn(heads * (NOPE + VALUE), RANK) / 3)
    options = {"query_lens": query_lens, "context_lens": context_lens, "scale": 0.3}
    return [q[..., :NOPE], q[..., NOPE:], up, cache.to(dtype), tables], options


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("query_lens", "context_lens"), CASES)
def test_matches_float64(pool, query_lens, context_lens, dtype, heads):
    args, options = _case(pool, query_lens, context_lens, heads=heads, dtype=dtype, isa="scalar")
    expected = op.mla_attention_ref(*args, **options)
    torch.testing.assert_close(op.mla_attention(*args, **options), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("format", "limit"), [("bf16", 0.01), ("fp8", 0.04), ("int8", 0.04), ("int4_g32", 0.15)]
)
def test_packed_up_projections(pool, format, limit):
    """What the dequantised matrices give, up to the rounding of activations and of W_UK, which is rounded differently
    in its two directions."""
    args, options = _case(pool, [3, 40], [17, 44], format=format)
    expected = op.mla_attention_ref(*args, **options)
    got = op.mla_attention(*args, **options)
    assert float((got - expected).norm() / expected.norm()) < limit


def test_reference_on_request(pool, monkeypatch):
    args, options = _case(pool, [3, 5], [17, 6], dtype=torch.bfloat16)
    monkeypatch.setenv("MOEJET_REF", "1")
    expected = op.mla_attention_ref(*args, **options)
    assert torch.equal(op.mla_attention(*args, **options), expected)
