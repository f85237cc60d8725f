"""Sizes of a row of the latent cache: C values of c_kv, then R of k_pe, per token and layer.

fp32, bf16   [C + R] as they are
fp8          bytes: [C e4m3 codes | one fp32 scale for each 128 of them | R bf16 values], scales at a multiple of 4,
             the row a multiple of 16: 656 bytes for C = 512, R = 64, where bf16 takes 1152 (csrc/latent_layout.h)
"""

GROUP = 128  # values that share a scale
_ELEMENT_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4}


def scales_begin(rank: int) -> int:
    """Bytes of an fp8 row before its scales; C = rank."""
    return -(-rank // 4) * 4


def scales_end(rank: int) -> int:
    """Bytes of an fp8 row before k_pe."""
    return scales_begin(rank) + -(-rank // GROUP) * 4


def row_bytes(rank: int, rope: int, cache_dtype: str) -> int:
    """Bytes of a row; C = rank, R = rope."""
    if cache_dtype == "fp8":
        return -(-(scales_end(rank) + 2 * rope) // 16) * 16
    return (rank + rope) * _ELEMENT_BYTES[cache_dtype]


def row_elements(rank: int, rope: int, cache_dtype: str) -> int:
    """The last dimension of a cache tensor, which is of uint8 for fp8."""
    return row_bytes(rank, rope, cache_dtype) // _ELEMENT_BYTES[cache_dtype]
