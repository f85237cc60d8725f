"""Gathering latents in Triton: compiled ahead of time for every architecture, run on a GPU."""

import pytest
import torch

from moejet.latent_layout import row_bytes, row_elements, scales_begin, scales_end
from moejet.ops.gather_latent import gather_latent, gather_latent_ref
from moejet.ops.latent_rows import CACHE_TYPES, encode_latents

pytest.importorskip("triton")

from moejet.kernels import gather_latent as kernel
from moejet.kernels.card import CARDS
from moejet.testing.aot import assert_fits, launches_compiled_for


@pytest.mark.parametrize(
    ("capability", "cache_dtype"),
    [*((capability, "fp8") for capability in CARDS), (86, "bf16"), (90, "bf16")],
)
def test_compiles(capability, cache_dtype):
    def empty(*sizes, dtype=torch.bfloat16):
        return torch.empty(*sizes, dtype=dtype, device="meta")

    row = row_elements(512, 64, cache_dtype)
    with launches_compiled_for(CARDS[capability]) as compiled:
        for max_blocks in (30, 1, 32):
            kernel.gather_latent(
                empty(100, 64, row, dtype=CACHE_TYPES[cache_dtype]),
                empty(4, max_blocks, dtype=torch.int64),
                empty(4, 8, dtype=torch.int32),
                empty(8192, 512),
                empty(8192, 64),
                max_keys=4096,
            )
    assert len({id(launch.asm) for launch in compiled}) == 1  # compiled once, not while serving
    assert_fits(compiled[0], CARDS[capability])
    assert compiled[0].spilled == 0
    if cache_dtype == "bf16":
        assert "ld.global.v4" in compiled[0].asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (130, 6)])
def test_on_the_gpu(cache_dtype, dtype, rank, rope):
    torch.manual_seed(0)
    cache = encode_latents(
        torch.randn(40, 16, rank), torch.randn(40, 16, rope), CACHE_TYPES[cache_dtype]
    ).cuda()
    tables = torch.randperm(40).view(2, 20).cuda()
    pieces = torch.tensor(
        [[1, 0, 0, 0, 301, 7, 0, 0], [0, 0, 0, 301, 19, 0, 0, 0]], dtype=torch.int32, device="cuda"
    )
    sizes = {"rank": rank, "rope_dim": rope, "num_keys": 320, "dtype": dtype}
    got = gather_latent(cache, tables, pieces, **sizes, max_keys=301)
    expected = gather_latent_ref(cache, tables, pieces, **sizes)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_every_e4m3_code():
    row = torch.zeros(1, 1, row_bytes(256, 2, "fp8"), dtype=torch.uint8)
    row[..., :256] = torch.arange(256)
    row[..., scales_begin(256) : scales_end(256)] = torch.tensor([0.5, 2.0]).view(torch.uint8)
    table = torch.zeros(1, 1, dtype=torch.int32)
    piece = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.int32)
    sizes = {"rank": 256, "rope_dim": 2, "num_keys": 1, "dtype": torch.float32}
    got, _ = gather_latent(row.cuda(), table.cuda(), piece.cuda(), **sizes, max_keys=1)
    expected, _ = gather_latent_ref(row, table, piece, **sizes)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)
