import pytest
import torch

from moejet.kernels.gather_latent import gather_latent
from moejet.latent_layout import row_bytes, scales_begin, scales_end
from moejet.ops.gather_latent import gather_latent_ref
from moejet.ops.latent_rows import CACHE_TYPES, encode_latents


def gathered(cache, tables, pieces, rank, rope, num_keys):
    c_kv = torch.full((num_keys, rank), torch.nan)
    k_pe = torch.full((num_keys, rope), torch.nan)
    max_keys = int(pieces[:, 4].max()) if len(pieces) else 0
    gather_latent(cache, tables, pieces, c_kv, k_pe, max_keys=max_keys)
    return c_kv, k_pe


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (20, 6), (130, 8)])
def test_matches_the_reference(cache_dtype, rank, rope):
    rows = encode_latents(
        torch.randn(7, 4, rank), torch.randn(7, 4, rope), CACHE_TYPES[cache_dtype]
    )
    layers = torch.stack((rows.flip(0), rows))  # a layer of a cache of two
    tables = torch.tensor([[6, 0, -1, -1], [3, 1, 5, 2]])
    pieces = torch.tensor([[1, 0, 0, 0, 11, 3, 0, 0], [0, 0, 0, 11, 6, 0, 0, 0]], dtype=torch.int32)
    got = gathered(layers[1], tables, pieces, rank, rope, 17)
    expected = gather_latent_ref(
        rows, tables, pieces, rank=rank, rope_dim=rope, num_keys=17, dtype=torch.float32
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_every_e4m3_code():
    rank, rope = 256, 2
    row = torch.zeros(1, 1, row_bytes(rank, rope, "fp8"), dtype=torch.uint8)
    row[..., :rank] = torch.arange(256)
    row[..., scales_begin(rank) : scales_end(rank)] = torch.tensor([0.5, 2.0]).view(torch.uint8)
    piece = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.int32)
    c_kv, _ = gathered(row, torch.tensor([[0]]), piece, rank, rope, 1)
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = expected * torch.tensor([0.5, 2.0]).repeat_interleave(128)
    torch.testing.assert_close(c_kv[0], expected, rtol=0, atol=0, equal_nan=True)
    assert (c_kv[0].signbit() == expected.signbit()).logical_or(expected.isnan()).all()


def test_nothing_to_gather():
    cache = torch.zeros(1, 4, 12)
    pieces = torch.zeros(0, 8, dtype=torch.int32)
    c_kv, _ = gathered(cache, torch.zeros(1, 1, dtype=torch.int64), pieces, 8, 4, 0)
    assert c_kv.shape == (0, 8)
