"""Routed experts that live on the GPU, out of a table of slots: three launches for a few tokens, five for many.

A pair is a token with one of its top-k experts. Pairs of the same slot are computed together, BLOCK_T at a time, so
that an expert's weights are read once for all of them:

  one token     every pair is on its own
  up to 64      each program finds the pairs of its slot among all; only the first of them (of every eight) goes on
  more          pairs are sorted by slot on the device, each slot padded to whole blocks; the grid covers the worst
                case, and programs beyond the last block leave at once

Then gate and up with silu(gate) * up at the end, then down, then the weighted sum over a token's experts in their
order. Nothing is added atomically and nothing is asked of the device, so results repeat and graphs capture it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import Card, card_of, on_own_device
from moejet.kernels.linear import is_packed
from moejet.kernels.weight_tiles import weights_times_columns
from moejet.weights.gpu_weights import GpuWeights

_FEW_PAIRS = 64
_DOWN_BYTES = 64 << 20  # of the down projections' results that wait for the sum


@dataclass(frozen=True)
class ExpertsConfig:
    """block_n: rows of W per program (half gate, half up), block_t: pairs per program."""

    block_n: int
    block_t: int
    num_warps: int
    num_stages: int


@triton.jit
def _slots_of(p, mask, topk_ids_ptr, slot_of_expert_ptr, E):
    """The slots of pairs p; -1 where mask is false, no expert was chosen, or it lives elsewhere."""
    expert = tl.load(topk_ids_ptr + p, mask=mask, other=-1).to(tl.int32)
    return tl.load(
        slot_of_expert_ptr + expert, mask=mask & (expert >= 0) & (expert < E), other=-1
    ).to(tl.int32)


@triton.jit
def _my_pairs(
    index, topk_ids_ptr, slot_of_expert_ptr, sorted_ptr, block_slot_ptr, num_blocks_ptr, P, E,
    MODE: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(slot or -1, pairs [BLOCK_T], which of them exist) of program `index`; -1: it has nothing to do."""
    column = tl.arange(0, BLOCK_T)
    if MODE == "sorted":
        slot = -1
        if index < tl.load(num_blocks_ptr):
            slot = tl.load(block_slot_ptr + index)
        pairs = tl.load(
            sorted_ptr + index * BLOCK_T + column, mask=column * 0 + slot >= 0, other=-1
        )
        return slot, pairs, pairs >= 0
    p = tl.arange(0, PAIRS)
    slots = _slots_of(p, p < P, topk_ids_ptr, slot_of_expert_ptr, E)
    slot = tl.sum(tl.where(p == index, slots, 0), axis=0)
    if MODE == "one":
        return slot, column * 0 + index, column == 0
    same = slots == slot
    rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
    mine = tl.sum(tl.where(p == index, rank, 0), axis=0)
    match = same[:, None] & (rank[:, None] == (mine + column)[None, :])
    pairs = tl.sum(tl.where(match, p[:, None], 0), axis=0)
    exists = tl.sum(match.to(tl.int32), axis=0) > 0
    return tl.where(mine % BLOCK_T == 0, slot, -1), pairs, exists


