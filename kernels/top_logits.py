"""The k largest logits of each row with their ids, and the row's log-sum-exp: the best of each chunk, then of those.

A chunk's values stay in registers while its maxima are taken one after the other: k is at most 32, and a maximum costs
less than reading the chunk. Equal values come in order of their ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device
from moejet.kernels.log_sums import log_sum_of_row
from moejet.kernels.ordered_keys import (
    index_part,
    ordered,
    ordered_keys,
    ordered_part,
    ordered_value,
)

MAX_K = 32
_CHUNK = 4096


@triton.jit(do_not_specialize=["k"])
def _best_of_chunk_kernel(
    logits_ptr, keys_ptr, maxima_ptr, sums_ptr, stride_lb, vocab_size, k, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    out = row * tl.num_programs(1) + tl.program_id(1)
    cols = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = cols < vocab_size
    x = tl.load(logits_ptr + row * stride_lb + cols, mask=mask, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, axis=0)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(maxima_ptr + out, largest)
    tl.store(sums_ptr + out, tl.sum(tl.exp(x - finite), axis=0))
    lowest = tl.full([CHUNK], -(2**63), tl.int64)
    keys = tl.where(mask, ordered_keys(ordered(x), cols), lowest)
    for i in range(k):
        best = tl.max(keys, axis=0)
        tl.store(keys_ptr + out * k + i, best)
        keys = tl.where(keys == best, lowest, keys)


@triton.jit(do_not_specialize=["k"])
def _best_of_row_kernel(
    keys_ptr, maxima_ptr, sums_ptr, values_ptr, ids_ptr, log_sums_ptr, num_chunks, k,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tl.store(log_sums_ptr + row, log_sum_of_row(maxima_ptr, sums_ptr, row, num_chunks, BLOCK_N))
    lowest = tl.full([BLOCK], -(2**63), tl.int64)
    lanes = tl.arange(0, BLOCK)
    number = num_chunks * k
    keys = tl.load(keys_ptr + row * number + lanes, mask=lanes < number, other=0)
    keys = tl.where(lanes < number, keys, lowest)
    for i in range(k):
        best = tl.max(keys, axis=0)
        tl.store(values_ptr + row * k + i, ordered_value(ordered_part(best)))
        tl.store(ids_ptr + row * k + i, index_part(best))
        keys = tl.where(keys == best, lowest, keys)


@on_own_device
def top_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, V], unit stride in V · k <= min(V, MAX_K). Returns values [B, k] fp32, ids [B, k] int32, sums [B]."""
    num_rows, vocab_size = logits.shape
    assert k <= min(vocab_size, MAX_K), f"{k=} {vocab_size=}"
    assert logits.stride(1) == 1 or vocab_size == 1, f"{logits.stride()=}"
    device = logits.device
    values = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    ids = torch.empty(num_rows, k, dtype=torch.int32, device=device)
    log_sums = torch.empty(num_rows, dtype=torch.float32, device=device)
    if num_rows == 0:
        return values, ids, log_sums
    chunks = triton.cdiv(vocab_size, _CHUNK)
    keys = torch.empty(num_rows, chunks, k, dtype=torch.int64, device=device)
    # Each allocated on its own: within one tensor, the batch would decide how the second is aligned.
    maxima, sums = (
        torch.empty(num_rows, chunks, dtype=torch.float32, device=device) for _ in range(2)
    )
    _best_of_chunk_kernel[(num_rows, chunks)](
        logits, keys, maxima, sums, logits.stride(0), vocab_size, k, CHUNK=_CHUNK, num_warps=8
    )
    _best_of_row_kernel[(num_rows,)](
        keys, maxima, sums, values, ids, log_sums, chunks, k,
        BLOCK_N=triton.next_power_of_2(chunks), BLOCK=triton.next_power_of_2(max(1, chunks * k)),
        num_warps=8,
    )  # fmt: skip
    return values, ids, log_sums
