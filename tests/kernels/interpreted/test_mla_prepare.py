"""mla_prepare, apply_rope and store_latent, which share their arithmetic.

The interpreter truncates where it casts to bf16; these kernels round bits themselves, so that bf16 rows are exact here.
"""

import math

import pytest
import torch

from moejet.kernels.mla_prepare import mla_prepare
from moejet.kernels.rope import apply_rope
from moejet.kernels.store_latent import store_latent
from moejet.latent_layout import row_elements
from moejet.ops.latent_rows import CACHE_TYPES, decode_latents
from moejet.ops.mla_prepare import mla_prepare_ref
from moejet.ops.rope import apply_rope_ref
from moejet.ops.store_latent import store_latent_ref

LIMITS = {
    "fp32": 1e-6,
    "bf16": 2**-7,
    "fp8": 2**-2,
}  # one step of rounding where sums differ in the last place


def _cache(rank: int, rope: int, kind: str) -> torch.Tensor:
    shape = (3, 4, row_elements(rank, rope, kind))
    cache = torch.full(shape, 99, dtype=CACHE_TYPES[kind])
    return cache if kind == "fp8" else cache.fill_(math.nan)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (3, 64), (2, 20, 6), (0, 4, 8)])
def test_apply_rope(shape, interleave):
    cos_sin = torch.randn(shape[0], shape[-1])
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(*shape[:-1], shape[-1] + 5).to(dtype)[..., : shape[-1]]
        got = apply_rope(x, cos_sin, interleave=interleave)
        torch.testing.assert_close(got, apply_rope_ref(x, cos_sin, interleave=interleave))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (130, 6), (3, 2)])
def test_store_latent_is_exact(rank, rope, kind):
    scale = torch.tensor([1e-3, 1.0, 1e4, 1e-37, 1.0])[:, None]
    latent = torch.randn(5, rank + rope + 2) * scale
    latent[4, :rank] = 0.0
    latent[4, 0] = -0.0
    c_kv, k_pe = latent[:, :rank], latent[:, rank : rank + rope]
    slots = torch.tensor([9, 2, -1, 0, 11])
    ours, theirs = _cache(rank, rope, kind), _cache(rank, rope, kind)
    store_latent(c_kv, k_pe, ours, slots)
    store_latent_ref(c_kv, k_pe, theirs, slots)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    store_latent(c_kv[:0], k_pe[:0], ours, slots[:0])
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_every_rounding_of_e4m3_and_bf16():
    """All values of e4m3, the middles between them and their neighbours in fp32, and the same of bf16 for k_pe."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    points = torch.cat((points, *(torch.nextafter(points, torch.tensor(x)) for x in (-1.0, 1e9))))
    points = torch.cat((points, -points)).clamp(-448, 448)
    c_kv = torch.zeros(-(-points.numel() // 127), 128)
    c_kv[:, 0] = 448.0  # which makes the scale 1
    c_kv[:, 1:] = torch.nn.functional.pad(points, (0, -points.numel() % 127)).view(-1, 127)
    bits = torch.randint(-(2**31), 2**31 - 1, (c_kv.shape[0], 64), dtype=torch.int32)
    bits[:, :8] = bits[:, :8] & -65536 | 0x8000  # halfway
    bits[:, 8] = 0x7F7FFFFF
    k_pe = bits.view(torch.float32).nan_to_num(1.0)
    ours, theirs = (torch.zeros(8, 4, 272, dtype=torch.uint8) for _ in range(2))
    slots = torch.arange(c_kv.shape[0])
    store_latent(c_kv, k_pe, ours, slots)
    store_latent_ref(c_kv, k_pe, theirs, slots)
    assert torch.equal(ours, theirs)


def test_groups_that_are_not_finite():
    c_kv, k_pe = torch.randn(3, 256), torch.randn(3, 8)
    c_kv[0, 5], c_kv[1, 200], c_kv[2, 128], k_pe[0, 1] = math.nan, math.inf, -math.inf, math.nan
    for kind in CACHE_TYPES:
        ours, theirs = _cache(256, 8, kind), _cache(256, 8, kind)
        store_latent(c_kv, k_pe, ours, torch.tensor([0, 1, 2]))
        store_latent_ref(c_kv, k_pe, theirs, torch.tensor([0, 1, 2]))
        for got, expected in zip(
            decode_latents(ours[0, :3], 256, 8), decode_latents(theirs[0, :3], 256, 8), strict=True
        ):
            torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("fp32", torch.float16), ("bf16", torch.float32), ("fp8", torch.float16)]
)
@pytest.mark.parametrize(
    ("heads", "rank", "rope", "interleave"),
    [(20, 512, 64, True), (3, 130, 6, False)],
)
def test_mla_prepare(heads, rank, rope, interleave, dtype, kind):
    tokens, nope = 4, 5
    latent = torch.randn(tokens, rank + rope + 3).to(dtype)[:, : rank + rope]
    q = torch.randn(tokens, heads, nope + rope).to(dtype)
    table, weight = torch.randn(50, rope), torch.randn(rank)
    positions = torch.tensor([7, 49, 0, 7], dtype=torch.int32)
    slots = torch.tensor([5, 0, -1, 10])
    ours, theirs = _cache(rank, rope, kind), _cache(rank, rope, kind)
    args = (table, positions, weight, 1e-6)
    expected = mla_prepare_ref(latent, q[..., nope:], *args, theirs, slots, interleave=interleave)
    got = mla_prepare(
        latent, q[..., nope:], *args, ours, slots, interleave=interleave, q_pe_out=None
    )
    torch.testing.assert_close(got, expected)
    touched = [5, 0, 10]
    rows = (cache.view(12, -1) for cache in (ours, theirs))
    for mine, reference in zip(
        *(decode_latents(r[touched], rank, rope) for r in rows), strict=True
    ):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=LIMITS[kind])
    rest = [i for i in range(12) if i not in touched]
    clean = _cache(rank, rope, kind).view(12, -1)[rest].view(torch.uint8)
    assert torch.equal(ours.view(12, -1)[rest].view(torch.uint8), clean)
    # In place, and with each token's own row of angles.
    inner = mla_prepare(
        latent, q[..., nope:], table[positions], None, weight, 1e-6, ours, slots,
        interleave=interleave, q_pe_out=q[..., nope:],
    )  # fmt: skip
    torch.testing.assert_close(inner, got, atol=0, rtol=0)
    torch.testing.assert_close(q[..., nope:], got, atol=0, rtol=0)


def test_mla_prepare_of_nothing():
    cache = _cache(8, 4, "fp32")
    empty = torch.empty(0, dtype=torch.int64)
    got = mla_prepare(
        torch.empty(0, 12), torch.empty(0, 2, 4), torch.empty(9, 4), empty, torch.ones(8), 1e-6,
        cache, empty, interleave=True, q_pe_out=None,
    )  # fmt: skip
    assert got.shape == (0, 2, 4)
    assert cache.isnan().all()
