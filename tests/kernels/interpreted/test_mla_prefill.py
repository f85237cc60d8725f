import pytest
import torch

from moejet.kernels.mla_prefill import Config, _blocks, mla_prefill
from moejet.ops.mla_prefill import mla_prefill_chunked, mla_prefill_ref, plan_prefill
from moejet.testing.mla_inputs import MlaShape, random_inputs

SMALL = Config(16, 16, 4, 1)
TINY = MlaShape(heads=2, nope=16, rope=8, value=24, rank=20)
# Interpreted in the inputs' precision against float64: rounding of p, of the expanded keys and of the output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3}


def attend(inputs, max_key_chunk, monkeypatch, config=SMALL):
    monkeypatch.setattr("moejet.kernels.mla_prefill._config", lambda *_: config)
    plan = plan_prefill(
        inputs["query_lens"],
        inputs["context_lens"],
        max_key_chunk=max_key_chunk,
        device=torch.device("cpu"),
    )
    sizes = {name: inputs[name] for name in ("rank", "rope_dim", "value_dim", "scale")}
    tensors = (inputs[name] for name in ("q", "w_ukv", "latent_cache", "block_tables"))
    return mla_prefill_chunked(*tensors, plan, **sizes)


def check(inputs, got):
    tolerance = TOLERANCE[inputs["q"].dtype]
    torch.testing.assert_close(got, mla_prefill_ref(**inputs), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "cache"), [(torch.float32, "fp32"), (torch.float16, "fp8")])
def test_ragged_batch_in_chunks(dtype, cache, monkeypatch):
    # Whole prompts, a long prefix that spans chunks, one query, no query, a diagonal that crosses chunks.
    inputs = random_inputs(
        TINY, query_lens=[5, 3, 1, 0, 21], context_lens=[5, 50, 20, 9, 40], dtype=dtype, cache=cache
    )
    for max_key_chunk in (1000, 24):
        check(inputs, attend(inputs, max_key_chunk, monkeypatch))


@pytest.mark.parametrize(
    ("nope", "rope", "value"),
    [(48, 16, 48), (20, 6, 17), (128, 64, 128), (192, 64, 256)],
)
def test_head_dimensions(nope, rope, value, monkeypatch):
    shape = MlaShape(heads=2, nope=nope, rope=rope, value=value, rank=32)
    inputs = random_inputs(shape, query_lens=[19], context_lens=[40], dtype=torch.float32)
    check(inputs, attend(inputs, 24, monkeypatch))


def test_blocks_of_heads_and_queries_of_different_sizes(monkeypatch):
    # 9 heads are a group of 8 and one more; a step of 128 keys with masked steps of 64.
    shape = MlaShape(heads=9, nope=16, rope=8, value=16, rank=16)
    inputs = random_inputs(shape, query_lens=[40, 3], context_lens=[240, 3], dtype=torch.float32)
    check(inputs, attend(inputs, 4096, monkeypatch, Config(32, 128, 4, 1)))


def test_plan_keeps_short_requests_whole():
    plan = plan_prefill(
        [4, 4, 2, 0, 1], [6, 6, 25, 7, 2], max_key_chunk=10, device=torch.device("cpu")
    )
    rows = [chunk.pieces.tolist() for chunk in plan.chunks]
    assert rows == [
        [[0, 0, 4, 0, 6, 0, 2, 0]],
        [[1, 4, 4, 0, 6, 0, 2, 0]],
        [[2, 8, 2, 0, 10, 0, 23, 2]],
        [[2, 8, 2, 0, 10, 10, 13, 3]],
        [[2, 8, 2, 0, 5, 20, 3, 1], [4, 10, 1, 5, 2, 0, 1, 0]],
    ]
    assert plan.splits
    assert [chunk.num_keys for chunk in plan.chunks] == [6, 6, 10, 10, 7]
    assert plan_prefill([], [], max_key_chunk=8, device=torch.device("cpu")).chunks == ()


def test_queries_that_see_nothing_and_rows_that_are_not_its_own():
    """Two queries before the first key; other tokens' outputs stay untouched, strided rows are read right."""
    q = torch.randn(6, 1, 40)[..., :24]
    k_pe, kv = torch.randn(5, 8), torch.randn(5, 1, 40)
    out, lse = torch.full((6, 1, 24), torch.nan), torch.full((6, 1), torch.nan)
    pieces = torch.tensor([[0, 1, 4, 1, 3, 0, -2, 0]], dtype=torch.int32)
    mla_prefill(
        q, kv[..., :16], k_pe, kv[..., 16:], pieces, out, scale=0.3, max_query_len=4, lse=lse,
        config=SMALL,
    )  # fmt: skip
    assert out[[0, 5]].isnan().all()
    assert lse[[0, 5]].isnan().all()
    assert (out[[1, 2]] == 0).all()
    assert (lse[[1, 2]] == -torch.inf).all()
    keys = torch.cat((kv[1:4, 0, :16], k_pe[1:4]), dim=-1)
    for row, seen in ((3, 1), (4, 2)):
        scores = (keys[:seen] @ q[row, 0]) * 0.3
        expected = torch.softmax(scores, 0) @ kv[1 : 1 + seen, 0, 16:]
        torch.testing.assert_close(out[row, 0], expected)
        torch.testing.assert_close(lse[row, 0], torch.logsumexp(scores, 0))


def test_large_scores_do_not_overflow(monkeypatch):
    inputs = random_inputs(TINY, query_lens=[20], context_lens=[50], dtype=torch.float32)
    inputs["q"] *= 1000
    got = attend(inputs, 16, monkeypatch)
    torch.testing.assert_close(got, mla_prefill_ref(**inputs), atol=2e-3, rtol=2e-3)


def test_no_queries(monkeypatch):
    inputs = random_inputs(TINY, query_lens=[0], context_lens=[4], dtype=torch.float32)
    assert attend(inputs, 8, monkeypatch).shape == (0, 2, 24)


@pytest.mark.parametrize(
    ("width", "blocks"),
    [(8, (16, 0)), (24, (32, 0)), (128, (128, 0)), (192, (128, 64)), (200, (128, 128)),
     (256, (128, 128)), (100, (128, 0)), (80, (64, 16))],
)  # fmt: skip
def test_blocks_cover_a_row(width, blocks):
    assert _blocks(width) == blocks