@triton.jit(do_not_specialize=["P"])
def _gate_up_kernel(
    x_ptr, codes_ptr, scales_ptr, hidden_ptr,
    topk_ids_ptr, slot_of_expert_ptr, sorted_ptr, block_slot_ptr, num_blocks_ptr,
    P, E, D, INNER, TOP_K, stride_xt, stride_cs, stride_cw, stride_cn, stride_ss, stride_sw, stride_sn,
    MODE: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr, EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot, pairs, exists = _my_pairs(
        tl.program_id(1), topk_ids_ptr, slot_of_expert_ptr, sorted_ptr, block_slot_ptr,
        num_blocks_ptr, P, E, MODE, PAIRS, BLOCK_T,
    )  # fmt: skip
    if slot < 0:
        return
    slot = slot.to(tl.int64)
    # Rows of gate and up alternate, so that both results of a channel are neighbours in the tile.
    HALF: tl.constexpr = BLOCK_N // 2
    row = tl.arange(0, BLOCK_N)
    channel = tl.minimum(tl.program_id(0) * HALF + row // 2, INNER - 1).to(tl.int64)
    scale_row = channel // 128 if FORMAT == "fp8" else channel
    token = (pairs // TOP_K).to(tl.int64)
    acc = weights_times_columns(
        codes_ptr + slot * stride_cs, scales_ptr,
        row % 2 * stride_cw + channel * stride_cn,
        slot * stride_ss + row % 2 * stride_sw + scale_row * stride_sn,
        x_ptr + token * stride_xt, exists, D, 0, tl.cdiv(D, BLOCK_K),
        FORMAT, PACKED, EVEN_K, BLOCK_K,
    )  # fmt: skip
    both = tl.permute(tl.reshape(acc, (HALF, 2, BLOCK_T)), (0, 2, 1))
    gate, up = tl.split(both)
    result = gate / (1.0 + tl.exp(-gate)) * up
    n = tl.program_id(0) * HALF + tl.arange(0, HALF)
    at = hidden_ptr + pairs.to(tl.int64)[None, :] * INNER + n[:, None]
    tl.store(
        at, result.to(hidden_ptr.dtype.element_ty), mask=(n < INNER)[:, None] & exists[None, :]
    )


@triton.jit(do_not_specialize=["P", "first_n"])
def _down_kernel(
    hidden_ptr, codes_ptr, scales_ptr, result_ptr,
    topk_ids_ptr, slot_of_expert_ptr, sorted_ptr, block_slot_ptr, num_blocks_ptr,
    P, E, D, INNER, first_n, width, stride_cs, stride_cn, stride_ss, stride_sn,
    MODE: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr, EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot, pairs, exists = _my_pairs(
        tl.program_id(1), topk_ids_ptr, slot_of_expert_ptr, sorted_ptr, block_slot_ptr,
        num_blocks_ptr, P, E, MODE, PAIRS, BLOCK_T,
    )  # fmt: skip
    if slot < 0:
        return
    slot = slot.to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(first_n + n, D - 1).to(tl.int64)
    scale_row = row // 128 if FORMAT == "fp8" else row
    acc = weights_times_columns(
        codes_ptr + slot * stride_cs, scales_ptr,
        row * stride_cn, slot * stride_ss + scale_row * stride_sn,
        hidden_ptr + pairs.to(tl.int64) * INNER, exists, INNER, 0, tl.cdiv(INNER, BLOCK_K),
        FORMAT, PACKED, EVEN_K, BLOCK_K,
    )  # fmt: skip
    at = result_ptr + pairs.to(tl.int64)[None, :] * width + n[:, None]
    tl.store(at, acc, mask=((n < width) & (first_n + n < D))[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["first_n"])
def _weighted_sum_kernel(
    result_ptr, topk_ids_ptr, topk_weights_ptr, slot_of_expert_ptr, out_ptr,
    E, D, first_n, width, TOP_K, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """ADD: to out, where a token has any expert here."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (n < width) & (first_n + n < D)
    total = tl.zeros((BLOCK,), tl.float32)
    any_here = n < 0
    for k in range(TOP_K):
        pair = token * TOP_K + k
        slot = _slots_of(pair, pair >= 0, topk_ids_ptr, slot_of_expert_ptr, E)
        here = mask & (n * 0 + slot >= 0)
        value = tl.load(result_ptr + pair * width + n, mask=here, other=0.0)
        total += tl.where(here, value * tl.load(topk_weights_ptr + pair), 0.0)
        any_here |= here
    at = out_ptr + token * D + first_n + n
    if ADD:
        mask = any_here
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P"])
def _count_kernel(topk_ids_ptr, slot_of_expert_ptr, counts_ptr, P, E, CHUNK: tl.constexpr):
    slot = tl.program_id(0)
    count = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, P, CHUNK):
        p = first + tl.arange(0, CHUNK)
        count += (_slots_of(p, p < P, topk_ids_ptr, slot_of_expert_ptr, E) == slot).to(tl.int32)
    tl.store(counts_ptr + slot, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["P"])
def _place_kernel(
    topk_ids_ptr, slot_of_expert_ptr, counts_ptr, sorted_ptr, block_slot_ptr, num_blocks_ptr, P, E,
    SLOTS: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the pairs of one slot, in order, behind those of the slots before it."""
    slot = tl.program_id(0)
    s = tl.arange(0, SLOTS)
    counts = tl.load(counts_ptr + s, mask=s < tl.num_programs(0), other=0)
    blocks = (counts + BLOCK_T - 1) // BLOCK_T
    before = tl.sum(tl.where(s < slot, blocks, 0), axis=0)
    mine = tl.sum(tl.where(s == slot, blocks, 0), axis=0)
    at = before * BLOCK_T
    for first in range(0, P, CHUNK):
        p = first + tl.arange(0, CHUNK)
        same = _slots_of(p, p < P, topk_ids_ptr, slot_of_expert_ptr, E) == slot
        rank = tl.cumsum(same.to(tl.int32), axis=0)
        tl.store(sorted_ptr + at + rank - 1, p, mask=same)
        at += tl.sum(same.to(tl.int32), axis=0)
    column = tl.arange(0, BLOCK_T)
    tl.store(sorted_ptr + at + column, column * 0 - 1, mask=at + column < (before + mine) * BLOCK_T)
    for block in range(before, before + mine):
        tl.store(block_slot_ptr + block, slot)
    if slot == tl.num_programs(0) - 1:
        tl.store(num_blocks_ptr, before + mine)


@on_own_device
def moe_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    slot_of_expert: Tensor,
    gate_up: GpuWeights,
    down: GpuWeights,
    *,
    out_dtype: torch.dtype,
    into: Tensor | None = None,
) -> Tensor:
    """The weighted sum over each token's resident experts, [T, D]; see `moejet.ops.gpu_experts`."""
    (tokens, dim), top_k = x.shape, topk_ids.shape[1]
    slots, _, inner, _ = gate_up.shape
    _check(x, topk_ids, topk_weights, slot_of_expert, gate_up, down)
    if into is not None:
        assert into.is_contiguous(), f"{into.stride()=}"
        assert (into.shape, into.dtype) == (x.shape, torch.float32), f"{into.shape=} {into.dtype=}"
    out = torch.empty(tokens, dim, dtype=out_dtype, device=x.device) if into is None else into
    pairs, experts = tokens * top_k, slot_of_expert.shape[0]
    if pairs == 0:
        return out.zero_() if into is None else out
    card = card_of(x.device)
    config = _config(pairs, experts, gate_up.format, x.element_size(), card)
    mode = "one" if tokens == 1 else "few" if pairs <= _FEW_PAIRS else "sorted"
    routing = (topk_ids, slot_of_expert)
    order: tuple[Tensor | None, ...] = (None, None, None)
    programs = pairs
    if mode == "sorted":
        programs = triton.cdiv(pairs, config.block_t) + min(slots, pairs)
        order = _sort_pairs(*routing, pairs, slots, programs, config.block_t)

    hidden = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    options = {
        "MODE": mode, "PACKED": is_packed(x), "PAIRS": triton.next_power_of_2(pairs) if mode != "sorted" else 1,
        "BLOCK_N": config.block_n, "BLOCK_T": config.block_t, "BLOCK_K": 128,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    _gate_up_kernel[(triton.cdiv(inner, config.block_n // 2), programs)](
        x, gate_up.codes, gate_up.scales, hidden, *routing, *order,
        pairs, experts, dim, inner, top_k, x.stride(0),
        *gate_up.codes.stride()[:3], *_scale_strides(gate_up),
        FORMAT=gate_up.format, EVEN_K=dim % 128 == 0, **options,
    )  # fmt: skip
    # Results of the down projection wait in fp32, so many columns at a time that they fit.
    width = min(dim, max(512, _DOWN_BYTES // (4 * pairs) // 128 * 128))
    result = torch.empty(pairs, width, dtype=torch.float32, device=x.device)
    for first in range(0, dim, width):
        _down_kernel[(triton.cdiv(min(width, dim - first), config.block_n), programs)](
            hidden, down.codes, down.scales, result, *routing, *order,
            pairs, experts, dim, inner, first, width,
            *down.codes.stride()[:2], *_scale_strides(down),
            FORMAT=down.format, EVEN_K=inner % 128 == 0, **options,
        )  # fmt: skip
        _weighted_sum_kernel[(tokens, triton.cdiv(min(width, dim - first), 512))](
            result, topk_ids, topk_weights, slot_of_expert, out,
            experts, dim, first, width, top_k, BLOCK=512, ADD=into is not None, num_warps=2,
        )  # fmt: skip
    return out


def _sort_pairs(
    topk_ids: Tensor, slot_of_expert: Tensor, pairs: int, slots: int, most: int, block_t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs by slot with -1 as padding, slot of each block, number of blocks), int32."""

    def scratch(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=topk_ids.device)

    counts, order, block_slot, num_blocks = (
        scratch(size) for size in (slots, most * block_t, most, 1)
    )
    experts = slot_of_expert.shape[0]
    chunk = min(1024, triton.next_power_of_2(pairs))
    _count_kernel[(slots,)](topk_ids, slot_of_expert, counts, pairs, experts, CHUNK=chunk)
    _place_kernel[(slots,)](
        topk_ids, slot_of_expert, counts, order, block_slot, num_blocks, pairs, experts,
        SLOTS=triton.next_power_of_2(slots), BLOCK_T=block_t, CHUNK=chunk,
    )  # fmt: skip
    return order, block_slot, num_blocks


def _scale_strides(weights: GpuWeights) -> tuple[int, ...]:
    lead = len(weights.shape) - 1
    return (0,) * lead if weights.scales is None else weights.scales.stride()[:lead]


def _check(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    slot_of_expert: Tensor,
    gate_up: GpuWeights,
    down: GpuWeights,
) -> None:
    slots, two, inner, dim = gate_up.shape
    assert two == 2, f"{gate_up.shape=}"
    assert down.shape == (slots, dim, inner), f"{gate_up.shape=} {down.shape=}"
    assert x.shape[1] == dim, f"{x.shape=} {gate_up.shape=}"
    assert x.stride(1) == 1 or dim == 1, f"{x.stride()=}"
    assert topk_ids.is_contiguous(), f"{topk_ids.stride()=}"
    assert topk_weights.is_contiguous(), f"{topk_weights.stride()=}"
    assert topk_ids.shape == topk_weights.shape == (x.shape[0], topk_ids.shape[1])
    assert slot_of_expert.dtype == torch.int32, f"{slot_of_expert.dtype=}"


def _config(pairs: int, experts: int, format: str, x_bytes: int, card: Card) -> ExpertsConfig:
    """Blocks and pipeline; see `linear._config`.

    block_t follows the pairs per expert when all experts are asked alike: padding costs as much as work.
    """
    big = card.shared_memory > 100 << 10
    if x_bytes == 4:
        return ExpertsConfig(16, 16, 4, 2)
    average = pairs / experts
    if pairs <= _FEW_PAIRS or average <= 32:
        block_t = 8 if pairs <= _FEW_PAIRS else 16 if average <= 16 else 32
        stages = (6 if big else 4) if format == "int4_g32" else (4 if big else 3)
        return ExpertsConfig(64, block_t, 2, stages)
    if card.capability in (90, 100):
        block_t = 64 if average <= 64 else 128
        return ExpertsConfig(128, block_t, 8, 2 if format in ("bf16", "fp16") else 3)
    return ExpertsConfig(128, 64, 8, 3 if big else 2)
