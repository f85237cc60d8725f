import pytest
import torch

from moejet.kernels.rms_norm import rms_norm
from moejet.ops.rms_norm import rms_norm_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (4, 1000), (0, 16)])
def test_matches_the_reference(shape, dtype):
    wide = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)
    x, weight = wide[..., : shape[-1]], torch.randn(shape[-1])
    got = rms_norm(x, weight, 1e-6, out_dtype=torch.float32)
    torch.testing.assert_close(got, rms_norm_ref(x, weight, 1e-6, out_dtype=torch.float32))
