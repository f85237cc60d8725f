"""The attention operation against its float64 reference, on shuffled, padded block tables.

tests/csrc/test_attention.py has the kernels' own tests.
"""

from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from moejet.experts.cpu_experts import create_pool
from moejet.layers.dense import DenseWeights
from moejet.layers.mla import LatentUp
from moejet.ops import mla_attention as op
from moejet.presets import PRESETS
from moejet.weights.stored import StoredWeight

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


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "amx_emulated"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("split", [False, True])
def test_up_projections_of_gguf_files(pool, kind, split, isa, usable_isa):
    """One direction of W_UK has the file's bits, the other is int8; heads of odd sizes, one token and 65."""
    heads, nope, value, rank = 3, 32 if split else 19, 37, 64
    shape = {"qk_nope_head_dim": nope, "kv_lora_rank": rank, "v_head_dim": value}
    config = replace(PRESETS["deepseek-v3"], num_attention_heads=heads, **shape)
    own = "w_uk_transposed" if split else "w_uk"
    formats = {f"kv_b_proj.{name}": kind.lower() for name in (own, "w_uv")}
    up = LatentUp(config, DenseWeights("int8", pool, usable_isa(isa), own=formats))
    generator = torch.Generator().manual_seed(1)

    def stored(*shape):
        values = torch.randn(*shape, generator=generator) / 8
        blocks = quants.quantize(values.numpy(), GGMLQuantizationType[kind]).reshape(1, -1)
        return StoredWeight(shape, torch.from_numpy(blocks), "gguf", ggml_type=kind)

    if split:
        k_b, v_b = stored(heads, rank, nope), stored(heads, value, rank)
        up.load_k_b(k_b)
        up.load_v_b(v_b)
        w_uk, w_uv = k_b.dequantize().transpose(1, 2), v_b.dequantize()
    else:
        kv_b = stored(heads * (nope + value), rank)
        up.load_kv_b(kv_b)
        w_uk, w_uv = kv_b.dequantize().view(heads, -1, rank).split([nope, value], 1)
    for head in range(heads):
        kept = getattr(up, own).dequantize(head)
        assert torch.equal(kept, w_uk[head].T if split else w_uk[head])
        assert torch.equal(up.w_uv.dequantize(head), w_uv[head])
    cache = torch.randn(20, BLOCK, rank + ROPE, generator=generator)
    tables = torch.stack([torch.arange(20), torch.arange(20).flip(0)])
    for query_lens, context_lens in (([1, 1], [9, 70]), ([65, 1], [65, 30])):
        q = torch.randn(sum(query_lens), heads, nope + ROPE, generator=generator)
        args = (q[..., :nope], q[..., nope:], up, cache, tables)
        options = {"query_lens": query_lens, "context_lens": context_lens, "scale": 0.1}
        expected = op.mla_attention_ref(*args, **options)
        got = op.mla_attention(*args, **options)
        assert float((got - expected).norm() / expected.norm()) < 0.03


def test_reference_on_request(pool, monkeypatch):
    args, options = _case(pool, [3, 5], [17, 6], dtype=torch.bfloat16)
    monkeypatch.setenv("MOEJET_REF", "1")
    expected = op.mla_attention_ref(*args, **options)
    assert torch.equal(op.mla_attention(*args, **options), expected)
