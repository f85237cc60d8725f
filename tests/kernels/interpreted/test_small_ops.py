import pytest
import torch

from moejet.kernels.fused_add_rms_norm import fused_add_rms_norm as launch_norm
from moejet.kernels.silu_mul import silu_mul
from moejet.ops.fused_add_rms_norm import fused_add_rms_norm, fused_add_rms_norm_ref
from moejet.ops.silu_mul import silu_mul_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1500), (0, 16), (2, 0)])
def test_silu_mul(shape, dtype):
    tokens, width = shape
    gate_up = (torch.randn(tokens, 2 * width + 3) * 4).to(dtype)
    gate, up = gate_up[:, :width], gate_up[:, width : 2 * width]
    if tokens and width:
        gate[0, 0], up[0, 0] = -200.0, 3.0  # exp(200) is infinite
    got = silu_mul(gate, up, out_dtype=torch.float32)
    torch.testing.assert_close(got, silu_mul_ref(gate, up, out_dtype=torch.float32))
    if dtype == torch.float16:
        got = silu_mul(gate, up, out_dtype=dtype)
        torch.testing.assert_close(got, silu_mul_ref(gate, up, out_dtype=dtype))


def test_silu_mul_keeps_nan():
    gate, up = torch.tensor([[1.0, float("nan"), 2.0]]), torch.tensor([[float("inf"), 1.0, 0.5]])
    got = silu_mul(gate, up, out_dtype=torch.float32)
    assert got.isnan().tolist() == [[False, True, False]]
    assert got.isinf().tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("float16", "float32"), ("float16",) * 2]
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 64), (2, 1000), (0, 16)])
def test_fused_add_rms_norm(shape, dtypes):
    x_dtype, residual_dtype = (getattr(torch, name) for name in dtypes)
    wide = torch.randn(*shape[:-1], shape[-1] + 3).to(x_dtype)
    x, weight = wide[..., : shape[-1]], torch.randn(shape[-1])
    residual = torch.randn(*shape).to(residual_dtype)
    for other in (fused_add_rms_norm_ref, fused_add_rms_norm):
        ours, theirs = residual.clone(), residual.clone()
        got = launch_norm(x, ours, weight, 1e-6, out_dtype=torch.float32)
        expected = other(x, theirs, weight, 1e-6, out_dtype=torch.float32)
        assert torch.equal(ours, theirs)
        # Sums in another order: a few units in the last place of the mean square.
        torch.testing.assert_close(got, expected)


def test_residual_rows_may_be_strided():
    wide = torch.randn(3, 20)
    before, x = wide.clone(), torch.randn(3, 12)
    got = launch_norm(x, wide[:, :12], torch.ones(12), 1e-6, out_dtype=torch.float16)
    assert torch.equal(wide[:, :12], before[:, :12] + x)
    assert torch.equal(wide[:, 12:], before[:, 12:])
    assert got.dtype == torch.float16
