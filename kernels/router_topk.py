"""Expert selection of every supported router, one token per program.

Scores are fp32 and stay in registers as a [groups, experts of a group] tile. Selection works on 64-bit keys: the score
as an integer that orders like it (NaN above all), then the complement of the expert's id, so that the maximum is unique
and equal scores give the smaller id. K maxima one after the other are cheaper than a sort of the row: K is 4 to 8
where a row has 64 to 512 experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moejet.kernels.card import on_own_device
from moejet.kernels.ordered_keys import ordered, ordered_keys, ordered_part, ordered_value


@triton.jit
def _kept_groups(
    keys, group_ids, known, NUM: tl.constexpr, KEPT: tl.constexpr, BEST_TWO: tl.constexpr
):
    """Which of the groups (rows of keys) are among the KEPT best, by their best or the sum of their two best scores."""
    lowest = tl.full([1], -(2**63), tl.int64)
    best = tl.max(keys, axis=1)
    score = ordered_value(ordered_part(best))
    if BEST_TWO:
        second = tl.max(tl.where(keys == best[:, None], lowest, keys), axis=1)
        score += ordered_value(ordered_part(second))
    ranks = tl.where(known, ordered_keys(ordered(score), group_ids), lowest)
    kept = group_ids < 0
    for _ in range(KEPT):
        top = tl.max(ranks, axis=0)
        kept = kept | (ranks == top)
        ranks = tl.where(ranks == top, lowest, ranks)
    return kept


@triton.jit
def _router_topk_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, stride_lt, scale,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, KEPT: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, BEST_TWO: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lowest = tl.full([1, 1], -(2**63), tl.int64)
    groups = tl.arange(0, BLOCK_N)
    members = tl.arange(0, BLOCK_G)[None, :]
    experts = groups[:, None] * GROUP + members
    known = (groups[:, None] < NUM_GROUPS) & (members < GROUP)
    logits = tl.load(logits_ptr + token * stride_lt + experts, mask=known, other=float("-inf"))
    logits = logits.to(tl.float32)
    if SIGMOID:
        scores = tl.div_rn(tl.full([BLOCK_N, BLOCK_G], 1.0, tl.float32), 1.0 + tl.exp(-logits))
    else:
        largest = tl.max(tl.max(logits, axis=1), axis=0)
        powers = tl.where(known, tl.exp(logits - largest), 0.0)
        total = tl.sum(tl.sum(powers, axis=1), axis=0)
        scores = tl.div_rn(powers, tl.zeros([BLOCK_N, BLOCK_G], tl.float32) + total)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + experts, mask=known, other=0.0).to(tl.float32)
    keys = tl.where(known, ordered_keys(ordered(choice), experts), lowest)
    if KEPT > 0:
        kept = _kept_groups(keys, groups, groups < NUM_GROUPS, NUM_GROUPS, KEPT, BEST_TWO)
        # As after -inf in place of the scores: they follow the experts of the chosen groups, in order of their ids.
        outside = ordered_keys(tl.full([BLOCK_N, BLOCK_G], -0x7F800001, tl.int32), experts)
        keys = tl.where(known & (kept[:, None] == 0), outside, keys)
    lanes = tl.arange(0, BLOCK_K)
    chosen_ids = tl.zeros([BLOCK_K], tl.int32)
    chosen = tl.zeros([BLOCK_K], tl.float32)
    for k in range(K):
        top = tl.max(tl.max(keys, axis=1), axis=0)
        is_top = keys == top
        expert = 0x7FFFFFFF - (top & 0x7FFFFFFF).to(tl.int32)
        score = tl.sum(tl.sum(tl.where(is_top, scores, 0.0), axis=1), axis=0)
        chosen_ids = tl.where(lanes == k, expert, chosen_ids)
        chosen = tl.where(lanes == k, score, chosen)
        keys = tl.where(is_top, lowest, keys)
    if NORMALISE:
        total = tl.sum(chosen, axis=0) + 1e-20
        chosen = tl.div_rn(chosen, tl.zeros([BLOCK_K], tl.float32) + total)
    tl.store(ids_ptr + token * K + lanes, chosen_ids, mask=lanes < K)
    tl.store(weights_ptr + token * K + lanes, chosen * scale, mask=lanes < K)


@on_own_device
def router_topk(
    router_logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    is_sigmoid: bool,
    num_groups: int,
    kept_groups: int,
    best_two: bool,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """router_logits [T, E], unit stride in E, E a multiple of num_groups · bias [E] contiguous.

    num_groups=1: no group limit; best_two: groups rank by the sum of their two best. Returns ids [T, K] int32 and
    weights [T, K] fp32.
    """
    num_tokens, num_experts = router_logits.shape
    assert top_k <= num_experts, f"{top_k=} {num_experts=}"
    assert num_experts % num_groups == 0, f"{num_experts=} {num_groups=}"
    assert router_logits.stride(1) == 1 or num_experts == 1, f"{router_logits.stride()=}"
    assert bias is None or bias.is_contiguous()
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=router_logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=router_logits.device)
    if num_tokens == 0:
        return ids, weights
    group = num_experts // num_groups
    block_n, block_g = triton.next_power_of_2(num_groups), triton.next_power_of_2(group)
    _router_topk_kernel[(num_tokens,)](
        router_logits, bias, ids, weights, router_logits.stride(0), scale,
        NUM_GROUPS=num_groups, GROUP=group, BLOCK_N=block_n, BLOCK_G=block_g,
        K=top_k, BLOCK_K=triton.next_power_of_2(top_k), KEPT=kept_groups if num_groups > 1 else 0,
        SIGMOID=is_sigmoid, HAS_BIAS=bias is not None, BEST_TWO=best_two and group > 1,
        NORMALISE=renormalise,
        # One warp finds maxima without shared memory; above 16 experts per thread its registers run out.
        num_warps=1 if block_n * block_g <= 512 else 4,
    )  # fmt: skip
    return ids, weights
