"""The loop that all products with quantised weights share: tiles of W, dequantised in registers, times columns of x.

W is the left operand of tl.dot and the tokens are its columns. So the tile that is dequantised feeds the tensor cores
from the registers that it was loaded to, without shared memory in between, and eight tokens fill an instruction.

Weights become bf16 (or fp16, fp32 with such activations). For bf16, PTX makes two weights per 32-bit register at a
time; it needs no instruction that SM80 lacks. Placing an unsigned code in the low bits of a bf16 word gives
code * 2^-133, subnormal or not, since the spacing is the same up to 2^-125: one fused multiply-add then scales it and
takes the offset of the codes away. fp8: exponent and mantissa are shifted to where bf16 has them, and the difference
of the biases, 2^120, is multiplied in, which makes subnormal codes right as well. NaN codes are refused when weights
are loaded. Instructions per weight: int4_g32 1.3, int8 1.3, fp8 2.5. (The idea of exponent tricks: Kim et al., "Who
Says Elephants Can't Run", arXiv 2211.10017; FasterTransformer and Marlin use relatives of it.)

int4_g32 scales the tile, in fp32 terms round((code - 8) scale) to the tile's type; int8 and fp8 keep integers and
codes exact in the tile and scale the fp32 sums of each 128 inputs.
"""

import triton
import triton.language as tl

# Four bytes of two 4-bit codes: low halves to $0, $1 (times 2^-133), high halves to $2, $3 (times 2^-129).
INT4_CODES = tl.constexpr("""{
.reg .b32 a, b;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
and.b32 $0, a, 0x000f000f;
and.b32 $1, b, 0x000f000f;
and.b32 $2, a, 0x00f000f0;
and.b32 $3, b, 0x00f000f0;
}""")
# Products are 2^-24 of what they stand for: then scales from 2^-105 to 2^18 keep every factor in range.
INT4_LOW = tl.constexpr(2.0**109)
INT4_HIGH = tl.constexpr(2.0**105)
INT4_OFFSET = tl.constexpr(-8 * 2.0**-24)
INT4_RESULT = tl.constexpr(2.0**24)

# Four signed bytes: code + 128 in the low bits, times 2^127, minus 128 * 2^-6; code * 2^-6 in all.
INT8_VALUES = tl.constexpr("""{
.reg .b32 a, b, c, scale, offset;
mov.b32 scale, 0x7f007f00;
mov.b32 offset, 0xc000c000;
xor.b32 c, $2, 0x80808080;
prmt.b32 a, c, 0, 0x4140;
prmt.b32 b, c, 0, 0x4342;
fma.rn.bf16x2 $0, a, scale, offset;
fma.rn.bf16x2 $1, b, scale, offset;
}""")
INT8_RESULT = tl.constexpr(2.0**6)

# Four e4m3 bytes, each to the upper half of a 16-bit lane: the sign stays, seven bits move down by four.
FP8_VALUES = tl.constexpr("""{
.reg .b32 a, b, c, d, scale, zero;
mov.b32 scale, 0x7b807b80;
mov.b32 zero, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
and.b32 c, c, 0x07f007f0;
and.b32 d, d, 0x07f007f0;
lop3.b32 c, a, 0x80008000, c, 0xea;
lop3.b32 d, b, 0x80008000, d, 0xea;
fma.rn.bf16x2 $0, c, scale, zero;
fma.rn.bf16x2 $1, d, scale, zero;
}""")


@triton.jit
def fp8_values(codes, dtype: tl.constexpr, PACKED: tl.constexpr):
    """e4m3 codes (uint8) in dtype, exactly. PACKED: by the PTX above, for bf16."""
    if PACKED:
        return tl.inline_asm_elementwise(
            FP8_VALUES, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    # fp16 has the same mantissa shifted by seven, and a bias that is larger by eight.
    bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
    return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)


