"""The Triton RMSNorm: compiled ahead of time for every architecture, run on a GPU."""

import pytest
import torch

from moejet.ops.rms_norm import rms_norm, rms_norm_ref

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.rms_norm import rms_norm as launch
from moejet.testing.aot import assert_fits, launches_compiled_for


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm{card.capability}")
@pytest.mark.parametrize("dim", [1536, 7168])
def test_compiles(card, dim):
    x = torch.empty(4, dim, dtype=torch.bfloat16, device="meta")
    with launches_compiled_for(card) as compiled:
        launch(x, torch.empty(dim, device="meta"), 1e-6, out_dtype=torch.bfloat16)
    assert len(compiled) == 1
    assert_fits(compiled[0], card)
    assert compiled[0].spilled == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 7168), (33, 2048), (5, 3, 1000)])
def test_on_the_gpu(shape, dtype):
    x = torch.randn(*shape, device="cuda").to(dtype)
    weight = torch.randn(shape[-1], device="cuda")
    got = rms_norm(x, weight, 1e-6, out_dtype=dtype)
    torch.testing.assert_close(got, rms_norm_ref(x, weight, 1e-6, out_dtype=dtype))
