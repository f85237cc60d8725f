"""Log-sum-exp of a row from what its chunks found."""

import triton
import triton.language as tl


@triton.jit
def log_sum_of_row(maxima_ptr, sums_ptr, row, num_chunks, BLOCK_N: tl.constexpr):
    """maxima and sums [rows, num_chunks] fp32: a chunk's largest logit and its sum of exp(logit - largest)."""
    chunks = tl.arange(0, BLOCK_N)
    mask = chunks < num_chunks
    maxima = tl.load(maxima_ptr + row * num_chunks + chunks, mask=mask, other=float("-inf"))
    sums = tl.load(sums_ptr + row * num_chunks + chunks, mask=mask, other=0.0)
    top = tl.max(maxima, axis=0)
    return top + tl.log(
        tl.sum(tl.where(maxima == float("-inf"), 0.0, sums * tl.exp(maxima - top)), axis=0)
    )
