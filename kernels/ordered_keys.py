"""fp32 values with their indices as integers of the same order, so that a maximum is unique and a tie decided.

A key is the value as an order-preserving int32 above the complement of the index: of equal values the smaller index
has the larger key. NaN is above everything, as in torch's sorts.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """fp32 as int32 of the same order; zeros of both signs are equal, NaN of either sign is above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF))


@triton.jit
def ordered_value(key):
    """What `ordered` was given."""
    bits = tl.where(key >= 0, key, key ^ 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def ordered_keys(key, index):
    """`ordered` values and indices from 0 to 2^31 - 1 as int64."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def ordered_part(keys):
    return (keys >> 32).to(tl.int32)


@triton.jit
def index_part(keys):
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
