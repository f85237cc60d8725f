import pytest
import torch

from moejet.kernels.fused_add_rms_norm import fused_add_rms_norm as launch
from moejet.ops.fused_add_rms_norm import fused_add_rms_norm, fused_add_rms_norm_ref


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("float16", "float32"), ("float16",) * 2]
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (4, 1000), (0, 16)])
def test_matches_the_reference(shape, dtypes):
    x_dtype, residual_dtype = (getattr(torch, name) for name in dtypes)
    wide = torch.randn(*shape[:-1], shape[-1] + 3).to(x_dtype)
    x, weight = wide[..., : shape[-1]], torch.randn(shape[-1])
    residual = torch.randn(*shape).to(residual_dtype)
    for other in (fused_add_rms_norm_ref, fused_add_rms_norm):
        ours, theirs = residual.clone(), residual.clone()
        got = launch(x, ours, weight, 1e-6, out_dtype=torch.float32)
        expected = other(x, theirs, weight, 1e-6, out_dtype=torch.float32)
        assert torch.equal(ours, theirs)
        # Sums in another order: a few units in the last place of the mean square.
        torch.testing.assert_close(got, expected)


def test_residual_rows_may_be_strided():
    wide = torch.randn(3, 20)
    before, x = wide.clone(), torch.randn(3, 12)
    got = launch(x, wide[:, :12], torch.ones(12), 1e-6, out_dtype=torch.float16)
    assert torch.equal(wide[:, :12], before[:, :12] + x)
    assert torch.equal(wide[:, 12:], before[:, 12:])
    assert got.dtype == torch.float16
