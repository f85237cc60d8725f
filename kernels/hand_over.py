"""A layer's tokens on their way to the CPU: one launch that masks the experts' ids, counts uses, and writes everything
where the CPU reads it. A program per row and block of columns; the first block of a row also takes its ids.

The kernel writes to mapped pinned memory itself. Copies by the copy engine would each need a hand-over between engines
within the stream (some 2 us apiece, a few times what the 14 KB of a token take on the bus) and a staging buffer on the
device. Stores to host memory are posted: a program is done when its writes are on their way, and nothing is read back.
They are not held in the L2 cache to be combined later, so the pieces must be large from the start: a thread stores 16
bytes, a warp 512 adjacent ones, which leave as four full 128-byte transactions; at 4 bytes per thread and 32 per
transaction the same bytes would take about twice the bus time in headers. Ids and weights are a small transaction each
per row. The end of the kernel, and the fence before the stream's write of the flag, order all of it before the flag.
"""

import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device


@triton.jit
def _hand_over_kernel(
    x_ptr, ids_ptr, weights_ptr, slots_ptr, uses_ptr, to_x_ptr, to_ids_ptr, to_weights_ptr,
    stride_x, D, E, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + row * stride_x + cols, mask=cols < D)
    tl.store(to_x_ptr + row * D + cols, value.to(to_x_ptr.dtype.element_ty), mask=cols < D)
    if tl.program_id(1) == 0:
        k = tl.arange(0, BLOCK_K)
        at = row * TOP_K + k
        ids = tl.load(ids_ptr + at, mask=k < TOP_K, other=-1).to(tl.int32)
        weights = tl.load(weights_ptr + at, mask=k < TOP_K, other=0.0)
        exists = (ids >= 0) & (
            ids < E
        )  # others go on as they are: the CPU says what is wrong with them
        if uses_ptr is not None:
            tl.atomic_add(uses_ptr + ids, 1, mask=exists, sem="relaxed")
        if slots_ptr is not None:
            slots = tl.load(slots_ptr + ids, mask=exists, other=-1)
            ids = tl.where(slots >= 0, -1, ids)
        tl.store(to_ids_ptr + at, ids, mask=k < TOP_K)
        tl.store(to_weights_ptr + at, weights, mask=k < TOP_K)


def _config(width: int) -> dict[str, int]:
    # 16 bytes per thread of 16-bit values; blocks of 2 KB, so that a single token's row is written by several SMs.
    block = min(1024, triton.next_power_of_2(max(width, 1)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


@on_own_device
def hand_over(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    to_x: Tensor,
    to_ids: Tensor,
    to_weights: Tensor,
    slot_of_expert: Tensor | None,
    uses: Tensor | None,
    *,
    num_experts: int,
) -> None:
    """See `moejet.ops.hand_over`; targets are of the same number of rows, contiguous, pinned if x is on a GPU."""
    (num_tokens, width), top_k = x.shape, topk_ids.shape[1]
    for tensor in (topk_ids, topk_weights, to_x, to_ids, to_weights):
        assert tensor.is_contiguous(), f"{tensor.shape} {tensor.stride()}"
    assert x.stride(1) == 1 or width < 2, f"{x.stride()=}"
    if num_tokens == 0:
        return
    config = _config(width)
    _hand_over_kernel[(num_tokens, triton.cdiv(width, config["BLOCK"]))](
        x, topk_ids, topk_weights, slot_of_expert, uses, to_x, to_ids, to_weights,
        x.stride(0), width, num_experts,
        TOP_K=top_k, BLOCK_K=triton.next_power_of_2(top_k), **config,
    )  # fmt: skip
