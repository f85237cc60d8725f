"""Residual + RMSNorm and silu-mul in Triton: compiled ahead of time, run on a GPU."""

import pytest
import torch

from moejet.ops.fused_add_rms_norm import fused_add_rms_norm, fused_add_rms_norm_ref
from moejet.ops.silu_mul import silu_mul, silu_mul_ref

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.fused_add_rms_norm import fused_add_rms_norm as launch_norm
from moejet.kernels.silu_mul import silu_mul as launch_silu
from moejet.testing.aot import assert_fits, launches_compiled_for

BF16 = torch.bfloat16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _meta(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm{card.capability}")
def test_compiles(card):
    fp32, is_first = torch.float32, card.capability == 86
    with launches_compiled_for(card) as compiled:
        for dim in (7168, 2048) if is_first else (7168,):
            launch_norm(
                _meta(4, dim),
                _meta(4, dim, dtype=fp32),
                _meta(dim, dtype=fp32),
                1e-6,
                out_dtype=BF16,
            )
        for width in (2048, 1408) if is_first else (2048,):
            gate, up = _meta(4, 2 * width).chunk(2, dim=1)
            launch_silu(gate, up, out_dtype=BF16)
    assert len(compiled) == (4 if is_first else 2)
    for launch in compiled:
        assert_fits(launch, card)
        assert launch.spilled == 0


@pytest.mark.gpu
@pytest.mark.parametrize("residual_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7168), (33, 2048), (5, 3, 1000)])
def test_fused_add_rms_norm_on_the_gpu(shape, dtype, residual_dtype):
    x = torch.randn(*shape, device="cuda").to(dtype)
    weight = torch.randn(shape[-1], device="cuda")
    ours = torch.randn(*shape, device="cuda").to(residual_dtype or dtype)
    theirs = ours.clone()
    got = fused_add_rms_norm(x, ours, weight, 1e-6, out_dtype=dtype)
    expected = fused_add_rms_norm_ref(x, theirs, weight, 1e-6, out_dtype=dtype)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2048), (257, 1408), (3, 18432), (70000, 8)])
def test_silu_mul_on_the_gpu(shape, dtype):
    gate_up = torch.randn(shape[0], 2 * shape[1], device="cuda").to(dtype)
    got = silu_mul(gate_up, out_dtype=dtype)
    torch.testing.assert_close(got, silu_mul_ref(*gate_up.chunk(2, dim=1), out_dtype=dtype))
