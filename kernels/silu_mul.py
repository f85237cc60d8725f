"""silu(gate) * up, the activation between the two products of a gated MLP; a program per row and block of columns.

Bound by bandwidth: 2 I values in, I out per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device


@triton.jit
def _silu_mul_kernel(
    gate_ptr, up_ptr, out_ptr, stride_gm, stride_um, stride_om, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate = tl.load(gate_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * stride_om + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def _config(width: int) -> dict[str, int]:
    # 8 values per thread: 16-byte accesses of 16-bit types. 4 warps, fewer where the row is shorter.
    block = min(1024, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


@on_own_device
def silu_mul(gate: Tensor, up: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """gate and up [T, I], any row strides, unit stride in I. Returns [T, I]."""
    assert gate.shape == up.shape, f"{gate.shape=} {up.shape=}"
    num_tokens, width = gate.shape
    assert gate.stride(1) == up.stride(1) == 1 or width < 2, f"{gate.stride()=} {up.stride()=}"
    out = torch.empty(num_tokens, width, dtype=out_dtype, device=gate.device)
    if out.numel():
        config = _config(width)
        _silu_mul_kernel[(num_tokens, triton.cdiv(width, config["BLOCK"]))](
            gate, up, out, gate.stride(0), up.stride(0), out.stride(0), width, **config
        )
    return out
