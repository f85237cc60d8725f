"""Residual addition and the RMSNorm (arXiv 1910.07467) that follows it, one program per row.

The residual is read, added to and written once, and its norm is computed from registers: what would be two kernels and
three more passes over the row. The norm is that of the residual as it is stored, so a residual in 16 bits gives the
same result as the two operations one after the other.

Narrow rows (a latent of 512) keep one program each: one warp with 16 values per thread is enough bytes in flight for
the 16 blocks that a multiprocessor holds, so several rows per program would only cost registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device


@triton.jit
def _fused_add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, stride_xm, stride_rm, stride_om, dim, eps,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < dim
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    residual_ptrs = residual_ptr + row * stride_rm + cols
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    stored = (x + residual).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptrs, stored, mask=mask)
    total = stored.to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(total * total, axis=0) / dim + eps)
    out = (total * inverse * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_om + cols, out, mask=mask)


@on_own_device
def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out_dtype: torch.dtype
) -> Tensor:
    """residual += x in place; returns its norm. x and residual [..., D], unit stride in D; residual's rows a view."""
    assert x.shape == residual.shape, f"{x.shape=} {residual.shape=}"
    assert weight.shape == x.shape[-1:], f"{weight.shape=} {x.shape=}"
    assert weight.is_contiguous(), f"{weight.stride()=}"
    rows = x.reshape(-1, x.shape[-1])
    residual_rows = residual.view(-1, x.shape[-1])  # never a copy: it is written
    assert rows.stride(1) == residual_rows.stride(1) == 1, f"{x.stride()=} {residual.stride()=}"
    out = torch.empty(rows.shape, dtype=out_dtype, device=x.device)
    if rows.shape[0]:
        block = triton.next_power_of_2(rows.shape[1])
        _fused_add_rms_norm_kernel[(rows.shape[0],)](
            rows, residual_rows, weight, out,
            rows.stride(0), residual_rows.stride(0), out.stride(0), rows.shape[1], eps,
            BLOCK_D=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out.view(x.shape)
