"""Times an engine without tokenizer and sampling: prompts, generation at any depth, and overhead.

A context of some depth is not computed but filled with random latents: the time of a step depends on
how many tokens are in the cache, not on their values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from moejet.batch import Batch
from moejet.engine import Engine
from moejet.ops.latent_rows import encode_latents
from moejet.request import Request, SamplingParams
from moejet.validation import require_int

_OVERHEAD_STEPS = 16
MAX_BATCH = 4096  # sequences


def time_prefill(engine: Engine, num_tokens: int, depth: int) -> float:
    """Seconds to compute num_tokens of prompt behind `depth` tokens."""
    with scratch_requests(engine, num_tokens, depth, batch=1) as requests:
        start = time.perf_counter()
        while requests[0].num_computed_tokens < depth + num_tokens:
            left = depth + num_tokens - requests[0].num_computed_tokens
            compute_tokens(engine, requests, min(engine.config.max_batch_tokens, left))
        return time.perf_counter() - start


def time_decode(engine: Engine, num_tokens: int, depth: int, batch: int) -> float:
    """Seconds to decode num_tokens one after another in each of `batch` sequences, all together."""
    with scratch_requests(engine, num_tokens, depth, batch) as requests:
        start = time.perf_counter()
        for _ in range(num_tokens):
            compute_tokens(engine, requests, 1)
        return time.perf_counter() - start


def step_overhead(engine: Engine, batch: int) -> float:
    """Seconds per token of `Engine.step` outside the runner's native execution; median of some steps.

    `batch` sequences are generated greedily from prompts of one token.
    """
    require_int("batch", batch, 1, MAX_BATCH)
    assert not engine.has_work, "other requests would take part in the steps"
    steps = min(_OVERHEAD_STEPS, engine.max_context - 2)
    params = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
    for _ in range(batch):
        engine.add_request([0], params)
    engine.step()  # the prompts
    samples: list[float] = []
    while engine.has_work:
        start, native_s = time.perf_counter(), engine.runner.native_seconds
        engine.step()
        took_s = time.perf_counter() - start
        samples.append(took_s - (engine.runner.native_seconds - native_s))
    return statistics.median(samples) / batch


@contextmanager
def scratch_requests(
    engine: Engine, num_tokens: int, depth: int, batch: int
) -> Iterator[list[Request]]:
    """`batch` requests of random tokens outside the schedule, `depth` of them in the cache already."""
    require_int("num_tokens", num_tokens, 1, engine.max_context)
    require_int("depth", depth, 0, engine.max_context - num_tokens, "both have to fit max_context")
    require_int("batch", batch, 1, MAX_BATCH)
    generator = torch.Generator().manual_seed(0)
    vocab = engine.model_config.vocab_size
    with ExitStack() as stack:
        requests = []
        for _ in range(batch):
            ids = torch.randint(0, vocab, (depth + num_tokens,), generator=generator).tolist()
            requests.append(stack.enter_context(engine.scratch_request(ids)))
        if depth:
            needed = engine.block_pool.num_blocks_for(depth)
            blocks = [block for r in requests for block in r.block_table[:needed]]
            c = engine.model_config
            fill_latents(engine.runner.latent_cache, blocks, c.kv_lora_rank, c.qk_rope_head_dim)
        for request in requests:
            request.num_computed_tokens = depth
        yield requests


def fill_latents(latent_cache: torch.Tensor, blocks: list[int], rank: int, rope: int) -> None:
    """Random latents of unit size into these blocks, the same ones in each layer."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(blocks), latent_cache.shape[2], rank + rope)
    drawn = torch.randn(shape, generator=generator)
    values = encode_latents(drawn[..., :rank], drawn[..., rank:], latent_cache.dtype)
    values = values.to(latent_cache.device)
    for layer in latent_cache:
        layer[blocks] = values


def compute_tokens(engine: Engine, requests: list[Request], num_tokens: int) -> None:
    """Computes the next num_tokens of each request, with the logits of its last one."""
    size = engine.config.block_size
    batch = Batch.build(requests, [num_tokens] * len(requests), block_size=size)
    batch.logits_indices = torch.arange(1, len(requests) + 1) * num_tokens - 1
    engine.runner.execute(batch)
    for request in requests:
        request.num_computed_tokens += num_tokens
