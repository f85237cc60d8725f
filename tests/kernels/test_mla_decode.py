"""The Triton MLA decode: compiled ahead of time for every architecture, run on a GPU."""

import re

import pytest
import torch

from moejet.ops.latent_rows import encode_latents
from moejet.ops.mla_decode import mla_decode, mla_decode_ref
from moejet.prefix_groups import PrefixGroups
from moejet.testing.tolerances import assert_close

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.mla_decode import mla_decode as launch
from moejet.testing.aot import assert_fits, launches_compiled_for

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
RANK, ROPE = 512, 64


def compile_for(card, heads, query_len, cache_dtype, *, block_size=64, groups=None):
    def meta(*shape, dtype=BF16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    tokens = 8 * query_len
    with launches_compiled_for(card) as compiled:
        launch(
            meta(tokens, heads, RANK),
            meta(tokens, heads, ROPE),
            meta(1024, block_size, 656 if cache_dtype == FP8 else RANK + ROPE, dtype=cache_dtype),
            meta(8, 2048, dtype=torch.int32),
            meta(8, dtype=torch.int32),
            query_len=query_len,
            scale=0.1,
            max_context=131072,
            out=meta(tokens, heads, RANK),
            groups=groups,
        )
    for kernel in compiled:
        assert_fits(kernel, card)
    return compiled


# Bytes of stack per thread. On SM90 and above, 128 (64) registers of accumulators leave too few for everything:
# Triton 3.6 spills up to 56 bytes, 3.9 up to what stands here.
@pytest.mark.parametrize(
    ("capability", "heads", "query_len", "cache_dtype", "spilled"),
    [
        (80, 16, 1, BF16, 0),
        (80, 128, 4, FP8, 0),
        (86, 128, 1, BF16, 0),
        (89, 16, 4, FP8, 0),
        (120, 128, 1, FP8, 32),
        (90, 20, 1, BF16, 200),
        (90, 128, 4, BF16, 96),
        (90, 128, 1, FP8, 560),
        (100, 128, 1, FP8, 32),
    ],
)
def test_compiles(capability, heads, query_len, cache_dtype, spilled):
    card = CARDS[capability]
    decode, merge = compile_for(card, heads, query_len, cache_dtype)
    assert decode.spilled <= spilled
    assert merge.spilled == 0
    # Tensor cores do the products, wgmma where it exists and 64 rows come together.
    wgmma = capability == 90 and heads * query_len > 32
    assert ("wgmma.mma_async" if wgmma else "mma.sync") in decode.asm["ptx"]
    if cache_dtype == BF16:  # fetched 16 bytes at a time under the computation before
        assert set(re.findall(r"cp\.async\.c[ag]\S* [^,]*, [^,]*, (\w+)", decode.asm["ptx"])) == {
            "0x10"
        }
        assert re.search(r"cp\.async\.wait_group\s+[1-9]", decode.asm["ptx"])


def test_compiles_for_groups_and_small_blocks():
    def ids(size):
        return torch.empty(size, dtype=torch.int32, device="meta")

    groups = PrefixGroups(ids(3), ids(8), ids(2), ids(8), max_members=4, max_shared=4096)
    decode, _ = compile_for(CARDS[89], 16, 1, BF16, block_size=16, groups=groups)
    assert decode.spilled == 0


def make_case(contexts, *, query_len, heads, block_size, cache_dtype, dtype, shared=0):
    """Shuffled blocks; the first `shared` tokens of sequences 0 and 2 are the same. Unwritten rows are NaN."""
    most = -(-max(contexts) // block_size)
    tables = torch.randperm(len(contexts) * most).view(len(contexts), most).int()
    tables[2, : shared // block_size] = tables[0, : shared // block_size]
    latents = torch.full((len(contexts) * most, block_size, RANK + ROPE), torch.nan)
    for table, context in zip(tables, contexts, strict=True):
        rows = torch.arange(context)
        latents[table[rows // block_size].long(), rows % block_size] = torch.randn(
            context, RANK + ROPE
        )
    cache = encode_latents(latents[..., :RANK], latents[..., RANK:], cache_dtype).cuda()
    tokens = len(contexts) * query_len
    q_latent = torch.randn(tokens, heads, RANK, device="cuda").to(dtype)
    q_pe = torch.randn(tokens, heads, 2 * ROPE, device="cuda").to(dtype)[..., ROPE:]
    lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return q_latent, q_pe, cache, tables.cuda(), lens


CONTEXTS = [3000, 9, 1700, 0, 64, 4097]


def run(case, query_len, max_context=4097, **options):
    out = torch.full(case[0].shape, torch.nan, device="cuda")
    return mla_decode(
        *case, query_len=query_len, scale=192**-0.5, max_context=max_context, out=out, **options
    )


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize(
    ("cache_dtype", "dtype"), [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP8, BF16), (FP8, FP16)]
)
@pytest.mark.parametrize(
    ("heads", "query_len"), [(16, 1), (16, 4), (20, 1), (64, 2), (128, 1), (128, 8)]
)
def test_on_the_gpu(heads, query_len, cache_dtype, dtype, block_size):
    case = make_case(
        CONTEXTS,
        query_len=query_len,
        heads=heads,
        block_size=block_size,
        cache_dtype=cache_dtype,
        dtype=dtype,
    )
    expected = mla_decode_ref(*case, query_len=query_len, scale=192**-0.5)
    name = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}[dtype]
    for options in ({}, {"split_tokens": 512}, {"max_context": 262144}):
        assert_close(run(case, query_len, **options), expected, name, what=str(options))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [BF16, FP8])
@pytest.mark.parametrize(("heads", "query_len"), [(16, 1), (128, 2)])
def test_groups_on_the_gpu(heads, query_len, cache_dtype):
    case = make_case(
        CONTEXTS,
        query_len=query_len,
        heads=heads,
        block_size=64,
        cache_dtype=cache_dtype,
        dtype=BF16,
        shared=1600,
    )
    expected = mla_decode_ref(*case, query_len=query_len, scale=192**-0.5)
    groups = PrefixGroups.of([([2, 0], 1600), ([], 0)], batch=len(CONTEXTS), device="cuda")
    assert_close(run(case, query_len, groups=groups), expected, "bf16")
    fixed = run(case, query_len, groups=groups, split_tokens=256)
    assert_close(fixed, expected, "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [BF16, FP8])
@pytest.mark.parametrize("heads", [16, 128])
def test_fixed_splits_do_not_depend_on_the_batch_on_the_gpu(heads, cache_dtype):
    case = make_case(
        CONTEXTS, query_len=1, heads=heads, block_size=64, cache_dtype=cache_dtype, dtype=BF16
    )
    q_latent, q_pe, cache, tables, lens = case
    together = run(case, 1, split_tokens=256)
    for i in range(len(CONTEXTS)):
        alone = q_latent[i : i + 1], q_pe[i : i + 1], cache, tables[i : i + 1], lens[i : i + 1]
        assert torch.equal(run(alone, 1, split_tokens=256), together[i : i + 1])


@pytest.mark.gpu
def test_a_captured_launch_follows_the_lengths():
    case = make_case(CONTEXTS, query_len=1, heads=16, block_size=64, cache_dtype=BF16, dtype=BF16)
    lens = case[4]
    out = run(case, 1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_decode(*case, query_len=1, scale=192**-0.5, max_context=4097, out=out)
    lens.copy_(torch.tensor([2500, 0, 1, 0, 17, 4000], dtype=torch.int32))
    out.fill_(torch.nan)
    graph.replay()
    assert_close(out, mla_decode_ref(*case, query_len=1, scale=192**-0.5), "bf16")
