"""Batches on a device: padding stands for nothing, whatever was there before."""

import torch

from moejet.batch import Batch
from moejet.device_batch import DeviceBatch, PaddedBatch, padded_sizes
from moejet.request import Request, SamplingParams

CPU = torch.device("cpu")


def _request(num_tokens: int, num_computed: int, first_block: int) -> Request:
    request = Request(
        request_id=f"r{first_block}",
        index=0,
        prompt_token_ids=tuple(range(num_tokens)),
        params=SamplingParams(),
        seed=0,
        max_total_tokens=100,
        eos_token_ids=frozenset(),
    )
    request.num_computed_tokens = num_computed
    request.block_table = list(range(first_block, first_block + 5))
    return request


def _batch(*requests: Request) -> Batch:
    lens = [len(r.token_ids) - r.num_computed_tokens for r in requests]
    return Batch.build(list(requests), lens, block_size=4)


def test_sizes():
    assert padded_sizes(1) == (1,)
    assert padded_sizes(3) == (1, 2, 4)
    assert padded_sizes(5) == (1, 2, 4, 8)
    assert padded_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)


def test_padding_after_a_fuller_batch():
    embedding = torch.randn(40, 6)
    padded = PaddedBatch(4, embedding, CPU, max_context=64, max_blocks=16)
    padded.fill(_batch(*(_request(7 + i, 6 + i, 5 * i + 1) for i in range(4))))
    padded.staging.upload()
    padded.fill(_batch(_request(9, 8, 3)))
    padded.staging.upload()
    there = padded.batch()
    assert torch.equal(there.embeddings[0], embedding[8])
    assert not there.embeddings[1:].any()
    assert there.positions.tolist() == [8, 0, 0, 0]
    assert there.slot_mapping.tolist() == [5 * 4, -1, -1, -1]
    assert there.padding.tolist() == [False, True, True, True]
    [part] = there.attending
    assert part.context_lens_tensor.tolist() == [9, 0, 0, 0]
    assert part.block_tables[0].tolist() == [3, 4, 5, 6, 7] + [-1] * 11
    assert (part.block_tables[1:] == -1).all()
    assert part.rows is None
    assert part.prefill is None


def test_rows_without_a_request_are_greedy_again():
    padded = PaddedBatch(2, torch.randn(40, 6), CPU, max_context=64, max_blocks=16)
    random = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    padded.fill_choice([0, 1], [random, random], [0.25, 0.5])
    padded.fill_choice([1], [SamplingParams(temperature=2.0)], [0.75])
    padded.staging.upload()
    columns = padded.sampling(is_random=True, has_cut_offs=True)
    assert columns.temperature.tolist() == [0.0, 2.0]
    assert columns.top_k.tolist()[1] == 0
    assert columns.top_p.tolist()[1] == 1.0
    assert columns.min_p.tolist()[1] == 0.0
    assert columns.uniforms.tolist()[1] == 0.75


def test_single_tokens_and_prompts_attend_apart():
    batch = _batch(_request(12, 0, 1), _request(9, 8, 6), _request(13, 4, 11), _request(3, 2, 16))
    there = DeviceBatch.of(batch, torch.randn(40, 6), CPU, max_context=64, max_key_chunk=16)
    absorbed, expanded = there.attending
    assert absorbed.rows.tolist() == [12, 22]
    assert absorbed.query_lens == [1, 1]
    assert absorbed.context_lens_tensor.tolist() == [9, 3]
    assert absorbed.block_tables[:, 0].tolist() == [6, 16]
    assert expanded.rows.tolist() == [*range(12), *range(13, 22)]
    assert expanded.query_lens == [12, 9]
    assert expanded.context_lens == [12, 13]
    assert expanded.prefill is not None
    assert len(expanded.prefill.chunks) == 2
    assert there.logits_indices.tolist() == [11, 12, 21, 22]
    assert there.padding is None


def test_short_queries_of_one_length_are_absorbed():
    batch = _batch(_request(12, 4, 1), _request(9, 1, 6))
    there = DeviceBatch.of(batch, torch.randn(40, 6), CPU, max_context=64, max_key_chunk=16)
    [part] = there.attending
    assert part.prefill is None
    assert part.rows is None
    assert part.query_lens == [8, 8]
