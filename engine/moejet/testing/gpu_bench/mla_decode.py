"""MLA decode: one query token per sequence over contexts of one length, in shuffled blocks of 64.

Bytes count every latent row once, queries and results too; FLOPs are those of the products. The peer is FlashInfer's
paged MLA where it is installed (bf16 cache), else the products and softmax in torch over contiguous latents in bf16,
where those fit into a fifth of the card's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from moejet.kernels.card import Card
from moejet.latent_layout import row_bytes, row_elements, scales_begin, scales_end
from moejet.ops.latent_rows import decode_latents
from moejet.ops.mla_decode import mla_decode
from moejet.testing.gpu_bench.case import Case, Run

RANK, ROPE, BLOCK = 512, 64, 64
SCALE = 192**-0.5


def cases(card: Card) -> Iterator[Case]:
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 24 << 30
    for heads in (16, 128):
        for batch in (1, 8, 32):
            for context in (4096, 32768, 131072):
                for kind in ("bf16", "fp8"):
                    tokens = batch * context
                    size = tokens * row_bytes(RANK, ROPE, kind)
                    if size > 0.6 * memory:
                        continue
                    operands = batch * heads * (RANK + ROPE + RANK) * 2
                    yield Case(
                        name=f"h{heads} b{batch} {context // 1024}K {kind}",
                        build=partial(build, heads, batch, context, kind, memory),
                        bytes=size + operands,
                        flops=2 * heads * tokens * (RANK + ROPE + RANK),
                    )


def build(heads: int, batch: int, context: int, kind: str, memory: int) -> tuple[Run, Run | None]:
    blocks = batch * context // BLOCK
    cache = random_cache(blocks, kind)
    tables = torch.randperm(blocks, device="cuda").int().view(batch, context // BLOCK)
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    q_latent = torch.randn(batch, heads, RANK, device="cuda", dtype=torch.bfloat16)
    q_pe = torch.randn(batch, heads, ROPE, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q_latent)

    def run() -> Tensor:
        return mla_decode(
            q_latent,
            q_pe,
            cache,
            tables,
            lens,
            query_len=1,
            scale=SCALE,
            max_context=context,
            out=out,
        )

    if kind == "bf16" and find_spec("flashinfer"):
        return run, flashinfer_peer(q_latent, q_pe, cache, tables, lens)
    if batch * context * (RANK + ROPE) * 2 > memory // 5:
        return run, None
    return run, torch_peer(q_latent, q_pe, cache, tables)


def random_cache(blocks: int, kind: str) -> Tensor:
    row = row_elements(RANK, ROPE, kind)
    if kind == "bf16":
        return torch.randn(blocks, BLOCK, row, device="cuda", dtype=torch.bfloat16)
    cache = torch.randint(0, 127, (blocks, BLOCK, row), device="cuda", dtype=torch.uint8)
    cache.view(torch.float32)[..., scales_begin(RANK) // 4 : scales_end(RANK) // 4] = 0.01
    cache.view(torch.bfloat16)[..., scales_end(RANK) // 2 :] = 0.5
    return cache


def torch_peer(q_latent: Tensor, q_pe: Tensor, cache: Tensor, tables: Tensor) -> Run:
    c_kv, k_pe = decode_latents(cache[tables.long()].flatten(1, 2), RANK, ROPE)
    keys = torch.cat((c_kv.bfloat16(), k_pe.bfloat16()), dim=-1)
    q = torch.cat((q_latent, q_pe), dim=-1)

    def run() -> Tensor:
        probs = torch.softmax(q @ keys.mT * SCALE, dim=-1)
        return probs @ keys[..., :RANK]

    return run


def flashinfer_peer(
    q_latent: Tensor, q_pe: Tensor, cache: Tensor, tables: Tensor, lens: Tensor
) -> Run:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    batch, blocks = tables.shape
    workspace = torch.empty(128 << 20, dtype=torch.int8, device="cuda")
    wrapper = BatchMLAPagedAttentionWrapper(workspace)
    steps = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    dtype = torch.bfloat16
    wrapper.plan(
        steps,
        steps * blocks,
        tables.flatten().contiguous(),
        lens,
        q_latent.shape[1],
        RANK,
        ROPE,
        BLOCK,
        False,
        SCALE,
        dtype,
        dtype,
    )
    c_kv, k_pe = cache[..., :RANK].contiguous(), cache[..., RANK:].contiguous()

    def run() -> Tensor:
        result: Tensor = wrapper.run(q_latent, q_pe, c_kv, k_pe)
        return result

    return run
