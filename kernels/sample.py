"""Sampling on the device, without a word from the host: five launches of fixed shape, whatever the rows ask for.

1. read     per chunk of a row: penalties and biases, the best (value, id), what log-sum-exp needs
2. weigh    per chunk: its probability mass; with cut-offs a histogram of distances to the best logit
3. list     per chunk: its tokens among the best CAPACITY at most of the row (a bound from the histogram)
4. rank     per listed token: how many, and how much probability, come before it; no sort is needed after that
5. choose   per row: the token, or UNDECIDED where the listed tokens do not reach the cut-offs
6. search   `sample_search`: decides those

Masses are integers (see `sample_search`): results do not depend on the order of atomics or sums. Rows that need no
random number, or no cut-off, leave the launches that are not for them at once.
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
from moejet.kernels.sample_search import (
    inverse_temperature,
    search_kernel,
    share_of,
    target_mass,
    token_mass,
)

_CHUNK = 4096
_CAPACITY = 1024
_BINS = 2048  # of 1/64 natural-logarithm units; mass vanishes beyond 30.5 of them
_BAD_LOGITS, _UNDECIDED = -1, -2


@triton.jit(do_not_specialize=["num_biases"])
def _read_kernel(
    logits_ptr, adjusted_ptr, best_ptr, maxima_ptr, sums_ptr,
    repetition_ptr, presence_ptr, frequency_ptr, counts_ptr, bias_ids_ptr, bias_ptr,
    stride_lb, stride_nb, num_biases, vocab_size,
    HAS_COUNTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    out = row * tl.num_programs(1) + chunk
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = cols < vocab_size
    x = tl.load(logits_ptr + row * stride_lb + cols, mask=mask, other=float("-inf")).to(tl.float32)
    if HAS_SUMS:
        largest = tl.max(x, axis=0)
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(maxima_ptr + out, largest)
        tl.store(sums_ptr + out, tl.sum(tl.exp(x - finite), axis=0))
    if HAS_COUNTS:
        counts = tl.load(counts_ptr + row * stride_nb + cols, mask=mask, other=0)
        penalty = tl.zeros([CHUNK], tl.float32) + tl.load(repetition_ptr + row)
        lowered = tl.where(x > 0.0, tl.div_rn(x, penalty), x * penalty)
        x = tl.where(counts != 0, lowered, x)
        times = counts >> 1
        penalty = tl.load(presence_ptr + row) + tl.load(frequency_ptr + row) * times.to(tl.float32)
        x = tl.where(times > 0, x - penalty, x)
    if HAS_BIAS:
        for i in range(num_biases):
            token = tl.load(bias_ids_ptr + row * num_biases + i)
            x = tl.where(cols == token, x + tl.load(bias_ptr + row * num_biases + i), x)
    if HAS_COUNTS or HAS_BIAS:
        tl.store(adjusted_ptr + row * vocab_size + cols, x, mask=mask)
    keys = tl.where(mask, ordered_keys(ordered(x), cols), tl.full([CHUNK], -(2**63), tl.int64))
    tl.store(best_ptr + out, tl.max(keys, axis=0))


@triton.jit
def _best_of_row(best_ptr, row, num_chunks, BLOCK_N: tl.constexpr):
    """(key, whether the row may be sampled from): NaN and +inf are above the finite values, -inf is below."""
    lanes = tl.arange(0, BLOCK_N)
    lowest = tl.full([BLOCK_N], -(2**63), tl.int64)
    keys = tl.load(best_ptr + row * num_chunks + lanes, mask=lanes < num_chunks, other=-(2**63))
    best = tl.max(tl.where(lanes < num_chunks, keys, lowest), axis=0)
    value = ordered_part(best)
    return best, (value < 0x7F800000) & (value > -0x7F800001)


@triton.jit
def _has_cut_offs(top_k, top_p, min_p):
    return (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _bins(x, largest, inverse_t, BINS: tl.constexpr):
    """Bins of distances, 0 for the largest; never decreasing as x falls."""
    return tl.minimum((largest - x) * inverse_t * 64.0, BINS - 1.0).to(tl.int32)


@triton.jit
def _weigh_kernel(
    logits_ptr, best_ptr, masses_ptr, histogram_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    stride_lb, stride_hb, vocab_size,
    HAS_LIST: tl.constexpr, BLOCK_N: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    best, is_good = _best_of_row(best_ptr, row, tl.num_programs(1), BLOCK_N)
    temperature = tl.load(temperature_ptr + row)
    if is_good & (temperature > 0.0):
        inverse_t = inverse_temperature(temperature)
        largest = ordered_value(ordered_part(best))
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(
            logits_ptr + row * stride_lb + cols, mask=cols < vocab_size, other=float("-inf")
        )
        x = x.to(tl.float32)
        mass = token_mass(x, largest, inverse_t)
        tl.store(masses_ptr + row * tl.num_programs(1) + chunk, tl.sum(mass, axis=0))
        if HAS_LIST:
            top_k = tl.load(top_k_ptr + row)
            if _has_cut_offs(top_k, tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)):
                counts = tl.histogram(_bins(x, largest, inverse_t, BINS), BINS, mask=mass > 0)
                bins = histogram_ptr + row * stride_hb + tl.arange(0, BINS)
                tl.atomic_add(bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _list_kernel(
    logits_ptr, best_ptr, histogram_ptr, listed_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    stride_lb, stride_hb, vocab_size,
    BLOCK_N: tl.constexpr, BINS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The number of listed tokens is behind the row's histogram; their order in the list has no meaning."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    best, is_good = _best_of_row(best_ptr, row, tl.num_programs(1), BLOCK_N)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    cut_offs = _has_cut_offs(top_k, tl.load(top_p_ptr + row), tl.load(min_p_ptr + row))
    if is_good & (temperature > 0.0) & cut_offs:
        reached = tl.cumsum(tl.load(histogram_ptr + row * stride_hb + tl.arange(0, BINS)), axis=0)
        num_bins = tl.sum((reached <= CAPACITY).to(tl.int32), axis=0)
        if top_k > 0:
            num_bins = tl.minimum(num_bins, tl.sum((reached < top_k).to(tl.int32), axis=0) + 1)
        inverse_t = inverse_temperature(temperature)
        largest = ordered_value(ordered_part(best))
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(
            logits_ptr + row * stride_lb + cols, mask=cols < vocab_size, other=float("-inf")
        )
        x = x.to(tl.float32)
        mass = token_mass(x, largest, inverse_t)
        listed = (mass > 0) & (_bins(x, largest, inverse_t, BINS) < num_bins)
        ranks = tl.cumsum(listed.to(tl.int32), axis=0)
        number = tl.sum(listed.to(tl.int32), axis=0)
        if number > 0:
            first = tl.atomic_add(histogram_ptr + row * stride_hb + BINS, number, sem="relaxed")
            places = listed_ptr + row * CAPACITY + first + ranks - 1
            tl.store(places, ordered_keys(ordered(x), cols), mask=listed)


@triton.jit
def _rank_kernel(
    best_ptr, histogram_ptr, listed_ptr, counts_ptr, masses_ptr, temperature_ptr,
    stride_hb, num_chunks,
    BLOCK_N: tl.constexpr, BINS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(histogram_ptr + row * stride_hb + BINS)
    first = tl.program_id(1) * BLOCK
    if first < number:
        best, _ = _best_of_row(best_ptr, row, num_chunks, BLOCK_N)
        largest = ordered_value(ordered_part(best))
        inverse_t = inverse_temperature(tl.load(temperature_ptr + row))
        listed_ptr += row * CAPACITY
        lanes = tl.arange(0, BLOCK)
        keys = tl.load(listed_ptr + first + lanes, mask=first + lanes < number, other=0)
        count = tl.zeros([BLOCK], tl.int32)
        mass = tl.zeros([BLOCK], tl.int64)
        for start in range(0, number, BLOCK):
            others = tl.load(listed_ptr + start + lanes, mask=start + lanes < number, other=0)
            own = token_mass(ordered_value(ordered_part(others)), largest, inverse_t)
            before = (others[None, :] > keys[:, None]) & (start + lanes < number)[None, :]
            count += tl.sum(before.to(tl.int32), axis=1)
            mass += tl.sum(tl.where(before, own[None, :], 0), axis=1)
        places = row * CAPACITY + first + lanes
        tl.store(counts_ptr + places, count, mask=first + lanes < number)
        tl.store(masses_ptr + places, mass, mask=first + lanes < number)


@triton.jit
def _choose_in_order(
    row_ptr, masses, largest, inverse_t, u, vocab_size, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr
):
    """Inverse transform over all tokens in order of their ids; masses are those of the chunks."""
    total = tl.sum(masses, axis=0)
    target = target_mass(u, total)
    reached = tl.cumsum(masses, axis=0)
    chunk = tl.sum((reached <= target).to(tl.int32), axis=0)
    before = tl.sum(tl.where(reached <= target, masses, 0), axis=0)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + cols, mask=cols < vocab_size, other=float("-inf")).to(tl.float32)
    reached = before + tl.cumsum(token_mass(x, largest, inverse_t), axis=0)
    return chunk * CHUNK + tl.sum((reached <= target).to(tl.int32), axis=0)


@triton.jit
def _choose_listed(
    keys, mass, count_before, mass_before, is_listed, total, u, top_k, top_p, min_p,
    UNDECIDED: tl.constexpr,
):  # fmt: skip
    """The token, or UNDECIDED: the cut-offs lie beyond the listed tokens."""
    number = tl.sum(is_listed.to(tl.int32), axis=0)
    listed_mass = tl.sum(mass, axis=0)
    is_whole = listed_mass == total
    kept = is_listed
    if top_k > 0:
        kept = kept & (count_before < top_k)
        # What is not listed and has no mass changes nothing.
        total = tl.where(
            (number >= top_k) | is_whole, tl.sum(tl.where(kept, mass, 0), axis=0), total
        )
    is_known = (top_k <= 0) | (number >= top_k) | is_whole
    is_decided = is_whole | ((top_k > 0) & (number >= top_k))
    if top_p < 1.0:
        share = share_of(top_p, total)
        kept = kept & (mass_before < share)
        is_decided = is_decided | (listed_mass >= share)
    else:
        is_known = is_known | (min_p > 0.0)
    if min_p > 0.0:
        least = share_of(min_p, tl.full([], 1 << 44, tl.int64))
        is_decided = is_decided | (tl.sum((is_listed & (mass < least)).to(tl.int32), axis=0) > 0)
        kept = kept & (mass >= least)
    target = target_mass(u, tl.sum(tl.where(kept, mass, 0), axis=0))
    is_chosen = kept & (mass_before <= target) & (target < mass_before + mass)
    token = tl.sum(tl.where(is_chosen, index_part(keys), 0), axis=0)
    return tl.where(is_known & is_decided, token, UNDECIDED)


@triton.jit
def _choose_kernel(
    logits_ptr, best_ptr, maxima_ptr, sums_ptr, masses_ptr, histogram_ptr, listed_ptr,
    listed_counts_ptr, listed_masses_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    uniform_ptr, tokens_ptr, row_best_ptr, log_sums_ptr,
    stride_lb, stride_hb, num_chunks, vocab_size,
    HAS_SUMS: tl.constexpr, IS_RANDOM: tl.constexpr, HAS_LIST: tl.constexpr, BLOCK_N: tl.constexpr,
    BINS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
    BAD: tl.constexpr, UNDECIDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK_N)
    best, is_good = _best_of_row(best_ptr, row, num_chunks, BLOCK_N)
    tl.store(row_best_ptr + row, best)
    if HAS_SUMS:
        tl.store(log_sums_ptr + row, log_sum_of_row(maxima_ptr, sums_ptr, row, num_chunks, BLOCK_N))
    token = tl.where(is_good, index_part(best), BAD)
    temperature = tl.load(temperature_ptr + row)
    if IS_RANDOM:  # noqa: SIM102 (one is known when compiling)
        if is_good & (temperature > 0.0):
            largest = ordered_value(ordered_part(best))
            inverse_t = inverse_temperature(temperature)
            u = tl.load(uniform_ptr + row)
            masses = tl.load(
                masses_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=0
            )
            top_k = tl.load(top_k_ptr + row)
            top_p = tl.load(top_p_ptr + row)
            min_p = tl.load(min_p_ptr + row)
            cut_offs = _has_cut_offs(top_k, top_p, min_p)
            if cut_offs:
                if HAS_LIST:
                    number = tl.load(histogram_ptr + row * stride_hb + BINS)
                    lanes = tl.arange(0, CAPACITY)
                    is_listed = lanes < number
                    places = row * CAPACITY + lanes
                    keys = tl.load(listed_ptr + places, mask=is_listed, other=0)
                    mass = token_mass(ordered_value(ordered_part(keys)), largest, inverse_t)
                    token = _choose_listed(
                        keys, tl.where(is_listed, mass, 0),
                        tl.load(listed_counts_ptr + places, mask=is_listed, other=0),
                        tl.load(listed_masses_ptr + places, mask=is_listed, other=0),
                        is_listed, tl.sum(masses, axis=0), u, top_k, top_p, min_p, UNDECIDED,
                    )  # fmt: skip
            else:
                token = _choose_in_order(
                    logits_ptr + row * stride_lb, masses, largest, inverse_t, u, vocab_size,
                    BLOCK_N, CHUNK,
                )  # fmt: skip
    tl.store(tokens_ptr + row, token)


@on_own_device
def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    *,
    penalties: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    biases: tuple[Tensor, Tensor] | None = None,
    log_sums: bool = False,
    is_random: bool = True,
    has_cut_offs: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B] int32 and log-sum-exp of the raw rows [B] fp32, if wanted; see `moejet.ops.device_sampling`.

    logits [B, V], unit stride in V, V at most 2^18 · penalties: (repetition, presence, frequency [B] fp32,
    counts [B, V] int32) · biases: (ids [B, L] int32, values [B, L] fp32), contiguous ·
    is_random=False: every temperature is 0; has_cut_offs=False: no row has any.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 or vocab_size == 1, f"{logits.stride()=}"
    assert vocab_size <= 1 << 18, f"{vocab_size=}: masses would not fit 63 bits"
    device = logits.device
    tokens = torch.empty(num_rows, dtype=torch.int32, device=device)
    sums_out = torch.empty(num_rows, dtype=torch.float32, device=device) if log_sums else None
    if num_rows == 0:
        return tokens, sums_out
    chunks = triton.cdiv(vocab_size, _CHUNK)
    per_chunk = (num_rows, chunks)
    block_n = triton.next_power_of_2(chunks)
    best = torch.empty(per_chunk, dtype=torch.int64, device=device)
    # Each allocated on its own: within one tensor, the batch would decide how the second is aligned.
    maxima, sums = (
        torch.empty(per_chunk, dtype=torch.float32, device=device) if log_sums else None
        for _ in range(2)
    )
    work = logits
    if penalties is not None or biases is not None:
        work = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=device)
    repetition, presence, frequency, counts = penalties or (None, None, None, None)
    bias_ids, bias = biases or (None, None)
    # 4096 values with 8 warps are 16 per thread; 32 chunks of a vocabulary of 129k occupy a quarter of a large card,
    # and one batch of 8 all of it.
    _read_kernel[per_chunk](
        logits, work, best, maxima, sums, repetition, presence, frequency, counts, bias_ids, bias,
        logits.stride(0), 0 if counts is None else counts.stride(0),
        0 if bias is None else bias.shape[1], vocab_size,
        HAS_COUNTS=counts is not None, HAS_BIAS=bias is not None, HAS_SUMS=log_sums,
        CHUNK=_CHUNK, num_warps=8,
    )  # fmt: skip
    masses = histogram = listed = listed_counts = listed_masses = None
    stride, has_list = 0, is_random and has_cut_offs
    rules = (temperature, top_k, top_p, min_p)
    sizes = {"BLOCK_N": block_n, "BINS": _BINS, "CHUNK": _CHUNK}
    if is_random:
        masses = torch.empty(per_chunk, dtype=torch.int64, device=device)
        if has_list:  # the last of its columns count the listed tokens
            histogram = torch.zeros(num_rows, _BINS + 16, dtype=torch.int32, device=device)
            stride = histogram.stride(0)
        _weigh_kernel[per_chunk](
            work, best, masses, histogram, *rules, work.stride(0), stride, vocab_size,
            HAS_LIST=has_list, **sizes, num_warps=8,
        )  # fmt: skip
    if has_list:
        listed, listed_masses = torch.empty(
            2, num_rows, _CAPACITY, dtype=torch.int64, device=device
        )
        listed_counts = torch.empty(num_rows, _CAPACITY, dtype=torch.int32, device=device)
        _list_kernel[per_chunk](
            work, best, histogram, listed, *rules, work.stride(0), stride, vocab_size,
            CAPACITY=_CAPACITY, **sizes, num_warps=8,
        )  # fmt: skip
        _rank_kernel[(num_rows, _CAPACITY // 32)](
            best, histogram, listed, listed_counts, listed_masses, temperature, stride, chunks,
            BLOCK_N=block_n, BINS=_BINS, CAPACITY=_CAPACITY, BLOCK=32, num_warps=4,
        )  # fmt: skip
    row_best = torch.empty(num_rows, dtype=torch.int64, device=device)
    _choose_kernel[(num_rows,)](
        work, best, maxima, sums, masses, histogram, listed, listed_counts, listed_masses, *rules,
        uniforms, tokens, row_best, sums_out, work.stride(0), stride, chunks, vocab_size,
        HAS_SUMS=log_sums, IS_RANDOM=is_random, HAS_LIST=has_list, CAPACITY=_CAPACITY,
        BAD=_BAD_LOGITS, UNDECIDED=_UNDECIDED, **sizes, num_warps=8,
    )  # fmt: skip
    if has_list:
        search_kernel[(num_rows,)](
            work, row_best, *rules, uniforms, tokens, work.stride(0), vocab_size,
            UNDECIDED=_UNDECIDED, BLOCK=_CHUNK // 2, num_warps=8,
        )  # fmt: skip
    return tokens, sums_out
