"""The recorded forward pass: a small program against torch, steps of all sizes, refused steps."""

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.latent_layout import row_elements
from moejet.ops.latent_rows import CACHE_TYPES, decode_latents

MAX_TOKENS, VOCAB, HIDDEN, HEADS, NOPE, ROPE, RANK, VALUE = 40, 50, 48, 3, 8, 4, 20, 6
BLOCKS, BLOCK_SIZE = 12, 4


class Small:
    """embed, norm, q and latent projections, rope and cache, attention, output projection, norm, logits."""

    def __init__(self, pool: _C.ThreadPool, isa: str, cache_dtype: str = "fp32") -> None:
        generator = torch.Generator().manual_seed(0)
        self.sources: dict[str, Tensor] = {}

        def packed(name: str, num: int, rows: int, cols: int) -> _C.LinearWeights:
            w = (torch.randn(num, rows, cols, generator=generator) / cols**0.5).bfloat16().float()
            weights = _C.LinearWeights(num, rows, cols, "bf16")
            for g in range(num):
                weights.set(g, w[g].contiguous())
            self.sources[name] = w.double()
            return weights

        self.table = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.cos_sin = torch.randn(BLOCKS * BLOCK_SIZE, ROPE, generator=generator)
        width = row_elements(RANK, ROPE, cache_dtype)
        self.cache = torch.zeros(BLOCKS, BLOCK_SIZE, width, dtype=CACHE_TYPES[cache_dtype])
        self.h, x = torch.empty(MAX_TOKENS, HIDDEN), torch.empty(MAX_TOKENS, HIDDEN)
        # q and the latent share one wide buffer: operations take columns of it.
        wide = torch.empty(MAX_TOKENS, HEADS * (NOPE + ROPE) + RANK + ROPE)
        q, latent = wide[:, : HEADS * (NOPE + ROPE)], wide[:, HEADS * (NOPE + ROPE) :]
        mixed, delta = torch.empty(MAX_TOKENS, HEADS * VALUE), torch.empty(MAX_TOKENS, HIDDEN)
        ones = torch.ones(HIDDEN)
        bias = torch.randn(HEADS * (NOPE + ROPE), generator=generator)
        self.bias = bias
        program = _C.Program(pool, MAX_TOKENS, isa)
        program.embed(self.table, self.h)
        program.rms_norm(self.h, [], ones, 1e-6, x, False)
        program.linear(
            [
                (packed("q", 1, HEADS * (NOPE + ROPE), HIDDEN), bias, x, q),
                (packed("latent", 1, RANK + ROPE, HIDDEN), None, x, latent),
            ]
        )
        program.rope_and_store(
            q, HEADS, latent, RANK, torch.ones(RANK), 1e-6, self.cos_sin, True, self.cache
        )
        uk = packed("uk", HEADS, NOPE, RANK)
        uk_transposed = _C.LinearWeights(HEADS, RANK, NOPE, "bf16")
        for g in range(HEADS):
            uk_transposed.set(g, self.sources["uk"][g].T.float().contiguous())
        uv = packed("uv", HEADS, VALUE, RANK)
        program.attention(uk_transposed, uk, uv, q, self.cache, mixed, 0.3)
        program.linear([(packed("o", 1, HIDDEN, HEADS * VALUE), None, mixed, delta)])
        program.rms_norm(self.h, [delta], ones, 1e-6, x, True)
        program.lm_head(packed("head", 1, VOCAB, HIDDEN), x)
        self.program = program

    def run(self, ids: list[int], start: int, blocks: list[int], wanted: list[int]) -> Tensor:
        """One request whose next tokens are ids; returns the logits of the rows `wanted`."""
        positions = torch.arange(start, start + len(ids))
        table = torch.tensor([blocks])
        columns = (positions // BLOCK_SIZE).clamp(max=len(blocks) - 1)
        slots = table[0, columns] * BLOCK_SIZE + positions % BLOCK_SIZE
        logits = torch.full((len(wanted), VOCAB), float("nan"))
        self.program.run(
            torch.tensor(ids, dtype=torch.int64),
            positions,
            slots,
            torch.tensor([len(ids)]),
            torch.tensor([start + len(ids)]),
            table,
            torch.tensor(wanted, dtype=torch.int64),
            logits,
        )
        return logits

    def truth(self, ids: list[int]) -> Tensor:
        """Logits of every position in float64."""

        def norm(v: Tensor) -> Tensor:
            return v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

        def rotate(v: Tensor) -> Tensor:
            cos, sin = self.cos_sin[: len(ids)].double().chunk(2, dim=-1)
            while cos.dim() < v.dim():
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            a, b = v[..., 0::2], v[..., 1::2]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        w = self.sources
        h = self.table[ids].double()
        x = norm(h)
        q = (x @ w["q"][0].T + self.bias.double()).view(len(ids), HEADS, NOPE + ROPE)
        latent = x @ w["latent"][0].T
        c_kv, k_pe = norm(latent[:, :RANK]), rotate(latent[:, RANK:])
        keys = torch.einsum("sc,hnc->shn", c_kv, w["uk"])
        scores = torch.einsum("thn,shn->hts", q[..., :NOPE], keys)
        scores = scores + torch.einsum("thr,sr->hts", rotate(q[..., NOPE:]), k_pe)
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        probs = (scores * 0.3).masked_fill(mask, float("-inf")).softmax(-1)
        values = torch.einsum("sc,hvc->shv", c_kv, w["uv"])
        mixed = torch.einsum("hts,shv->thv", probs, values).flatten(1)
        return norm(h + mixed @ w["o"][0].T) @ w["head"][0].T


IDS = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
TABLE = [7, 2, 11, 0, 5, 3, 9, 1]


@pytest.mark.parametrize("chunks", [[30], [1] * 30, [13, 1, 16], [29, 1]])
def test_program_matches_torch(chunks: list[int], pool: _C.ThreadPool, isa: str) -> None:
    small, done = Small(pool, isa), 0
    expected = small.truth(IDS)
    for chunk in chunks:
        got = small.run(IDS[done : done + chunk], done, TABLE, list(range(chunk)))
        limit = 2e-2 if _C.min_tile_rows("bf16", isa) else 1e-4
        assert float((got.double() - expected[done : done + chunk]).abs().max()) < limit
        done += chunk


@pytest.mark.parametrize("chunks", [[30], [13, 1, 16]])
def test_program_over_an_fp8_cache(chunks: list[int], pool: _C.ThreadPool, isa: str) -> None:
    """As over the fp32 cache, up to what fp8 costs; the cache holds that one's values, rounded."""
    small, exact, done = Small(pool, isa, "fp8"), Small(pool, isa), 0
    for chunk in chunks:
        ids, wanted = IDS[done : done + chunk], list(range(chunk))
        got, expected = (s.run(ids, done, TABLE, wanted) for s in (small, exact))
        assert float((got - expected).norm() / expected.norm()) < 0.03
        done += chunk
    used = torch.tensor(TABLE[:7])
    values = torch.cat(decode_latents(small.cache, RANK, ROPE), -1)[used]
    torch.testing.assert_close(values, exact.cache[used], rtol=0.07, atol=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_latents_reach_the_logits(bad: float, pool: _C.ThreadPool, isa: str) -> None:
    """Not as finite numbers: neither with the token that brought them nor with later ones that see it."""
    small = Small(pool, isa, "fp8")
    clean = small.run(IDS[:20], 0, TABLE, [19])
    small.table[IDS[5], 3] = bad
    later = [token for token in IDS[6:20] if token != IDS[5]]
    assert small.run(IDS[:6], 0, TABLE, [5]).isnan().all()
    assert small.run(later, 6, TABLE, list(range(len(later)))).isnan().all()
    small.table[IDS[5], 3] = 1.0
    assert small.run(IDS[:20], 0, TABLE, [19]).isfinite().all()
    assert clean.isfinite().all()


def test_only_wanted_rows_are_computed(pool: _C.ThreadPool) -> None:
    small = Small(pool, "auto")
    everything = small.run(IDS, 0, TABLE, list(range(30)))
    # Tile kernels compute many rows in bf16, and two in fp32.
    atol = 2e-2 if _C.min_tile_rows("bf16") else 1e-5
    torch.testing.assert_close(
        small.run(IDS, 0, TABLE, [3, 29]), everything[[3, 29]], atol=atol, rtol=1e-5
    )
    assert small.run(IDS, 0, TABLE, []).shape == (0, VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [*IDS, VOCAB]}, r"token_ids\[30\]=50 must be between 0 and 49"),
        ({"ids": IDS + IDS[:15]}, "45 tokens: this program takes at most 40"),
        ({"ids": []}, "token_ids is empty|query_lens"),
        ({"blocks": TABLE[:7]}, "needs 8 blocks, block_tables has 7"),
        ({"blocks": [7, 2, 11, 0, 5, 3, 12, 1]}, "names block 12 of 12|slot_mapping"),
        ({"blocks": [7, 2, 11, 0, 5, 3, -1, 1]}, "names block -1|slot_mapping"),
        ({"wanted": [30]}, r"logits_indices\[0\]=30"),
        ({"start": 30}, r"positions\[18\]=48 must be between 0 and 47"),
    ],
)
def test_refused_steps(change: dict[str, object], message: str, pool: _C.ThreadPool) -> None:
    step = {"ids": IDS, "start": 0, "blocks": TABLE, "wanted": [29], **change}
    small = Small(pool, "auto")
    with pytest.raises(ValueError, match=message):
        small.run(**step)  # type: ignore[arg-type]
    small.run(IDS, 0, TABLE, [29])  # the program is intact


def test_wrong_buffers_are_refused(pool: _C.ThreadPool) -> None:
    program = _C.Program(pool, 8, "auto")
    with pytest.raises(ValueError, match="max_tokens"):
        program.embed(torch.zeros(5, 16), torch.zeros(7, 16))
    with pytest.raises(ValueError, match="out"):
        program.embed(torch.zeros(5, 16), torch.zeros(8, 15))
    with pytest.raises(ValueError, match="max_tokens=0"):
        _C.Program(pool, 0, "auto")
