import pytest
import torch

from moejet.kernels.card import CARDS, pretend
from moejet.kernels.mla_decode import mla_decode
from moejet.kernels.mla_decode_plan import Tiles
from moejet.ops.latent_rows import encode_latents
from moejet.ops.mla_decode import mla_decode_ref
from moejet.prefix_groups import PrefixGroups
from moejet.testing.tolerances import assert_close

FP8 = torch.uint8
SMALL = Tiles(16, 32, 4, 3, 1)


def make_case(contexts, *, query_len, heads, rank, rope, block_size, cache_dtype, dtype, share=()):
    """Shuffled blocks, the rest of the cache NaN. share: (sequences, tokens of whole blocks in common)"""
    most = max(-(-max(contexts) // block_size), 1)
    num_blocks = len(contexts) * most + 3
    tables = torch.full((len(contexts), most + 1), -1, dtype=torch.int32)
    free = torch.randperm(num_blocks).tolist()
    for i, context in enumerate(contexts):
        for j in range(-(-context // block_size)):
            tables[i, j] = free.pop()
    for sequences, tokens in share:
        whole = tokens // block_size
        assert whole * block_size == tokens
        for sequence in sequences[1:]:
            tables[sequence, :whole] = tables[sequences[0], :whole]
    latents, ropes = (
        torch.randn(num_blocks, block_size, rank),
        torch.randn(num_blocks, block_size, rope),
    )
    written = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for i, context in enumerate(contexts):
        for j in range(context):
            written[tables[i, j // block_size], j % block_size] = True
    latents[~written] = ropes[~written] = torch.nan
    cache = encode_latents(latents, ropes, cache_dtype)
    tokens = len(contexts) * query_len
    q_latent = torch.randn(tokens, heads + 1, rank + 8).to(dtype)[:, :heads, :rank]
    q_pe = torch.randn(tokens, heads, rope * 2).to(dtype)[..., rope:]
    return q_latent, q_pe, cache, tables, torch.tensor(contexts, dtype=torch.int32)


def run(case, *, query_len, scale=0.2, max_context=None, **options):
    q_latent, _, _, _, context_lens = case
    out = torch.full(q_latent.shape, torch.nan)
    if max_context is None:
        max_context = max(1, int(context_lens.max()))
    returned = mla_decode(
        *case, query_len=query_len, scale=scale, max_context=max_context, out=out, **options
    )
    assert returned is out
    return out


def check(case, *, query_len, cache_dtype, dtype, **options):
    got = run(case, query_len=query_len, **options)
    expected = mla_decode_ref(*case, query_len=query_len, scale=0.2)
    assert_close(got, expected, "fp16" if torch.float16 in (cache_dtype, dtype) else "fp32")
    return got


RAGGED = [1, 70, 0, 33]


@pytest.mark.parametrize(
    ("cache_dtype", "dtype", "block_size"),
    [
        (torch.float32, torch.float32, 16),
        (torch.float16, torch.float16, 16),
        (torch.float16, torch.float16, 64),
        (FP8, torch.float16, 16),
        (FP8, torch.float16, 64),
    ],
)
@pytest.mark.parametrize(("query_len", "heads"), [(1, 20), (3, 4)])
def test_ragged_contexts(block_size, cache_dtype, dtype, query_len, heads):
    contexts = [0 if n == 0 else max(n, query_len) for n in RAGGED]
    case = make_case(
        contexts, query_len=query_len, heads=heads, rank=64, rope=16, block_size=block_size,
        cache_dtype=cache_dtype, dtype=dtype,
    )  # fmt: skip
    got = check(case, query_len=query_len, cache_dtype=cache_dtype, dtype=dtype)
    assert not got[2 * query_len : 3 * query_len].any()


def sized(contexts, **options):
    """A case of small heads, latents and blocks."""
    usual = {"query_len": 1, "heads": 4, "rank": 64, "rope": 16, "block_size": 16}
    types = {"cache_dtype": FP8, "dtype": torch.float16}
    return make_case(contexts, **usual | types | options)


@pytest.mark.parametrize("max_context", [300, 2000])
def test_many_splits_of_which_some_are_empty(max_context):
    case = sized([300, 5, 0, 261])
    check(case, query_len=1, cache_dtype=FP8, dtype=torch.float16, max_context=max_context)


@pytest.mark.parametrize("tiles", [Tiles(32, 64, 4, 3, 1), Tiles(64, 32, 8, 3, 1)])
def test_eight_query_tokens_in_every_shape_of_tile(tiles):
    case = sized([160, 8], query_len=8, heads=5, block_size=32)
    check(case, query_len=8, cache_dtype=FP8, dtype=torch.float16, tiles=tiles)


@pytest.mark.parametrize("cache_dtype", [torch.float16, FP8])
def test_real_latents_on_a_large_card(cache_dtype):
    case = sized(
        [150, 9], query_len=4, heads=6, rank=512, rope=64, block_size=64, cache_dtype=cache_dtype
    )
    with pretend(CARDS[90]):
        check(case, query_len=4, cache_dtype=cache_dtype, dtype=torch.float16)


def test_a_context_shorter_than_its_query_tokens():
    case = sized([2, 40], query_len=4)
    got = check(case, query_len=4, cache_dtype=FP8, dtype=torch.float16)
    assert not got[:2].any()


def test_tables_in_64_bits_and_an_empty_batch():
    q_latent, q_pe, cache, tables, lens = sized([40])
    check(
        (q_latent, q_pe, cache, tables.long(), lens),
        query_len=1,
        cache_dtype=FP8,
        dtype=torch.float16,
    )
    assert (
        run(
            (q_latent[:0], q_pe[:0], cache, tables[:0], lens[:0]), query_len=1, max_context=1
        ).shape[0]
        == 0
    )


def test_every_code_of_e4m3_is_exact():
    # One key each: the result is its values. NaN codes are never stored.
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F] + [0, 0], dtype=torch.uint8)
    q_latent, q_pe, cache, tables, lens = sized([1, 1], rank=128)
    for i in range(2):
        row = cache[tables[i, 0], 0]
        row[:128] = codes[i * 128 : (i + 1) * 128]
        row[128:132] = torch.tensor([1.0]).view(torch.uint8)
    got = run((q_latent, q_pe, cache, tables, lens), query_len=1)
    expected = codes.view(torch.float8_e4m3fn).float().view(2, 1, 128)
    assert torch.equal(got, expected.expand_as(got))


def test_fixed_splits_do_not_depend_on_the_batch():
    contexts = [140, 64, 0, 100]
    q_latent, q_pe, cache, tables, lens = case = sized(contexts, query_len=2)
    together = run(case, query_len=2, split_tokens=64)
    for i in range(len(contexts)):
        rows = slice(2 * i, 2 * i + 2)
        alone = q_latent[rows], q_pe[rows], cache, tables[i : i + 1], lens[i : i + 1]
        got = run(alone, query_len=2, split_tokens=64, max_context=300)
        assert torch.equal(got, together[rows])


GROUPS = [([4, 1, 5], 112), ([0, 3], 64)]
GROUPED_CONTEXTS = [70, 120, 33, 200, 150, 114, 0]


def grouped_case(**options):
    return sized(GROUPED_CONTEXTS, share=GROUPS, **options)


@pytest.mark.parametrize("split_tokens", [None, 64])
@pytest.mark.parametrize(("query_len", "heads"), [(1, 4), (2, 3)])
def test_groups_share_their_prefix(query_len, heads, split_tokens):
    case = grouped_case(query_len=query_len, heads=heads)
    groups = PrefixGroups.of([*GROUPS, ([], 0)], batch=len(GROUPED_CONTEXTS))
    got = check(
        case,
        query_len=query_len,
        cache_dtype=FP8,
        dtype=torch.float16,
        groups=groups,
        split_tokens=split_tokens,
    )
    assert not got[-query_len:].any()
    if split_tokens:
        assert torch.equal(got, run(case, query_len=query_len, split_tokens=split_tokens))


def test_a_context_beyond_the_longest_writes_into_no_other():
    case = sized([300, 100], share=[([0, 1], 64)])
    groups = PrefixGroups.of([([0, 1], 64)], batch=2)
    got = run(case, query_len=1, max_context=128, split_tokens=64, groups=groups)
    expected = mla_decode_ref(*case, query_len=1, scale=0.2)
    assert_close(got[1:], expected[1:], "fp16")


def test_index_tensors_that_lie_apart_are_refused():
    q_latent, q_pe, cache, tables, lens = sized([40, 70])
    with pytest.raises(AssertionError, match="block_tables"):
        run((q_latent, q_pe, cache, tables.T.contiguous().T, lens), query_len=1)
    with pytest.raises(AssertionError, match="tensor"):
        run((q_latent, q_pe, cache, tables, lens.repeat_interleave(2)[::2]), query_len=1)


def test_scratch_is_fp32_whatever_the_default_is():
    case = sized([300, 5], cache_dtype=torch.float32, dtype=torch.float32)
    expected = run(case, query_len=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        out = torch.empty(expected.shape, dtype=torch.float32)
        mla_decode(*case, query_len=1, scale=0.2, max_context=300, out=out)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected)


def test_a_prefix_is_read_from_the_first_member_alone():
    q_latent, q_pe, cache, tables, lens = grouped_case()
    groups = PrefixGroups.of(GROUPS, batch=len(GROUPED_CONTEXTS))
    expected = run((q_latent, q_pe, cache, tables, lens), query_len=1, groups=groups)
    for sequences, tokens in GROUPS:
        for sequence in sequences[1:]:
            tables[sequence, : tokens // 32 * 2] = 10**6  # what whole tiles cover
    got = run((q_latent, q_pe, cache, tables, lens), query_len=1, groups=groups, tiles=SMALL)
    assert torch.equal(got, expected)
