"""Multi-head latent attention of few queries over the paged latent cache, in latent space (arXiv 2405.04434, 2.1).

All heads share a sequence's latent rows, so (query token, head) pairs are the rows of a matrix product against the
keys [c_kv | k_pe]; the values are the first C columns of the keys and are taken from the same tile in shared memory.
The context is cut into splits which programs work on independently (flash decoding: arXiv 2205.14135 and
https://crfm.stanford.edu/2023/10/12/flashdecoding.html), and a second kernel merges their partial results by their
log-sum-exps. Sums of logarithms are in base 2 throughout.

A job is one sequence or one group of sequences that share a prefix. Programs are numbered job by job, within a job
split by split, within a split by blocks of rows: those which read the same keys run side by side, and all but the
first find them in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import card_of, on_own_device
from moejet.kernels.mla_decode_plan import LEAST_TILES, Tiles, choose_splits, choose_tiles
from moejet.latent_layout import scales_begin, scales_end
from moejet.prefix_groups import PrefixGroups

_LOG2_E = 1.4426950408889634
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _shared_tokens(shared_ptr, group, ALIGN: tl.constexpr):
    """Tokens of a group's prefix that its group job covers; the members' own jobs begin there."""
    return tl.load(shared_ptr + group) // ALIGN * ALIGN


@triton.jit
def _split_tokens(tokens, splits, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr):
    """Keys per split: SPLIT where that is fixed, else so that `splits` of them cover the job's keys."""
    if SPLIT > 0:
        return tokens * 0 + SPLIT
    return tl.maximum(tl.cdiv(tl.cdiv(tokens, splits), BLOCK_N) * BLOCK_N, LEAST)


