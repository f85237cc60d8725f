"""Blocked flash attention of a ragged batch of MLA queries over expanded keys and values of one chunk of the context.

Online softmax over blocks of keys (FlashAttention-2, arXiv 2307.08691), in base 2 and fp32; MLA as in DeepSeek-V2
(arXiv 2405.04434). A query is [nope | rope]; the rope part of the keys is shared by all heads and is never copied per
head: it is a dot of its own. A nope width that is no power of two (192) is a dot of the largest one in it and another
of the rest, so that nothing is padded to 256.

One program takes BLOCK_M queries of one head. A context longer than a chunk takes one launch per chunk: a row's
normalised output with its log-sum-exp is a valid state of the online softmax (maximum lse, sum 1), so the next launch
goes on from it in place and no merging kernel is needed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import MAX_GRID_Y, Card, card_of, on_own_device

PIECE_COLUMNS = 8  # see `mla_prefill`
_HEAD_GROUP = 8
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Config:
    """Queries per program, keys per step, warps, depth of the pipeline of key and value tiles."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_rows(
    ptr, rows, stride, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """[len(rows), BLOCK] of rows of WIDTH adjacent values; zero beyond a row and beyond the rows."""
    cols = tl.arange(0, BLOCK)
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    if MASK_ROWS and BLOCK != WIDTH:
        return tl.load(ptrs, mask=(rows[:, None] < num_rows) & (cols[None, :] < WIDTH), other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None] < num_rows, other=0.0)
    elif BLOCK != WIDTH:
        return tl.load(ptrs, mask=cols[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store_rows(ptr, values, rows, stride, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    mask = (rows[:, None] < num_rows) & (cols[None, :] < WIDTH)
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend_block(
    acc_low, acc_high, total, largest, q_low, q_high, q_pe,
    k_ptr, pe_ptr, v_ptr, stride_kt, stride_pt, stride_vt,
    first_key, start, num_keys, last_visible, scale,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    N_LOW: tl.constexpr, N_HIGH: tl.constexpr, BLOCK_R: tl.constexpr,
    V_LOW: tl.constexpr, V_HIGH: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys start .. start + BLOCK_N. scale includes log2(e)."""
    first_key += start  # i64, as its products with the strides
    k_ptr += first_key * stride_kt
    keys = tl.arange(0, BLOCK_N)
    left = num_keys - start
    k = _load_rows(k_ptr, keys, stride_kt, left, min(N_LOW, NOPE), N_LOW, MASK)
    scores = tl.dot(q_low, tl.trans(k), input_precision=PRECISION)
    if N_HIGH > 0:
        k = _load_rows(k_ptr + N_LOW, keys, stride_kt, left, NOPE - N_LOW, N_HIGH, MASK)
        scores = tl.dot(q_high, tl.trans(k), scores, input_precision=PRECISION)
    k = _load_rows(pe_ptr + first_key * stride_pt, keys, stride_pt, left, ROPE, BLOCK_R, MASK)
    scores = tl.dot(q_pe, tl.trans(k), scores, input_precision=PRECISION)
    if MASK:
        visible = last_visible - start
        scores = tl.where(
            (keys[None, :] <= visible[:, None]) & (keys[None, :] < left), scores, float("-inf")
        )
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    shift = new_largest
    if MASK:  # a row that has seen no key yet
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    p = tl.exp2(scores * scale - shift[:, None])
    shrink = tl.exp2(largest - shift)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(v_ptr.dtype.element_ty)
    v_ptr += first_key * stride_vt
    v = _load_rows(v_ptr, keys, stride_vt, left, min(V_LOW, VALUE), V_LOW, MASK)
    acc_low = tl.dot(p, v, acc_low * shrink[:, None], input_precision=PRECISION)
    if V_HIGH > 0:
        v = _load_rows(v_ptr + V_LOW, keys, stride_vt, left, VALUE - V_LOW, V_HIGH, MASK)
        acc_high = tl.dot(p, v, acc_high * shrink[:, None], input_precision=PRECISION)
    return acc_low, acc_high, total, new_largest


@triton.jit(do_not_specialize=["num_blocks"])
def _mla_prefill_kernel(
    q_ptr, k_ptr, pe_ptr, v_ptr, pieces_ptr, out_ptr, state_ptr, lse_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_pt, stride_vt, stride_vh,
    stride_ot, stride_oh, stride_st, stride_sh, stride_lt,
    num_heads, num_blocks, scale,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    N_LOW: tl.constexpr, N_HIGH: tl.constexpr, BLOCK_R: tl.constexpr,
    V_LOW: tl.constexpr, V_HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_N: tl.constexpr, HEAD_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share a few heads, whose keys they read from L2 in step; among these the
    # longest (last) queries come first, which leaves the short ones to fill the end.
    program = tl.program_id(0)
    first_head = program // (HEAD_GROUP * num_blocks) * HEAD_GROUP
    group = min(num_heads - first_head, HEAD_GROUP)
    within = program - first_head * num_blocks
    head = (first_head + within % group).to(tl.int64)
    first_row = (num_blocks - 1 - within // group) * BLOCK_M

    piece_ptr = pieces_ptr + tl.program_id(1) * 8  # columns: see `mla_prefill`
    first_token = tl.load(piece_ptr + 1)
    query_len = tl.load(piece_ptr + 2)
    first_key = tl.load(piece_ptr + 3).to(tl.int64)
    num_keys = tl.load(piece_ptr + 4)
    diagonal = tl.load(piece_ptr + 6)
    flags = tl.load(piece_ptr + 7)
    if first_row >= query_len:
        return
    # Keys that the last query sees, and those that all see.
    end = max(min(diagonal + min(first_row + BLOCK_M, query_len), num_keys), 0)
    unmasked = max(min(diagonal + first_row + 1, num_keys), 0) // BLOCK_N * BLOCK_N
    if (flags == 3) & (end == 0):
        return  # the state stays as it is

    rows = tl.arange(0, BLOCK_M)
    num_rows = query_len - first_row
    token = (first_token + first_row).to(tl.int64)
    q_ptr += token * stride_qt + head * stride_qh
    q_low = _load_rows(q_ptr, rows, stride_qt, num_rows, min(N_LOW, NOPE), N_LOW, True)
    q_high = q_low
    if N_HIGH > 0:
        q_high = _load_rows(q_ptr + N_LOW, rows, stride_qt, num_rows, NOPE - N_LOW, N_HIGH, True)
    q_pe = _load_rows(q_ptr + NOPE, rows, stride_qt, num_rows, ROPE, BLOCK_R, True)

    lse_ptrs = lse_ptr + (token + rows) * stride_lt + head
    state_ptr += token * stride_st + head * stride_sh
    read = tl.where(flags % 2 == 1, num_rows, 0)
    acc_low = _load_rows(state_ptr, rows, stride_st, read, min(V_LOW, VALUE), V_LOW, True)
    acc_high = tl.zeros([BLOCK_M], dtype=tl.float32)  # not used
    if V_HIGH > 0:
        acc_high = _load_rows(state_ptr + V_LOW, rows, stride_st, read, VALUE - V_LOW, V_HIGH, True)
    lse = tl.load(lse_ptrs, mask=rows < read, other=float("-inf"))
    largest = lse * 1.4426950408889634
    total = tl.where(lse == float("-inf"), 0.0, 1.0)

    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    last_visible = diagonal + first_row + rows
    for start in tl.range(0, unmasked, BLOCK_N):
        acc_low, acc_high, total, largest = _attend_block(
            acc_low, acc_high, total, largest, q_low, q_high, q_pe,
            k_ptr, pe_ptr, v_ptr, stride_kt, stride_pt, stride_vt,
            first_key, start, num_keys, last_visible, scale,
            NOPE, ROPE, VALUE, N_LOW, N_HIGH, BLOCK_R, V_LOW, V_HIGH, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(unmasked, end, MASKED_N):
        acc_low, acc_high, total, largest = _attend_block(
            acc_low, acc_high, total, largest, q_low, q_high, q_pe,
            k_ptr, pe_ptr, v_ptr, stride_kt, stride_pt, stride_vt,
            first_key, start, num_keys, last_visible, scale,
            NOPE, ROPE, VALUE, N_LOW, N_HIGH, BLOCK_R, V_LOW, V_HIGH, MASKED_N, True, PRECISION,
        )  # fmt: skip

    seen = total != 0
    inverse = 1.0 / tl.where(seen, total, 1.0)
    acc_low *= inverse[:, None]
    if V_HIGH > 0:
        acc_high *= inverse[:, None]
    lse = tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(lse_ptrs, lse * 0.6931471805599453, mask=rows < num_rows)
    kept = tl.where(flags >= 2, num_rows, 0)
    written = num_rows - kept
    _store_rows(state_ptr, acc_low, rows, stride_st, kept, VALUE, V_LOW)
    if V_HIGH > 0:
        _store_rows(state_ptr + V_LOW, acc_high, rows, stride_st, kept, VALUE - V_LOW, V_HIGH)
    out_ptr += token * stride_ot + head * stride_oh
    _store_rows(out_ptr, acc_low, rows, stride_ot, written, VALUE, V_LOW)
    if V_HIGH > 0:
        _store_rows(out_ptr + V_LOW, acc_high, rows, stride_ot, written, VALUE - V_LOW, V_HIGH)


@on_own_device
def mla_prefill(
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    pieces: Tensor,
    out: Tensor,
    *,
    scale: float,
    max_query_len: int,
    state: Tensor | None = None,
    lse: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Attends the queries of P pieces to the keys of one chunk and writes out, or the state where a chunk follows.

    T query tokens, K keys in the chunk, H heads, N nope, R rope, V value dims; the last dimension of all is adjacent.
      q [T, H, N + R], k_nope [K, H, N], k_pe [K, R], v [K, H, V] of one dtype: bf16, fp16 or fp32
      pieces [P, 8] i32 on the device, P <= 65535, one row per request that has keys in the chunk:
        0 the request (not used here)  1 its first query token in q  2 its query tokens  3 its first key in the chunk
        4 its keys in the chunk  5 the position of the first of them (not used here)
        6 d: its query i sees the keys of the piece up to and including d + i; may be negative or beyond the piece
        7 flags: 1 an earlier chunk left a state, 2 a later one goes on from it
      out [T, H, V] · scale of the scores, > 0 · max_query_len >= all of column 2
      state [T, H, V] fp32 (may be `out`) and lse [T, H] fp32 (natural logarithm), both needed where a flag is set;
      lse alone is an output. A query that sees no key has output 0 and lse -inf.
    """
    heads, nope, value = k_nope.shape[1], k_nope.shape[2], v.shape[2]
    rope = k_pe.shape[1]
    assert q.shape[1:] == (heads, nope + rope), f"{q.shape=} {k_nope.shape=} {k_pe.shape=}"
    assert v.shape[:2] == k_nope.shape[:2], f"{v.shape=} {k_nope.shape=}"
    assert out.shape == (q.shape[0], heads, value), f"{out.shape=} {q.shape=} {v.shape=}"
    assert pieces.dtype == torch.int32, f"{pieces.dtype=}"
    assert pieces.shape[1:] == (PIECE_COLUMNS,), f"{pieces.shape=}"
    assert pieces.is_contiguous(), f"{pieces.stride()=}"
    assert pieces.shape[0] <= MAX_GRID_Y, f"{pieces.shape=}"
    assert q.dtype == k_nope.dtype == k_pe.dtype == v.dtype, f"{q.dtype=} {k_nope.dtype=}"
    assert state is None or (state.shape == out.shape and lse is not None), "a state needs its lse"
    assert scale > 0, f"{scale=}"
    for tensor in (q, k_nope, k_pe, v, out, state, lse):
        assert tensor is None or tensor.stride(-1) == 1, f"{tensor.shape=} {tensor.stride()=}"
    if max_query_len == 0 or pieces.shape[0] == 0 or heads == 0:
        return
    n_low, n_high = _blocks(nope)
    v_low, v_high = _blocks(value)
    block_r = _block(rope)
    if config is None:
        config = _config(
            card_of(q.device), q.element_size(), n_low + n_high + block_r, v_low + v_high
        )
    num_blocks = triton.cdiv(max_query_len, config.block_m)
    if lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    state_strides = (out if state is None else state).stride()
    if state is None:
        state = lse  # only an address, no flag asks for it
    _mla_prefill_kernel[(num_blocks * heads, pieces.shape[0])](
        q, k_nope, k_pe, v, pieces, out, state, lse,
        q.stride(0), q.stride(1), k_nope.stride(0), k_nope.stride(1), k_pe.stride(0),
        v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        state_strides[0], state_strides[1], lse.stride(0),
        heads, num_blocks, scale * _LOG2_E,
        NOPE=nope, ROPE=rope, VALUE=value, N_LOW=n_low, N_HIGH=n_high, BLOCK_R=block_r,
        V_LOW=v_low, V_HIGH=v_high,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        MASKED_N=min(64, config.block_n), HEAD_GROUP=_HEAD_GROUP,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _block(width: int) -> int:
    """The block that holds a row: a power of two, of at least the 16 that a dot takes."""
    return max(16, triton.next_power_of_2(width))


def _blocks(width: int) -> tuple[int, int]:
    """One block or two that hold a row: 128 -> (128, 0), 192 -> (128, 64), 256 -> (128, 128).

    Two where that pads less. And 256 values are two blocks because Triton gives every warp of a dot rows of its own,
    which attention needs, only where the result is no wider than it is high.
    """
    whole = _block(width)
    half = whole // 2
    if half >= 16 and (whole == 256 or half + _block(width - half) < whole):
        return half, _block(width - half)
    return whole, 0


def _config(card: Card, element_size: int, width: int, value: int) -> Config:
    """Tiles for queries and keys of `width` padded values and values of `value`.

    128 queries by 8 warps: 128 operations per byte of keys and values read from L2, of which a card needs roughly 30
    (RTX) to 180 (H100) at the peak of its tensor cores; 256 queries would not fit the registers, where each warp keeps
    16 rows of accumulators, 64 to 128 registers of them. The wider the block of keys, the fewer barriers and, on
    Hopper, readings of q from shared memory. Queries stay in shared memory beside the tiles in flight: `num_stages`
    of them with asynchronous products (Hopper, Blackwell), else one less, because mma.sync has read a tile before the
    copy of the next one starts.
    """
    if element_size == 4:  # no tensor cores in full precision; for tests and tiny models
        return Config(32, 32, 8, 1)
    asynchronous = 90 <= card.capability < 120
    if asynchronous:
        steps = [(128, 2), (64, 3), (64, 2), (32, 2)]
    else:  # beside 128 registers of accumulators there is no room for the scores of 64 keys
        steps = [(64, 3), (64, 2), (32, 3), (32, 2)] if value <= 128 else [(32, 3), (32, 2)]
    for block_m in (128, 64):
        for block_n, num_stages in steps:
            tiles = (num_stages - (not asynchronous)) * block_n * (width + value)
            if (block_m * width + tiles) * element_size <= card.shared_memory:
                return Config(block_m, block_n, block_m // 16, num_stages)
    return Config(32, 16, 4, 1)
