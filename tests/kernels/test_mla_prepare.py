"""mla_prepare, apply_rope and store_latent in Triton: compiled ahead of time, run on a GPU."""

import math

import pytest
import torch

from moejet.latent_layout import row_elements
from moejet.ops.latent_rows import CACHE_TYPES, decode_latents
from moejet.ops.mla_prepare import mla_prepare, mla_prepare_ref
from moejet.ops.rope import apply_rope, apply_rope_ref
from moejet.ops.store_latent import store_latent, store_latent_ref

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.mla_prepare import mla_prepare as launch_prepare
from moejet.kernels.rope import apply_rope as launch_rope
from moejet.kernels.store_latent import store_latent as launch_store
from moejet.testing.aot import assert_fits, launches_compiled_for

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A step of the cache's type where a norm's sum, in another order, rounds to the other side.
LIMITS = {"fp32": 1e-5, "bf16": 2**-7, "fp8": 2**-2}


def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("kind", "capability"),
    [*(("fp8", sm) for sm in CARDS), ("bf16", 86), ("bf16", 90), ("bf16", 120), ("fp32", 86)],
)
def test_compiles(kind, capability):
    card, with_parts = CARDS[capability], kind == "fp8" and capability in (86, 90)
    fp32, i64 = torch.float32, torch.int64
    cache = _meta(10, 64, row_elements(512, 64, kind), dtype=CACHE_TYPES[kind])
    heads, nope = (128, 128) if kind == "fp8" else (20, 192)  # DeepSeek-V3, GLM-4.7-Flash
    q_pe = _meta(4, heads, nope + 64)[..., nope:]
    with launches_compiled_for(card) as compiled:
        launch_prepare(
            _meta(4, 576), q_pe, _meta(4096, 64, dtype=fp32), _meta(4, dtype=i64),
            _meta(512, dtype=fp32), 1e-6, cache, _meta(4, dtype=i64), interleave=True, q_pe_out=None,
        )  # fmt: skip
        if with_parts:
            latent = _meta(4, 576)
            launch_store(latent[:, :512], latent[:, 512:], cache, _meta(4, dtype=i64))
            launch_rope(q_pe, _meta(4, 64, dtype=fp32), interleave=True)
    assert len(compiled) == (3 if with_parts else 1)
    for launch in compiled:
        assert_fits(launch, card)
        assert launch.spilled == 0


@pytest.mark.gpu
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (700, 128, 64), (5, 20, 64), (3, 7, 6)])
def test_apply_rope_on_the_gpu(shape, dtype, interleave):
    x, cos_sin = torch.randn(*shape).to(dtype), torch.randn(shape[0], shape[-1])
    got = apply_rope(x.cuda(), cos_sin.cuda(), interleave=interleave)
    torch.testing.assert_close(got.cpu(), apply_rope_ref(x, cos_sin, interleave=interleave))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CACHE_TYPES)
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (130, 6)])
def test_store_latent_on_the_gpu_is_exact(rank, rope, kind):
    latent = torch.randn(300, rank + rope) * torch.logspace(-36, 6, 300)[:, None]
    latent[7, 3], latent[8, 3] = math.nan, math.inf
    slots = torch.randperm(320)[:300]
    slots[5] = -1
    ours = torch.zeros(
        5, 64, row_elements(rank, rope, kind), dtype=CACHE_TYPES[kind], device="cuda"
    )
    theirs = ours.cpu()
    store_latent(latent[:, :rank].cuda(), latent[:, rank:].cuda(), ours, slots.cuda())
    store_latent_ref(latent[:, :rank], latent[:, rank:], theirs, slots)
    for got, expected in zip(
        decode_latents(ours.cpu(), rank, rope), decode_latents(theirs, rank, rope), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CACHE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "nope"), [(1, 128, 128), (8, 16, 128), (600, 20, 192)])
def test_mla_prepare_on_the_gpu(tokens, heads, nope, dtype, kind):
    latent, q = torch.randn(tokens, 576).to(dtype), torch.randn(tokens, heads, nope + 64).to(dtype)
    table, weight = torch.randn(1000, 64), torch.randn(512)
    positions = torch.randint(1000, (tokens,))
    slots = torch.randperm(640)[:tokens]
    if tokens > 1:
        slots[1] = -1
    ours = torch.zeros(10, 64, row_elements(512, 64, kind), dtype=CACHE_TYPES[kind], device="cuda")
    theirs = ours.cpu()
    expected = mla_prepare_ref(
        latent, q[..., nope:], table, positions, weight, 1e-6, theirs, slots, interleave=True
    )
    device = [t.cuda() for t in (latent, q, table, positions, weight, slots)]
    latent, q, table, positions, weight, slots = device
    out = torch.full((tokens, heads, 576), math.nan, dtype=dtype, device="cuda")[..., 512:]
    for target in (out, q[..., nope:]):  # the second is in place
        got = mla_prepare(
            latent, q[..., nope:], table, positions, weight, 1e-6, ours, slots,
            interleave=True, q_pe_out=target,
        )  # fmt: skip
        torch.testing.assert_close(got.cpu(), expected)
    rows = (decode_latents(cache, 512, 64) for cache in (ours.cpu(), theirs))
    for mine, reference in zip(*rows, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=LIMITS[kind])