@triton.jit
def int8_values(codes, dtype: tl.constexpr, PACKED: tl.constexpr):
    """int8 codes in dtype; PACKED: times 2^-6."""
    if PACKED:
        return tl.inline_asm_elementwise(
            INT8_VALUES, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return codes.to(tl.float32).to(dtype)


@triton.jit
def repeat_columns(tile, TIMES: tl.constexpr):
    """[N, G] to [N, G * TIMES], each column TIMES times."""
    N: tl.constexpr = tile.shape[0]
    G: tl.constexpr = tile.shape[1]
    return tl.reshape(tl.broadcast_to(tile[:, :, None], (N, G, TIMES)), (N, G * TIMES))


@triton.jit
def int4_values(codes, scale, dtype: tl.constexpr, PACKED: tl.constexpr):
    """(low, high) weights of bytes [N, B], scale bf16 [N, B / 16]; PACKED: times 2^-24."""
    if PACKED:
        low, high = tl.inline_asm_elementwise(
            INT4_CODES, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )  # fmt: skip
        offset = repeat_columns((scale * INT4_OFFSET).to(tl.bfloat16), 16)
        low = tl.fma(low, repeat_columns((scale * INT4_LOW).to(tl.bfloat16), 16), offset)
        high = tl.fma(high, repeat_columns((scale * INT4_HIGH).to(tl.bfloat16), 16), offset)
    else:
        wide = repeat_columns(scale.to(tl.float32), 16)
        low = (((codes & 15).to(tl.float32) - 8.0) * wide).to(dtype)
        high = (((codes >> 4).to(tl.float32) - 8.0) * wide).to(dtype)
    return low, high


@triton.jit
def _int4_times_columns(
    codes_ptr, scales_ptr, code_rows, scale_rows, x_rows, t_mask, K, first, last,
    PACKED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`weights_times_columns` of int4_g32."""
    dtype: tl.constexpr = x_rows.dtype.element_ty
    acc = tl.zeros((code_rows.shape[0], t_mask.shape[0]), tl.float32)
    byte = tl.arange(0, BLOCK_K // 2)
    group = tl.arange(0, BLOCK_K // 32)
    low_k = byte // 16 * 32 + byte % 16
    for block in range(first, last):
        k = block * BLOCK_K + low_k
        codes_at = codes_ptr + (code_rows[:, None] + (block * (BLOCK_K // 2) + byte)[None, :])
        scale_at = scales_ptr + (scale_rows[:, None] + (block * (BLOCK_K // 32) + group)[None, :])
        x_at = x_rows[None, :] + k[:, None]
        if EVEN_K:
            codes = tl.load(codes_at)
            scale = tl.load(scale_at)
            x_low = tl.load(x_at, mask=t_mask[None, :], other=0.0)
            x_high = tl.load(x_at + 16, mask=t_mask[None, :], other=0.0)
        else:
            inside = k < K
            codes = tl.load(codes_at, mask=inside[None, :], other=0)
            groups = block * (BLOCK_K // 32) + group < K // 32
            scale = tl.load(scale_at, mask=groups[None, :], other=0.0)
            x_low = tl.load(x_at, mask=t_mask[None, :] & inside[:, None], other=0.0)
            x_high = tl.load(x_at + 16, mask=t_mask[None, :] & inside[:, None], other=0.0)
        low, high = int4_values(codes, scale, dtype, PACKED)
        acc = tl.dot(low, x_low, acc, input_precision="ieee")
        acc = tl.dot(high, x_high, acc, input_precision="ieee")
    if PACKED:
        acc *= INT4_RESULT
    return acc


@triton.jit
def weights_times_columns(
    codes_ptr,  # at input 0 of the matrix
    scales_ptr,
    code_rows,  # [N] int64: offsets of the rows in codes
    scale_rows,  # [N] int64: offsets of the rows in scales
    x_rows,  # [T] pointers to tokens
    t_mask,  # [T]: which of them exist
    K,
    first,  # blocks of BLOCK_K inputs, from and to
    last,
    FORMAT: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W x as fp32 [N, T], over the inputs of blocks first to last. int8 and fp8 need BLOCK_K = 128."""
    if FORMAT == "int4_g32":
        return _int4_times_columns(
            codes_ptr, scales_ptr, code_rows, scale_rows, x_rows, t_mask, K, first, last,
            PACKED, EVEN_K, BLOCK_K,
        )  # fmt: skip
    dtype: tl.constexpr = x_rows.dtype.element_ty
    acc = tl.zeros((code_rows.shape[0], t_mask.shape[0]), tl.float32)
    offsets = tl.arange(0, BLOCK_K)
    scaled: tl.constexpr = FORMAT == "fp8" or FORMAT == "int8"
    if scaled:
        scale = tl.load(scales_ptr + scale_rows + first)
    for block in range(first, last):
        k = block * BLOCK_K + offsets
        codes_at = codes_ptr + (code_rows[:, None] + k[None, :])
        x_at = x_rows[None, :] + k[:, None]
        if EVEN_K:
            codes = tl.load(codes_at)
            x = tl.load(x_at, mask=t_mask[None, :], other=0.0)
        else:
            codes = tl.load(codes_at, mask=(k < K)[None, :], other=0)
            x = tl.load(x_at, mask=t_mask[None, :] & (k < K)[:, None], other=0.0)
        if scaled:
            # The next block's, early: it does not go through the pipeline of what tl.dot takes.
            next_scale = tl.load(scales_ptr + scale_rows + tl.minimum(block + 1, last - 1))
            values = (
                fp8_values(codes, dtype, PACKED)
                if FORMAT == "fp8"
                else int8_values(codes, dtype, PACKED)
            )
            acc += tl.dot(values, x, input_precision="ieee") * scale[:, None]
            scale = next_scale
        else:
            acc = tl.dot(codes.to(dtype), x, acc, input_precision="ieee")
    if FORMAT == "int8" and PACKED:
        acc *= INT8_RESULT
    return acc