@triton.jit
def _load_blocks(table_ptr, position, end, S: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of the keys from `position` on: one where the whole tile lies in it, else one per key."""
    if S % BLOCK_N == 0:
        return tl.load(table_ptr + tl.maximum(tl.minimum(position, end - 1), 0) // S)
    else:
        keys = tl.minimum(position + tl.arange(0, BLOCK_N), end - 1)
        return tl.load(table_ptr + tl.maximum(keys, 0) // S)


@triton.jit
def _load_rows(
    kv_ptr, pe_ptr, scale_ptr, block, position, end, block_units,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
    ROW_UNITS: tl.constexpr, UNIT: tl.constexpr, PE_UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cache rows from `position` on, zero past the end: latents [BLOCK_N, C] (FP8: words of four codes), rope parts
    [BLOCK_N, R], and scales [BLOCK_N, groups] if FP8.

    Offsets are counted in units of 16 bytes, so that their alignment shows. Where a tile lies in one block, those
    between its rows are constants: one address for each row would take most of the registers.
    """
    lane = tl.arange(0, BLOCK_N)
    live = (lane < end - position)[:, None]
    if S % BLOCK_N == 0:
        base = block.to(tl.int64) * block_units + position % S * ROW_UNITS
        row = (lane * ROW_UNITS)[:, None]
    else:
        base = block.to(tl.int64)[:, None] * block_units
        row = ((position + lane) % S * ROW_UNITS)[:, None]
    cols = tl.arange(0, C // 4 if FP8 else C)[None, :]
    latents = tl.load(kv_ptr + base * UNIT + (row * UNIT + cols), mask=live, other=0)
    cols = tl.arange(0, R)[None, :]
    pe = tl.load(pe_ptr + base * PE_UNIT + (row * PE_UNIT + cols), mask=live, other=0.0)
    scales = pe
    if FP8:
        cols = tl.arange(0, (C + 127) // 128)[None, :]
        scales = tl.load(scale_ptr + base * 4 + (row * 4 + cols), mask=live, other=0.0)
    return latents, pe, scales


@triton.jit
def _decode(words, scales, BYTE: tl.constexpr, DOT: tl.constexpr):
    """Columns BYTE, BYTE + 4, ... of the latents in DOT, from words [N, C / 4] of four codes and scales [N, groups].

    Exponent and mantissa moved to fp32's places are the e4m3 value times 2^-120, for subnormal codes too.
    """
    bits = words >> (8 * BYTE)
    bits = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
    values = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    N: tl.constexpr = words.shape[0]
    WIDTH: tl.constexpr = words.shape[1]
    GROUPS: tl.constexpr = scales.shape[1]
    values = tl.reshape(values, [N, GROUPS, WIDTH // GROUPS]) * scales[:, :, None]
    return tl.reshape(values.to(DOT), [N, WIDTH])


@triton.jit(
    do_not_specialize=["splits", "group_splits", "group_row_blocks", "group_programs", "slots", "stride_table"]
)  # fmt: skip
def _mla_decode_kernel(
    q_ptr, q_pe_ptr, kv_ptr, pe_ptr, scale_ptr, tables_ptr, lens_ptr, out_ptr, lse_ptr,
    group_of_ptr, starts_ptr, members_ptr, shared_ptr,
    stride_qt, stride_qh, stride_pt, stride_ph, block_units, stride_table, stride_ot, stride_oh,
    splits, group_splits, group_row_blocks, group_programs, slots, scale_log2,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    ROW_UNITS: tl.constexpr, UNIT: tl.constexpr, PE_UNIT: tl.constexpr, FP8: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, GROUPED: tl.constexpr, DIRECT: tl.constexpr,
    SPLIT: tl.constexpr, LEAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = QUERIES * HEADS
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    if GROUPED:
        of_group = program < group_programs
    else:
        of_group: tl.constexpr = False

    # The job: its keys [begin, job_end) in the block table of `table_seq`, its rows, and the first of its slots.
    if of_group:
        row_block = program % group_row_blocks
        split = program // group_row_blocks % group_splits
        group = program // group_row_blocks // group_splits
        first = tl.load(starts_ptr + group)
        rows = (tl.load(starts_ptr + group + 1) - first) * ROWS
        member_rows = rows
        table_seq = tl.load(members_ptr + first, mask=rows > 0, other=0)
        begin = program * 0
        job_end = _shared_tokens(shared_ptr, group, ALIGN)
        slot = split
        per_split = _split_tokens(job_end, group_splits, SPLIT, BLOCK_N, LEAST)
    else:
        own = program - group_programs
        row_block = own % ROW_BLOCKS
        split = own // ROW_BLOCKS % splits
        table_seq = own // ROW_BLOCKS // splits
        first = table_seq * 0
        rows = table_seq * 0 + ROWS
        member_rows = first
        begin = table_seq * 0
        slot = split
        job_end = tl.load(lens_ptr + table_seq)
        if GROUPED:
            group = tl.load(group_of_ptr + table_seq)
            if group >= 0:
                begin = _shared_tokens(shared_ptr, group, ALIGN)
                slot += tl.cdiv(begin, _split_tokens(begin, group_splits, SPLIT, BLOCK_N, LEAST))
        per_split = _split_tokens(job_end - begin, splits, SPLIT, BLOCK_N, LEAST)
    begin += split * per_split
    end = tl.minimum(begin + per_split, job_end)
    if not DIRECT:  # noqa: SIM102 (one is decided when compiling)
        # The merging kernel does not look at this slot. Beyond the last one: a context longer than max_context.
        if (begin >= end) | (row_block * BLOCK_M >= rows) | (slot >= slots):
            return

    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    if GROUPED:
        seq = tl.load(members_ptr + first + row // ROWS, mask=row < member_rows, other=table_seq)
    else:
        seq = row * 0 + table_seq
    query = row % ROWS // HEADS
    head = row % HEADS
    token = (seq * QUERIES + query).to(tl.int64)
    # The keys that a row sees; of those which stand for nothing, none.
    visible = tl.load(lens_ptr + seq, mask=live, other=0) - QUERIES + query + 1
    limit = tl.minimum(visible, end)

    q_ptrs = q_ptr + (token * stride_qt + head * stride_qh)[:, None]
    if FP8:
        # Four columns come in one word. Tiles of every fourth column, queries and results alike, leave them in place.
        cols = tl.arange(0, C // 4)[None, :] * 4
        q = tl.load(q_ptrs + cols, mask=live[:, None], other=0.0).to(DOT)
        q1 = tl.load(q_ptrs + cols + 1, mask=live[:, None], other=0.0).to(DOT)
        q2 = tl.load(q_ptrs + cols + 2, mask=live[:, None], other=0.0).to(DOT)
        q3 = tl.load(q_ptrs + cols + 3, mask=live[:, None], other=0.0).to(DOT)
    else:
        cols = tl.arange(0, C)[None, :]
        q = tl.load(q_ptrs + cols, mask=live[:, None], other=0.0).to(DOT)
    pe_cols = tl.arange(0, R)[None, :]
    q_pe_ptrs = q_pe_ptr + (token * stride_pt + head * stride_ph)[:, None] + pe_cols
    q_pe = tl.load(q_pe_ptrs, mask=live[:, None], other=0.0).to(DOT)
    table_ptr = tables_ptr + table_seq.to(tl.int64) * stride_table

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if FP8:
        acc = tl.zeros([BLOCK_M, C // 4], tl.float32)
        acc1, acc2, acc3 = acc, acc, acc
    else:
        acc = tl.zeros([BLOCK_M, C], tl.float32)
    # A tile's blocks are looked up one tile ahead: looked up in the same iteration, Triton's pipeliner counts them as
    # a stage of their own, and the keys would no longer be fetched under the computation before.
    block = _load_blocks(table_ptr, begin, end, S, BLOCK_N)
    if FP8:
        # Bytes go through registers anyway. There they wait, as shared memory holds what they become.
        words, next_pe, scales = _load_rows(
            kv_ptr, pe_ptr, scale_ptr, block, begin, end, block_units,
            C, R, S, FP8, ROW_UNITS, UNIT, PE_UNIT, BLOCK_N,
        )  # fmt: skip
        block = _load_blocks(table_ptr, begin + BLOCK_N, end, S, BLOCK_N)
    for position in tl.range(begin, end, BLOCK_N):
        if FP8:
            latents, latents1 = _decode(words, scales, 0, DOT), _decode(words, scales, 1, DOT)
            latents2, latents3 = _decode(words, scales, 2, DOT), _decode(words, scales, 3, DOT)
            pe = next_pe.to(DOT)
            words, next_pe, scales = _load_rows(
                kv_ptr, pe_ptr, scale_ptr, block, position + BLOCK_N, end, block_units,
                C, R, S, FP8, ROW_UNITS, UNIT, PE_UNIT, BLOCK_N,
            )  # fmt: skip
            block = _load_blocks(table_ptr, position + 2 * BLOCK_N, end, S, BLOCK_N)
        else:
            latents, pe, _ = _load_rows(
                kv_ptr, pe_ptr, scale_ptr, block, position, end, block_units,
                C, R, S, FP8, ROW_UNITS, UNIT, PE_UNIT, BLOCK_N,
            )  # fmt: skip
            block = _load_blocks(table_ptr, position + BLOCK_N, end, S, BLOCK_N)
        scores = tl.dot(q, tl.trans(latents), input_precision=PRECISION)
        if FP8:
            scores = tl.dot(q1, tl.trans(latents1), scores)
            scores = tl.dot(q2, tl.trans(latents2), scores)
            scores = tl.dot(q3, tl.trans(latents3), scores)
        scores = tl.dot(q_pe, tl.trans(pe), scores, input_precision=PRECISION)
        keys = (position + tl.arange(0, BLOCK_N))[None, :]
        scores = tl.where(keys < limit[:, None], scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far
        probs = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(probs, 1)
        probs = probs.to(DOT)
        decay = decay[:, None]
        acc = tl.dot(probs, latents, acc * decay, input_precision=PRECISION)
        if FP8:
            acc1 = tl.dot(probs, latents1, acc1 * decay)
            acc2 = tl.dot(probs, latents2, acc2 * decay)
            acc3 = tl.dot(probs, latents3, acc3 * decay)
        top = new_top

    seen = total > 0
    factor = (1.0 / tl.where(seen, total, 1.0))[:, None]
    if DIRECT:
        out_ptrs = out_ptr + (token * stride_ot + head * stride_oh)[:, None] + cols
    else:
        place = (token * HEADS + head) * slots + slot
        out_ptrs = out_ptr + (place * C)[:, None] + cols
        lse = top + tl.log2(tl.where(seen, total, 1.0))
        tl.store(lse_ptr + place, tl.where(seen, lse, float("-inf")), mask=live)
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptrs, (acc * factor).to(OUT), mask=live[:, None])
    if FP8:
        tl.store(out_ptrs + 1, (acc1 * factor).to(OUT), mask=live[:, None])
        tl.store(out_ptrs + 2, (acc2 * factor).to(OUT), mask=live[:, None])
        tl.store(out_ptrs + 3, (acc3 * factor).to(OUT), mask=live[:, None])


@triton.jit(do_not_specialize=["splits", "group_splits", "slots"])
def _merge_kernel(
    partial_ptr, lse_ptr, lens_ptr, group_of_ptr, shared_ptr, out_ptr, stride_ot, stride_oh,
    splits, group_splits, slots,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, C: tl.constexpr, GROUPED: tl.constexpr,
    SPLIT: tl.constexpr, LEAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (token, head) and BLOCK_C columns: sum over used slots of 2^(lse - top) partial, over that of 2^(lse - top).

    Slots are added in order and by tiles of one size, so that unused ones behind them change nothing.
    """
    row = tl.program_id(0)
    token = row // HEADS
    seq = token // QUERIES
    context = tl.load(lens_ptr + seq)
    used = context * 0
    begin = context * 0
    if GROUPED:
        group = tl.load(group_of_ptr + seq)
        if group >= 0:
            begin = _shared_tokens(shared_ptr, group, ALIGN)
            used = tl.cdiv(begin, _split_tokens(begin, group_splits, SPLIT, BLOCK_N, LEAST))
    rest = context - begin
    if rest > 0:
        used += tl.cdiv(rest, _split_tokens(rest, splits, SPLIT, BLOCK_N, LEAST))

    used = tl.minimum(used, slots)  # also with a context beyond max_context
    base = row.to(tl.int64) * slots
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top = context * 0.0 - float("inf")
    total = context * 0.0
    acc = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(0, used, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        lse = tl.load(lse_ptr + base + slot, mask=slot < used, other=float("-inf"))
        partial = tl.load(
            partial_ptr + ((base + slot) * C)[:, None] + cols[None, :],
            mask=(slot < used)[:, None] & (cols < C)[None, :], other=0.0,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - shift)
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay + tl.sum(partial * weight[:, None], 0)
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)
    out = out_ptr + token.to(tl.int64) * stride_ot + row % HEADS * stride_oh + cols
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=cols < C)


@on_own_device
def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    query_len: int,
    scale: float,
    max_context: int,
    out: Tensor,
    split_tokens: int | None = None,
    groups: PrefixGroups | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """See `moejet.ops.mla_decode`; `tiles` overrides the choice for the card. Returns out.

    Two launches, one where one split does. The scratch, [T, H, splits, C] fp32, depends on host-side integers alone.
    """
    (num_tokens, heads, rank), rope = q_latent.shape, q_pe.shape[-1]
    batch, block_size = block_tables.shape[0], latent_cache.shape[1]
    _check_operands(q_latent, q_pe, latent_cache, out)
    _check_indices(block_tables, context_lens, groups)
    assert num_tokens == batch * query_len, f"{num_tokens=} {batch=} {query_len=}"
    assert split_tokens is None or split_tokens % 64 == 0, f"{split_tokens=}"
    if num_tokens == 0:
        return out
    fp8 = latent_cache.dtype == torch.uint8
    if fp8:
        # Bytes take their products in bf16, in fp16 if that is what the queries come in.
        dot = tl.float16 if q_latent.dtype == torch.float16 else tl.bfloat16
        pe = latent_cache.view(torch.bfloat16)[..., scales_end(rank) // 2 :]
        scales = latent_cache.view(torch.float32)[..., scales_begin(rank) // 4 :]
        latents = latent_cache.view(torch.int32)
    else:
        dot = _DOT_TYPES[latent_cache.dtype]
        latents, pe, scales = latent_cache, latent_cache[..., rank:], None
    card = card_of(q_latent.device)
    rows = query_len * heads
    tiles = tiles or choose_tiles(card, rows, latent_cache.dtype)
    row_blocks = triton.cdiv(rows, tiles.block_m)
    at_once = card.num_sms * tiles.resident

    def splits_of(programs: int, tokens: int) -> int:
        if split_tokens:
            return triton.cdiv(max(tokens, 1), split_tokens)
        return choose_splits(programs, tokens, tiles.block_n, at_once)

    splits = slots = splits_of(batch * row_blocks, max_context)
    group_splits = group_row_blocks = group_programs = 0
    if groups is not None:
        group_row_blocks = triton.cdiv(groups.max_members * rows, tiles.block_m)
        num_groups = groups.shared_lens.shape[0]
        group_splits = splits_of(num_groups * group_row_blocks, groups.max_shared)
        group_programs = num_groups * group_splits * group_row_blocks
        slots += 0 if split_tokens else group_splits
    group_of = groups.group_of if groups is not None else None
    shared = groups.shared_lens if groups is not None else None
    direct = slots == 1 and groups is None
    if direct:
        result, lse = out, None
    else:
        result = torch.empty(num_tokens, heads, slots, rank, dtype=torch.float32, device=out.device)
        lse = torch.empty(num_tokens, heads, slots, dtype=torch.float32, device=out.device)
    division = {
        "HEADS": heads, "QUERIES": query_len, "C": rank, "GROUPED": groups is not None, "SPLIT": split_tokens or 0,
        "LEAST": LEAST_TILES * tiles.block_n, "ALIGN": split_tokens or tiles.block_n, "BLOCK_N": tiles.block_n,
    }  # fmt: skip
    _mla_decode_kernel[(group_programs + batch * splits * row_blocks,)](
        q_latent, q_pe, latents, pe, scales, block_tables, context_lens, result, lse,
        group_of, groups.starts if groups is not None else None,
        groups.members if groups is not None else None, shared,
        q_latent.stride(0), q_latent.stride(1), q_pe.stride(0), q_pe.stride(1),
        _units(latent_cache, 0), block_tables.stride(0), out.stride(0), out.stride(1),
        splits, group_splits, group_row_blocks, group_programs, slots, scale * _LOG2_E,
        **division, R=rope, S=block_size, ROW_UNITS=_units(latent_cache, 1),
        UNIT=16 // latents.element_size(), PE_UNIT=16 // pe.element_size(), FP8=fp8, DOT=dot,
        PRECISION="ieee" if dot == tl.float32 else None, DIRECT=direct, BLOCK_M=tiles.block_m,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if not direct:
        block_c = min(128, rank)
        _merge_kernel[(num_tokens * heads, triton.cdiv(rank, block_c))](
            result, lse, context_lens, group_of, shared, out, out.stride(0), out.stride(1),
            splits, group_splits, slots,
            **division, BLOCK_SLOTS=16, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return out


def _units(cache: Tensor, dim: int) -> int:
    """A stride of the cache in units of 16 bytes."""
    stride = cache.stride(dim) * cache.element_size()
    assert stride % 16 == 0, f"{cache.shape=} {cache.stride()=} {cache.dtype=}"
    return stride // 16


def _check_operands(q_latent: Tensor, q_pe: Tensor, latent_cache: Tensor, out: Tensor) -> None:
    for tensor in (q_latent, q_pe, latent_cache, out):
        assert tensor.stride(-1) == 1, f"{tensor.shape=} {tensor.stride()=}"
    assert out.shape == q_latent.shape, f"{out.shape=} {q_latent.shape=}"
    parts = 4 if latent_cache.dtype == torch.uint8 else 1
    for size in (q_latent.shape[-1] // parts, q_pe.shape[-1]):
        assert size >= 16, f"{q_latent.shape=} {q_pe.shape=}"
        assert size & (size - 1) == 0, f"{q_latent.shape=} {q_pe.shape=}"
    block_size = latent_cache.shape[1]
    assert block_size & (block_size - 1) == 0, f"{latent_cache.shape=}"


def _check_indices(block_tables: Tensor, context_lens: Tensor, groups: PrefixGroups | None) -> None:
    assert block_tables.stride(1) == 1, f"{block_tables.shape=} {block_tables.stride()=}"
    assert context_lens.shape == block_tables.shape[:1], (
        f"{context_lens.shape=} {block_tables.shape=}"
    )
    lists = [context_lens]
    if groups is not None:
        lists += [groups.group_of, groups.starts, groups.members, groups.shared_lens]
    for tensor in lists:
        assert tensor.is_contiguous(), f"{tensor.shape=} {tensor.stride()=}"
