"""RMSNorm (arXiv 1910.07467), one program per row.

Rows of D values are read once into registers (BLOCK_D, the next power of two, covers the row), the mean of squares is
fp32, and the result is written in the output's dtype. Bound by bandwidth: D values in, D values out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, stride_xm, stride_om, dim, eps, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < dim
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps)
    out = (x * inverse * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_om + cols, out, mask=mask)


@on_own_device
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out_dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. x [..., D] with unit stride in D, weight [D] contiguous."""
    assert weight.is_contiguous(), f"{weight.stride()=}"
    assert weight.shape == x.shape[-1:], f"{weight.shape=} {x.shape=}"
    rows = x.reshape(-1, x.shape[-1])
    assert rows.stride(1) == 1, f"{x.stride()=}"
    out = torch.empty(rows.shape, dtype=out_dtype, device=x.device)
    if rows.shape[0]:
        block = triton.next_power_of_2(rows.shape[1])
        num_warps = min(16, max(1, block // 512))
        _rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, rows.stride(0), out.stride(0), rows.shape[1], eps,
            BLOCK_D=block, num_warps=num_warps,
        )  # fmt: skip
    return out.view(x.shape)
