"""Cut-offs of any width by bisection: the exact, slow way for rows whose kept tokens are too many to be listed.

Probabilities are integers: exp((x - max) / temperature) in units of 2^-44, truncated. Sums of integers do not depend
on their order, so every kernel agrees on every partial sum, runs repeat to the bit, and a comparison with a cumulative
probability is never a matter of rounding. 2^18 tokens add up to less than 2^62; a token less likely than 2^-44 times
the best one counts as impossible.

In descending order (ties by id) the kept tokens are a prefix, whichever cut-offs made it, so its total probability is
the least of what each cut-off leaves, and the chosen token is found from its cumulative probability alone.
"""

import triton
import triton.language as tl

from moejet.kernels.ordered_keys import ordered, ordered_value


@triton.jit
def inverse_temperature(temperature):
    """Finite, so that a distance of zero stays zero."""
    return tl.minimum(tl.div_rn(1.0, temperature), 3.0e38)


@triton.jit
def token_mass(x, largest, inverse_t):
    """int64; 2^44 for the largest logit."""
    return (tl.exp((x - largest) * inverse_t) * 17592186044416.0).to(tl.int64)


@triton.jit
def target_mass(u, total):
    """Where u in [0, 1) falls in [0, total)."""
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def share_of(part, total):
    """ceil(part * total) within 1..total: tokens are kept while what stands before them is less."""
    exact = part * total.to(tl.float64)
    floor = exact.to(tl.int64)
    share = floor + (exact > floor.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(share, 1), total)


@triton.jit
def _reaching(
    row_ptr, vocab_size, largest, inverse_t, goal, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest logit such that those at and above it number (or weigh) at least goal; number and mass above it."""
    low = tl.full([], -0x7F800001, tl.int64)  # -inf: everything
    high = ordered(largest).to(tl.int64) + 1
    count_above = tl.zeros([], tl.int32)
    mass_above = tl.zeros([], tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        threshold = ordered_value(middle.to(tl.int32))
        count = tl.zeros([BLOCK], tl.int32)
        mass = tl.zeros([BLOCK], tl.int64)
        for start in range(0, vocab_size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + cols, mask=cols < vocab_size, other=float("-inf")).to(tl.float32)
            reached = (x >= threshold) & (cols < vocab_size)
            count += reached.to(tl.int32)
            mass += tl.where(reached, token_mass(x, largest, inverse_t), 0)
        total_count = tl.sum(count, axis=0)
        total_mass = tl.sum(mass, axis=0)
        enough = total_mass >= goal
        if BY_COUNT:
            enough = total_count >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        count_above = tl.where(enough, count_above, total_count)
        mass_above = tl.where(enough, mass_above, total_mass)
    return ordered_value(low.to(tl.int32)), count_above, mass_above


@triton.jit
def _mass_of_at_least(row_ptr, vocab_size, largest, inverse_t, least, BLOCK: tl.constexpr):
    """Total of the tokens that weigh at least so much; 0: of all."""
    mass = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, mask=cols < vocab_size, other=float("-inf")).to(tl.float32)
        own = token_mass(x, largest, inverse_t)
        mass += tl.where(own >= least, own, 0)
    return tl.sum(mass, axis=0)


@triton.jit
def _nth_equal(row_ptr, vocab_size, value, n, BLOCK: tl.constexpr):
    """Index of the n-th element, from 0 on, that equals value."""
    found = tl.zeros([], tl.int32)
    seen = tl.zeros([], tl.int64)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, mask=cols < vocab_size, other=float("nan")).to(tl.float32)
        equal = (x == value).to(tl.int64)
        ranks = seen + tl.cumsum(equal, axis=0)
        found += tl.sum(tl.where((ranks == n + 1) & (equal > 0), cols, 0), axis=0)
        seen += tl.sum(equal, axis=0)
    return found


@triton.jit
def search_kernel(
    logits_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, tokens_ptr,
    stride_lb, vocab_size, UNDECIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decides the rows that are UNDECIDED; best_ptr [B] are keys of the rows' largest logits."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(tokens_ptr + row) == UNDECIDED:
        row_ptr = logits_ptr + row * stride_lb
        largest = ordered_value((tl.load(best_ptr + row) >> 32).to(tl.int32))
        inverse_t = inverse_temperature(tl.load(temperature_ptr + row))
        top_k = tl.load(top_k_ptr + row).to(tl.int64)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        kept = _mass_of_at_least(row_ptr, vocab_size, largest, inverse_t, 0, BLOCK)
        if (top_k > 0) & (top_k < vocab_size):
            value, count, mass = _reaching(
                row_ptr, vocab_size, largest, inverse_t, top_k, True, BLOCK
            )
            kept = mass + (top_k - count) * token_mass(value, largest, inverse_t)
        if top_p < 1.0:
            share = share_of(top_p, kept)
            value, count, mass = _reaching(
                row_ptr, vocab_size, largest, inverse_t, share, False, BLOCK
            )
            own = token_mass(value, largest, inverse_t)
            kept = tl.minimum(kept, mass + (share - mass + own - 1) // own * own)
        if min_p > 0.0:
            least = share_of(min_p, tl.full([], 1 << 44, tl.int64))
            mass = _mass_of_at_least(row_ptr, vocab_size, largest, inverse_t, least, BLOCK)
            kept = tl.minimum(kept, mass)
        target = target_mass(tl.load(uniform_ptr + row), kept)
        value, count, mass = _reaching(
            row_ptr, vocab_size, largest, inverse_t, target + 1, False, BLOCK
        )
        own = token_mass(value, largest, inverse_t)
        nth = (target - mass) // own
        tl.store(tokens_ptr + row, _nth_equal(row_ptr, vocab_size, value, nth, BLOCK))
