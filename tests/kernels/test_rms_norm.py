"""The Triton RMSNorm: interpreted on the CPU, compiled ahead of time for every architecture, run on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from moejet.ops.rms_norm import rms_norm, rms_norm_ref

triton = pytest.importorskip("triton")

# The interpreter is chosen by an environment variable that must be set before Triton is imported.
_INTERPRETED = """
import torch
from moejet.kernels.rms_norm import rms_norm
from moejet.ops.rms_norm import rms_norm_ref
torch.manual_seed(0)
for shape in ((1, 1), (3, 7), (2, 5, 64), (4, 1000), (0, 16)):
    for dtype in (torch.float32, torch.float16):
        wide = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)
        x, weight = wide[..., : shape[-1]], torch.randn(shape[-1])
        got = rms_norm(x, weight, 1e-6, out_dtype=torch.float32)
        torch.testing.assert_close(got, rms_norm_ref(x, weight, 1e-6, out_dtype=torch.float32))
print("checked")
"""


def test_interpreter_matches_the_reference():
    result = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "checked", result.stderr[-2000:]


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_compiles_for_every_architecture(arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moejet.kernels.rms_norm import _rms_norm_kernel

    signature = {
        "x_ptr": "*bf16",
        "weight_ptr": "*fp32",
        "out_ptr": "*bf16",
        "stride_xm": "i64",
        "stride_om": "i64",
        "dim": "i32",
        "eps": "fp32",
        "BLOCK_D": "constexpr",
    }
    source = ASTSource(_rms_norm_kernel, signature, constexprs={"BLOCK_D": 8192})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 16})
    limit = 99 * 1024 if arch in (86, 89, 120) else 163 * 1024
    assert compiled.metadata.shared <= limit
    assert "cubin" in compiled.asm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 7168), (33, 2048), (5, 3, 1000)])
def test_gpu_matches_the_reference(shape, dtype):
    x = torch.randn(*shape, device="cuda").to(dtype)
    weight = torch.randn(shape[-1], device="cuda")
    got = rms_norm(x, weight, 1e-6, out_dtype=dtype)
    torch.testing.assert_close(got, rms_norm_ref(x, weight, 1e-6, out_dtype=dtype))
