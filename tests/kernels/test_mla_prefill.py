"""Expanded latent attention in Triton: compiled ahead of time for every architecture, run on a GPU."""

import pytest
import torch

from moejet.ops.mla_prefill import mla_prefill, mla_prefill_chunked, mla_prefill_ref, plan_prefill
from moejet.testing.mla_inputs import MlaShape, random_inputs

pytest.importorskip("triton")

from moejet.kernels import mla_prefill as kernel
from moejet.kernels.card import CARDS
from moejet.testing.aot import assert_fits, launches_compiled_for

V3 = MlaShape(heads=128, nope=128, rope=64, value=128)  # V2-Lite's 16 heads are the same code
GLM_FLASH = MlaShape(heads=20, nope=192, rope=64, value=256)
PRODUCT = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # the others: mma.sync


@pytest.mark.parametrize(
    ("capability", "shape"),
    [*((capability, V3) for capability in CARDS), (86, GLM_FLASH)],
    ids=lambda value: f"sm{value}" if isinstance(value, int) else f"{value.nope}-{value.value}",
)
def test_compiles(capability, shape):
    def empty(*sizes, dtype=torch.bfloat16):
        return torch.empty(*sizes, dtype=dtype, device="meta")

    tokens, keys = 2048, 8192
    expanded = empty(keys, shape.heads, shape.nope + shape.value)
    with launches_compiled_for(CARDS[capability]) as compiled:
        for max_query_len in (tokens, 1, 300):
            kernel.mla_prefill(
                empty(tokens, shape.heads, shape.nope + shape.rope),
                expanded[..., : shape.nope],
                empty(keys, shape.rope),
                expanded[..., shape.nope :],
                empty(3, kernel.PIECE_COLUMNS, dtype=torch.int32),
                empty(tokens, shape.heads, shape.value),
                scale=0.1,
                max_query_len=max_query_len,
            )
    assert len({id(launch.asm) for launch in compiled}) == 1  # compiled once, not while serving
    assert_fits(compiled[0], CARDS[capability])
    # Scores and accumulators fill the registers; what spills are addresses, outside of the loop over full blocks.
    assert compiled[0].spilled <= 160
    ptx = compiled[0].asm["ptx"]
    assert PRODUCT.get(capability, "mma.sync") in ptx
    assert "cp.async" in ptx


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm{card.capability}")
def test_tiles_leave_room(card):
    """V3, GLM-4.7-Flash and wider heads: 128 queries where they fit, at least 64 wherever a model is real."""
    assert kernel._config(card, 2, 192, 128).block_m == 128
    assert kernel._config(card, 2, 256, 256).block_m == 128
    assert kernel._config(card, 2, 320, 256).block_m >= 64
    for width, value in ((192, 128), (256, 256), (320, 256), (576, 512)):
        config = kernel._config(card, 2, width, value)
        tiles = config.block_n * (width + value) * max(1, config.num_stages - 1)
        assert 2 * (config.block_m * width + tiles) <= card.shared_memory


# Per token, norm of the error over the norm of the output; expanded keys and probabilities are rounded to the dtype.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 2e-5}


def on_the_gpu(shape, **sizes):
    torch.manual_seed(0)
    inputs = random_inputs(shape, **sizes)
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def check(inputs, got):
    expected = mla_prefill_ref(**{**inputs, "q": inputs["q"].double()})
    error = (got.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert got.dtype == inputs["q"].dtype
    assert error.max() <= TOLERANCE[got.dtype], error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        MlaShape(heads=9, nope=128, rope=64, value=128),
        MlaShape(heads=4, nope=192, rope=64, value=256),
        MlaShape(heads=3, nope=256, rope=32, value=192),
        MlaShape(heads=2, nope=16, rope=8, value=24, rank=40),
    ],
    ids=lambda shape: f"{shape.nope}-{shape.rope}-{shape.value}",
)
@pytest.mark.parametrize("max_key_chunk", [100_000, 700])
def test_on_the_gpu(shape, dtype, max_key_chunk):
    inputs = on_the_gpu(
        shape,
        query_lens=[1, 130, 257, 0, 64, 1, 515],
        context_lens=[1, 130, 1000, 5, 4096, 2047, 515],
        dtype=dtype,
        cache="fp32" if dtype == torch.float32 else "bf16",
    )
    check(inputs, mla_prefill(**inputs, max_key_chunk=max_key_chunk))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [V3, MlaShape(heads=16, nope=128, rope=64, value=128)])
def test_fp8_cache_of_real_shapes(shape):
    inputs = on_the_gpu(
        shape, query_lens=[300, 2], context_lens=[1500, 900], dtype=torch.bfloat16, cache="fp8"
    )
    check(inputs, mla_prefill(**inputs, max_key_chunk=1024))


@pytest.mark.gpu
def test_scores_of_any_size():
    inputs = on_the_gpu(
        MlaShape(heads=2, nope=128, rope=64, value=128),
        query_lens=[200],
        context_lens=[500],
        dtype=torch.float32,
    )
    inputs["q"] *= 1e4
    got = mla_prefill(**inputs, max_key_chunk=128)
    assert got.isfinite().all()
    expected = mla_prefill_ref(**inputs)
    # A product of 1e4 that is wrong by 1e-3 changes which of two near keys counts.
    close = (got - expected).flatten(1).norm(dim=1) < 0.1 * expected.flatten(1).norm(dim=1)
    assert close.float().mean() > 0.95


@pytest.mark.gpu
def test_waits_for_nothing_and_runs_in_a_graph():
    inputs = on_the_gpu(
        MlaShape(heads=16, nope=128, rope=64, value=128),
        query_lens=[200, 100],
        context_lens=[900, 100],
        dtype=torch.bfloat16,
        cache="fp8",
    )
    expected = mla_prefill(**inputs, max_key_chunk=512)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = mla_prefill(**inputs, max_key_chunk=512)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, expected)

    lens = inputs.pop("query_lens"), inputs.pop("context_lens")
    plan = plan_prefill(*lens, max_key_chunk=512, device=inputs["q"].device)
    mla_prefill_chunked(**inputs, plan=plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mla_prefill_chunked(**inputs, plan=plan)
    got.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(got, expected)
