"""The fp8 latent cache: rows as torch stores them, and attention over them as over the values they stand for."""

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.latent_layout import row_bytes, scales_begin, scales_end
from moejet.ops.latent_rows import decode_latents, encode_latents
from moejet.ops.rope import rope_table
from moejet.presets import PRESETS

RANKS = [(512, 64), (1, 2), (12, 6), (33, 6), (160, 32), (300, 66), (129, 8)]
SLOTS = torch.tensor([9, 0, 11, 4, 5, 2, 7])


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _store(c_kv: Tensor, k_pe: Tensor, isa: str) -> Tensor:
    """Rows [T, bytes] of a cache that held other things before."""
    width = row_bytes(c_kv.shape[1], k_pe.shape[1], "fp8")
    cache = torch.full((1, c_kv.shape[0], width), 0xAB, dtype=torch.uint8)
    _C.store_latent(c_kv, k_pe, cache, torch.arange(c_kv.shape[0]), isa=isa)
    return cache[0]


def test_a_row_of_the_published_shape_takes_656_bytes() -> None:
    assert row_bytes(512, 64, "fp8") == 656
    assert (scales_begin(512), scales_end(512)) == (512, 528)
    assert row_bytes(512, 64, "bf16") == 1152


@pytest.mark.parametrize(("rank", "rope"), RANKS)
def test_stored_rows_are_those_of_torch(isa: str, rank: int, rope: int) -> None:
    """Norm and rotation included; values of very different sizes, so that many codes have no exponent bits."""
    weight, table = _randn(rank), rope_table(PRESETS["deepseek-v3"].rope, rope, 200)
    latent = _randn(7, rank + rope, seed=3) * torch.exp(3 * _randn(7, rank + rope, seed=4))
    c_kv, k_pe = latent[:, :rank], latent[:, rank:]  # rows apart
    cos_sin = table[torch.arange(7) * 19 + 3]
    normed, rotated = torch.empty(7, rank), torch.empty(7, rope)
    _C.rms_norm(c_kv, weight, 1e-6, normed, isa=isa)
    _C.rope(k_pe.unsqueeze(1), cos_sin, True, rotated.unsqueeze(1), isa=isa)
    cache = torch.full((3, 4, row_bytes(rank, rope, "fp8")), 0xAB, dtype=torch.uint8)
    expected = cache.clone()
    expected.view(12, -1)[SLOTS] = encode_latents(normed, rotated, torch.uint8)
    _C.store_latent(c_kv, k_pe, cache, SLOTS, weight, 1e-6, cos_sin, True, isa=isa)
    assert torch.equal(cache, expected)
    expected.view(12, -1)[SLOTS] = encode_latents(c_kv, k_pe, torch.uint8)
    _C.store_latent(c_kv, k_pe, cache, SLOTS, isa=isa)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("rank", [512, 37])
def test_error_of_a_value(isa: str, rank: int) -> None:
    """Half a step of three bits, or of the smallest step where the group's largest value is 448 of them."""
    c_kv = _randn(9, rank) * torch.exp(2 * _randn(9, rank, seed=1))
    got, _ = decode_latents(_store(c_kv, _randn(9, 4), isa), rank, 4)
    groups = [c_kv[:, i : i + 128].abs().amax(1, keepdim=True) for i in range(0, rank, 128)]
    largest = torch.cat([g.expand(-1, 128) for g in groups], 1)[:, :rank]
    bound = torch.maximum(c_kv.abs() / 16, largest / 448 * 2**-10) * (1 + 1e-6)
    assert bool(((got - c_kv).abs() <= bound).all())


def test_zeros_tiny_and_huge_values(isa: str) -> None:
    c_kv = torch.zeros(6, 256)
    c_kv[1, :128] = 1e-31
    c_kv[2, 5] = -3e38
    c_kv[3, 128:] = 1e-29
    c_kv[4, 0] = -0.0
    c_kv[5] = torch.linspace(-448, 448, 256)
    rows = _store(c_kv, torch.zeros(6, 2), isa)
    assert torch.equal(rows, encode_latents(c_kv, torch.zeros(6, 2), torch.uint8))
    got, _ = decode_latents(rows, 256, 2)
    assert got[:2].abs().max() == 0
    assert got[4].abs().max() == 0
    torch.testing.assert_close(got[2:4], c_kv[2:4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_group_with_nan_or_infinity_is_nan(isa: str, bad: float) -> None:
    c_kv, k_pe = _randn(2, 300), _randn(2, 4)
    c_kv[0, 200] = bad
    k_pe[1, 3] = bad
    rows = _store(c_kv, k_pe, isa)
    values, rope = decode_latents(rows, 300, 4)
    assert values[0, 128:256].isnan().all()
    assert values[0, :128].isfinite().all()
    assert values[0, 256:].isfinite().all()
    assert values[1].isfinite().all()
    assert torch.equal(rope[1].isfinite(), torch.tensor([True, True, True, False]))
    assert not ((rows[:, :300] & 0x7F) == 0x7F).any()


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        (torch.zeros(1, 2, 8, dtype=torch.uint8), ValueError, "row bytes=16"),
        (torch.zeros(1, 2, 32, dtype=torch.uint8)[:, :, ::2], ValueError, "not contiguous"),
        (torch.zeros(1, 2, 16, dtype=torch.int8), TypeError, "cache has dtype"),
    ],
)
def test_refused_caches(cache: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _C.store_latent(torch.ones(2, 4), torch.ones(2, 4), cache, torch.tensor([0, 1]))
