"""Gathers rows of the token embedding; a program per token and block of columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device


@triton.jit
def _embedding_kernel(
    ids_ptr, weight_ptr, out_ptr, stride_wv, stride_om, vocab_size, dim, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + row).to(tl.int64)
    mask = cols < dim
    known = cols < tl.where((token >= 0) & (token < vocab_size), dim, 0)
    value = tl.load(weight_ptr + token * stride_wv + cols, mask=known, other=0.0)
    tl.store(out_ptr + row * stride_om + cols, value.to(out_ptr.dtype.element_ty), mask=mask)


def _config(dim: int) -> dict[str, int]:
    # 8 values per thread, and several programs per row: one token alone should not wait for one multiprocessor.
    block = min(1024, triton.next_power_of_2(dim))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


@on_own_device
def embedding(token_ids: Tensor, weight: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """token_ids [T] int32 or int64, contiguous · weight [V, D], unit stride in D. Ids outside of [0, V) give zeros."""
    assert token_ids.dim() == 1, f"{token_ids.shape=}"
    assert token_ids.is_contiguous(), f"{token_ids.stride()=}"
    assert weight.stride(1) == 1 or weight.shape[1] < 2, f"{weight.stride()=}"
    num_tokens, (vocab_size, dim) = token_ids.shape[0], weight.shape
    out = torch.empty(num_tokens, dim, dtype=out_dtype, device=weight.device)
    if out.numel():
        config = _config(dim)
        _embedding_kernel[(num_tokens, triton.cdiv(dim, config["BLOCK"]))](
            token_ids, weight, out, weight.stride(0), out.stride(0), vocab_size, dim, **config
        )
    return out
