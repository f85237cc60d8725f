"""Products with quantised weights, y = W x per token: decode bound by bandwidth, prefill by the tensor cores.

Three ways, by the number of tokens T:

  up to 32    one column of programs; each streams 64 rows of W and, where those are too few programs to keep enough
              bytes in flight, part of the inputs. Partial sums are added in order by a second kernel.
  more        tiles of outputs x tokens, W dequantised in the tile (`weight_tiles`)
  many        W is dequantised slab by slab into bf16 or fp16, which stays in the L2 cache, and torch multiplies
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import Card, card_of, on_own_device
from moejet.kernels.weight_tiles import (
    INT4_RESULT,
    INT8_RESULT,
    fp8_values,
    int4_values,
    int8_values,
    weights_times_columns,
)
from moejet.weights.gpu_weights import GpuWeights

_PLAIN = ("bf16", "fp16")
_SLAB_BYTES = 24 << 20  # half of the L2 cache of an RTX 4090 or H100


@dataclass(frozen=True)
class LinearConfig:
    """How one product is launched. splits: programs that share the inputs of an output."""

    block_n: int
    block_t: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["T", "blocks_per_split"])
def _linear_kernel(
    x_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr,
    T, N, K, stride_xt, stride_xh, stride_ch, stride_cn, stride_sh, stride_sn, blocks_per_split,
    FORMAT: tl.constexpr, PACKED: tl.constexpr, EVEN_K: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Eight blocks of outputs go through the tokens together: concurrent programs share W and x in the L2 cache.
    blocks_n, blocks_t = tl.cdiv(N, BLOCK_N), tl.cdiv(T, BLOCK_T)
    pid, head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = pid // (8 * blocks_t)
    width = tl.minimum(blocks_n - group * 8, 8)
    inside = pid % (8 * blocks_t)
    n = (group * 8 + inside % width) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = inside // width * BLOCK_T + tl.arange(0, BLOCK_T)

    row = tl.minimum(n, N - 1).to(tl.int64)  # rows beyond the last are computed and dropped
    scale_row = row // 128 if FORMAT == "fp8" else row
    first = split * blocks_per_split
    acc = weights_times_columns(
        codes_ptr + head * stride_ch, scales_ptr + head * stride_sh,
        row * stride_cn, scale_row * stride_sn,
        x_ptr + head * stride_xh + t.to(tl.int64) * stride_xt, t < T,
        K, first, tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K)),
        FORMAT, PACKED, EVEN_K, BLOCK_K,
    )  # fmt: skip

    heads = tl.num_programs(1)
    at = (t.to(tl.int64) * heads + head) * N
    if PARTIAL:
        at += split.to(tl.int64) * T * heads * N
    elif bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (t < T)[None, :]
    tl.store(out_ptr + at[None, :] + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(
    partial_ptr, bias_ptr, out_ptr, count, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial_ptr + split * count.to(tl.int64) + at, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "rows"])
def _dequantize_kernel(
    codes_ptr, scales_ptr, out_ptr, first_row, rows, K, stride_cn, stride_sn,
    FORMAT: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    row = (first_row + tl.minimum(n, rows - 1)).to(tl.int64)
    out_row = out_ptr + n.to(tl.int64)[:, None] * K
    if FORMAT == "int4_g32":
        byte, group = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 32)
        k = block * BLOCK_K + byte // 16 * 32 + byte % 16
        groups = block * (BLOCK_K // 32) + group
        mask = (n < rows)[:, None] & (k < K)[None, :]
        codes = tl.load(
            codes_ptr + row[:, None] * stride_cn + (block * (BLOCK_K // 2) + byte)[None, :],
            mask=mask, other=0,
        )  # fmt: skip
        scale = tl.load(
            scales_ptr + row[:, None] * stride_sn + groups[None, :],
            mask=(groups < K // 32)[None, :], other=0.0,
        )  # fmt: skip
        low, high = int4_values(codes, scale, dtype, PACKED)
        if PACKED:
            low, high = low * INT4_RESULT, high * INT4_RESULT
        tl.store(out_row + k[None, :], low.to(dtype), mask=mask)
        tl.store(out_row + k[None, :] + 16, high.to(dtype), mask=mask)
    else:
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (n < rows)[:, None] & (k < K)[None, :]
        codes = tl.load(codes_ptr + row[:, None] * stride_cn + k[None, :], mask=mask, other=0)
        scale_row = row // 128 if FORMAT == "fp8" else row
        scale = tl.load(scales_ptr + scale_row * stride_sn + block)[:, None]
        if FORMAT == "fp8":
            values = fp8_values(codes, dtype, PACKED).to(tl.float32) * scale
        else:
            values = int8_values(codes, dtype, PACKED).to(tl.float32) * scale
            if PACKED:
                values *= INT8_RESULT
        tl.store(out_row + k[None, :], values.to(dtype), mask=mask)


@on_own_device
def linear(
    x: Tensor, weights: GpuWeights, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """x [T, K] times weights (N, K) to [T, N], or x [T, H, K] times (H, N, K) to [T, H, N].

    x bf16, fp16 or fp32 with adjacent inputs, tokens and heads may lie apart; bias [N], without heads only. bf16 and
    fp16 weights take x of their own dtype, whose results are rounded to it before out_dtype, or fp32, for which the
    whole matrix is converted: for checks.
    """
    heads = weights.shape[0] if len(weights.shape) == 3 else 1
    rows, cols = weights.shape[-2:]
    expected = (x.shape[0], heads, cols) if len(weights.shape) == 3 else (x.shape[0], cols)
    assert tuple(x.shape) == expected, f"{x.shape=} {weights.shape=}"
    assert x.stride(-1) == 1 or cols == 1, f"{x.stride()=}"
    assert bias is None or (len(weights.shape) == 2 and tuple(bias.shape) == (rows,))
    tokens = x.shape[0]
    if weights.format in _PLAIN:
        return _plain(x, weights.codes, bias, out_dtype)
    out = torch.empty(*x.shape[:-1], rows, dtype=out_dtype, device=x.device)
    if tokens == 0:
        return out
    card = card_of(x.device)
    many = 512 if card.capability in (90, 100) else 1024
    if heads == 1 and tokens >= many and x.dtype != torch.float32 and x.device.type != "cpu":
        return _by_slabs(x.reshape(tokens, cols), weights, bias, out)

    config = _config(tokens, rows, cols, heads, weights.format, x.element_size(), card)
    blocks_k = triton.cdiv(cols, config.block_k)
    partial = config.splits > 1
    result = out
    if partial:
        result = torch.empty(
            config.splits, tokens, heads, rows, dtype=torch.float32, device=x.device
        )
    codes, scales = weights.codes, weights.scales
    assert scales is not None
    batched = x.dim() == 3
    grid = (
        triton.cdiv(rows, config.block_n) * triton.cdiv(tokens, config.block_t),
        heads,
        config.splits,
    )
    _linear_kernel[grid](
        x, codes, scales, None if partial else bias, result,
        tokens, rows, cols, x.stride(0), x.stride(1) if batched else 0,
        codes.stride(0) if batched else 0, codes.stride(-2),
        scales.stride(0) if batched else 0, scales.stride(-2),
        triton.cdiv(blocks_k, config.splits),
        FORMAT=weights.format, PACKED=is_packed(x), EVEN_K=cols % config.block_k == 0,
        PARTIAL=partial, BLOCK_N=config.block_n, BLOCK_T=config.block_t, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if partial:
        count = out.numel()
        _sum_kernel[(triton.cdiv(count, 1024),)](
            result, bias, out, count, rows, SPLITS=config.splits, BLOCK=1024, num_warps=4
        )
    return out


def is_packed(x: Tensor) -> bool:
    """Whether weights are made bf16 by PTX: not for other activations, nor under the interpreter."""
    return x.dtype == torch.bfloat16 and x.device.type != "cpu"


def _plain(x: Tensor, w: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if x.dtype == torch.float32:
        w = w.float()  # a copy for each product: a check in full precision, not a way to serve
    if w.dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype} and the weights are {w.dtype}: torch would copy the whole matrix for every product; "
            "cast x or choose the weights' format after it"
        )
    if x.dim() == 2:
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, w, bias).to(out_dtype)
    return torch.einsum("thk,hnk->thn", x, w).to(out_dtype)


def _by_slabs(x: Tensor, weights: GpuWeights, bias: Tensor | None, out: Tensor) -> Tensor:
    rows, cols = weights.shape[-2:]
    step = max(256, _SLAB_BYTES // (2 * cols) // 256 * 256)
    slab = torch.empty(min(step, rows), cols, dtype=x.dtype, device=x.device)
    codes = weights.codes.view(rows, -1)
    assert weights.scales is not None
    scales = weights.scales.view(-1, weights.scales.shape[-1])
    flat = out.view(-1, rows)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        _dequantize_kernel[(triton.cdiv(count, 32), triton.cdiv(cols, 128))](
            codes, scales, slab, first, count, cols, codes.stride(0), scales.stride(0),
            FORMAT=weights.format, PACKED=is_packed(x), BLOCK_N=32, BLOCK_K=128, num_warps=4,
        )  # fmt: skip
        part = slice(first, first + count)
        flat[:, part] = torch.nn.functional.linear(
            x, slab[:count], None if bias is None else bias[part].to(x.dtype)
        )
    return out


def _config(
    tokens: int, rows: int, cols: int, heads: int, format: str, x_bytes: int, card: Card
) -> LinearConfig:
    """Blocks, pipeline and splits of one product.

    Decode: two warps, 32 rows each, because each dequantised tile meets few tokens and every warp reads all of x. On
    Hopper two warps also keep to mma.sync, whose operand stays in registers whatever its layout. About four programs
    per multiprocessor keep 32 KB and more in flight; a split has at least six blocks, or filling its pipeline costs
    more than it gains.

    Prefill: a weight is dequantised once per 64 tokens, which mma.sync needs 8 to 16 cycles for; wgmma and tcgen05 are
    faster and take 128. Eight warps keep sums and dequantised weights in registers.
    """
    big = card.shared_memory > 100 << 10
    if tokens > 32 and x_bytes == 2:
        if card.capability in (90, 100):
            return LinearConfig(128, 64 if tokens <= 64 else 128, 128, 1, 8, 3)
        return LinearConfig(128, 64, 128, 1, 8, 3 if big else 2)
    block_n, block_t = 64, 8 if tokens <= 8 else 16 if tokens <= 16 else 32
    if x_bytes == 4:  # multiplied one by one: small tiles spare registers
        block_n, block_t = 16, min(block_t, 16)
    programs = triton.cdiv(rows, block_n) * heads
    most = max(1, triton.cdiv(cols, 128) // 6)
    splits = min(most, 16, max(1, 4 * card.num_sms // programs))
    # No split may be empty.
    blocks = triton.cdiv(cols, 128)
    splits = triton.cdiv(blocks, triton.cdiv(blocks, splits))
    stages = (6 if big else 4) if format == "int4_g32" else (5 if big else 3)
    return LinearConfig(block_n, block_t, 128, splits, 2, 3 if x_bytes == 4 else stages)
