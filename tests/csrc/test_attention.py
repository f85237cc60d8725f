"""_C.mla_attention against float64, and what must hold whatever the numbers are."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.ops.latent_rows import decode_latents, encode_latents

FORMS = ("absorbed", "expanded")
DTYPES = (torch.float32, torch.bfloat16, torch.uint8)  # uint8: rows of fp8
EXACT = ("scalar", "avx2", "avx512")  # fp32 products everywhere


@dataclass
class Shape:
    heads: int
    nope: int
    rope: int
    rank: int
    value: int
    block: int = 16

    @property
    def latent(self) -> int:
        return self.rank + self.rope


TINY = Shape(3, 10, 6, 12, 14, block=4)
SMALL = Shape(16, 16, 8, 32, 16)
ODD = Shape(1, 7, 5, 33, 17, block=7)
LITE = Shape(16, 128, 64, 512, 128, block=32)
WIDE = Shape(130, 16, 16, 48, 16)


class Projections:
    """W_UK and W_UV of a shape, packed in bf16, and the values they hold in float64."""

    def __init__(self, shape: Shape, pool: _C.ThreadPool, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def randn(rows: int) -> Tensor:
            drawn = torch.randn(shape.heads, rows, shape.rank, generator=generator)
            return (drawn / shape.rank**0.5).bfloat16()

        w_uk, w_uv = randn(shape.nope), randn(shape.value)
        self.w_uk, self.w_uv = w_uk.double(), w_uv.double()
        self.packed = tuple(
            _pack(matrices, pool) for matrices in (w_uk.transpose(1, 2).contiguous(), w_uk, w_uv)
        )


def _pack(matrices: Tensor, pool: _C.ThreadPool) -> _C.LinearWeights:
    weights = _C.LinearWeights(*matrices.shape, "bf16")
    for i, matrix in enumerate(matrices):
        weights.set(i, matrix, pool)
    return weights


@dataclass
class Case:
    """A batch over a shuffled paged cache; blocks that no request owns hold NaN, also as fp8: all bits are set."""

    shape: Shape
    query_lens: list[int]
    context_lens: list[int]
    dtype: torch.dtype = torch.float32
    seed: int = 0
    q: Tensor = field(init=False)
    cache: Tensor = field(init=False)
    tables: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape, generator = self.shape, torch.Generator().manual_seed(self.seed)
        widths = [-(-context // shape.block) for context in self.context_lens]
        blocks = torch.randperm(sum(widths) + 3, generator=generator).tolist()
        self.tables = torch.full((len(widths), max(widths, default=0) + 1), -1)
        cache = torch.full((len(blocks), shape.block, shape.latent), float("nan"))
        for i, (width, context) in enumerate(zip(widths, self.context_lens, strict=True)):
            for j in range(width):
                self.tables[i, j] = blocks.pop()
                rows = min(shape.block, context - j * shape.block)
                drawn = torch.randn(rows, shape.latent, generator=generator)
                cache[self.tables[i, j], :rows] = drawn
        self.cache = encode_latents(cache[..., : shape.rank], cache[..., shape.rank :], self.dtype)
        if self.dtype == torch.uint8:
            self.cache[cache[..., 0].isnan()] = 0xFF
        self.q = torch.randn(
            sum(self.query_lens), shape.heads, shape.nope + shape.rope, generator=generator
        )

    @property
    def scale(self) -> float:
        return float((self.shape.nope + self.shape.rope) ** -0.5)

    def rows(self, request: int) -> Tensor:
        """As the cache has them, [context, row]."""
        context = self.context_lens[request]
        blocks = self.tables[request, : -(-context // self.shape.block)]
        return self.cache[blocks].flatten(0, 1)[:context]

    def latents(self, request: int) -> Tensor:
        """Their values, [context, C + R]."""
        return torch.cat(decode_latents(self.rows(request), self.shape.rank, self.shape.rope), -1)

    def poison(self, block: int, row: int, column: int) -> None:
        """NaN at this place of the cache; in the scale of its group, if that is fp8."""
        if self.dtype != torch.uint8:
            self.cache[block, row, column] = float("nan")
            return
        scale = -(-self.shape.rank // 4) * 4 + column // 128 * 4
        self.cache[block, row, scale : scale + 4] = 0xFF

    def run(
        self, projections: Projections, pool: _C.ThreadPool, *, isa: str, form: str = "auto"
    ) -> Tensor:
        out = torch.full((*self.q.shape[:2], self.shape.value), float("inf"))
        used = _C.mla_attention(
            *projections.packed,
            self.q,
            self.cache,
            self.tables,
            self.query_lens,
            self.context_lens,
            self.scale,
            out,
            pool,
            isa,
            form,
        )
        assert used == isa
        return out

    def expected(self, projections: Projections) -> Tensor:
        """float64, keys and values rebuilt."""
        parts, token, nope = [], 0, self.shape.nope
        for i, (queries, context) in enumerate(
            zip(self.query_lens, self.context_lens, strict=True)
        ):
            latent, q = self.latents(i).double(), self.q[token : token + queries].double()
            c_kv, k_pe = latent[:, : self.shape.rank], latent[:, self.shape.rank :]
            keys = torch.einsum("sc,hnc->hsn", c_kv, projections.w_uk)
            values = torch.einsum("sc,hvc->hsv", c_kv, projections.w_uv)
            scores = torch.einsum("thn,hsn->hts", q[..., :nope], keys)
            scores = (scores + torch.einsum("thr,sr->hts", q[..., nope:], k_pe)) * self.scale
            last = torch.arange(context - queries, context)
            scores.masked_fill_(torch.arange(context) > last[:, None], float("-inf"))
            parts.append(torch.einsum("hts,hsv->thv", scores.softmax(-1), values))
            token += queries
        return torch.cat(parts) if parts else torch.zeros(self.q.shape[0])


def _limit(isa: str) -> float:
    """fp32 arithmetic, or bf16 somewhere: in the products of attention, or in W_UK and W_UV."""
    return 1e-5 if isa in EXACT else 5e-3


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def _check(case: Case, pool: _C.ThreadPool, isa: str, form: str, seed: int = 0) -> None:
    projections = Projections(case.shape, pool, seed)
    got, expected = case.run(projections, pool, isa=isa, form=form), case.expected(projections)
    assert _error(got, expected) < _limit(isa)
    # No query may hide behind the others.
    for token in range(got.shape[0]):
        assert _error(got[token], expected[token]) < 5 * _limit(isa), f"{token=}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [TINY, SMALL, ODD, WIDE], ids=["tiny", "small", "odd", "wide"])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1], [1]),
        ([1], [17]),
        ([2], [2]),
        ([5], [63]),
        ([8], [129]),
        ([1, 5, 40], [333, 5, 70]),
        ([1, 1, 1, 1], [1, 64, 65, 200]),
        ([66], [66]),
    ],
)
def test_matches_float64(
    isa: str,
    shape: Shape,
    dtype: torch.dtype,
    form: str,
    query_lens: list[int],
    context_lens: list[int],
    pool: _C.ThreadPool,
) -> None:
    _check(Case(shape, query_lens, context_lens, dtype), pool, isa, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "context"), [(1, 1100), (3, 1025), (70, 700), (300, 300)])
def test_long_contexts(
    isa: str, dtype: torch.dtype, form: str, queries: int, context: int, pool: _C.ThreadPool
) -> None:
    """Several splits, several blocks of rebuilt keys, blocks that are masked in part or wholly."""
    _check(Case(SMALL, [queries], [context], dtype), pool, isa, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_dimensions(isa: str, dtype: torch.dtype, form: str, pool: _C.ThreadPool) -> None:
    if isa == "scalar":
        pytest.skip("slow, and dimensions mean nothing to it")
    _check(Case(LITE, [1, 9], [300, 40], dtype), pool, isa, form)


@pytest.mark.parametrize("dtype", DTYPES)
def test_form_follows_the_number_of_queries(
    isa: str, dtype: torch.dtype, pool: _C.ThreadPool
) -> None:
    """Both kinds in one batch; each request comes out as in its own form."""
    shape = SMALL
    case = Case(shape, [1, 90, 2, 120, 1], [50, 90, 33, 150, 9], dtype)
    projections = Projections(shape, pool)
    auto = case.run(projections, pool, isa=isa)
    assert _error(auto, case.expected(projections)) < _limit(isa)
    token = 0
    for queries, form in zip(case.query_lens, "aeaea", strict=True):
        same = case.run(projections, pool, isa=isa, form="absorbed" if form == "a" else "expanded")
        rows = slice(token, token + queries)
        if isa in EXACT:
            assert torch.equal(auto[rows], same[rows])
        else:  # how W_UK and W_UV are computed depends on the number of tokens
            assert _error(auto[rows], same[rows].double()) < _limit(isa)
        token += queries


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(
    isa: str, dtype: torch.dtype, form: str, pool: _C.ThreadPool
) -> None:
    one = _C.ThreadPool([min(os.sched_getaffinity(0))])
    case = Case(SMALL, [1, 30, 2], [1000, 300, 77], dtype)
    projections = Projections(case.shape, pool)
    together = case.run(projections, pool, isa=isa, form=form)
    assert torch.equal(case.run(projections, one, isa=isa, form=form), together)
    one.close()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_size_and_place_do_not_change_bits(
    isa: str, dtype: torch.dtype, form: str, pool: _C.ThreadPool
) -> None:
    """Rows that are read in place, and rows that are gathered first because blocks are short."""
    shape = Shape(4, 32, 32, 64, 32)
    case = Case(shape, [2], [190], dtype)
    projections = Projections(shape, pool)
    expected = case.run(projections, pool, isa=isa, form=form)
    rows = case.rows(0)
    for block in (1, 5, 16, 48, 256):
        width = -(-190 // block)
        order = torch.randperm(width + 2, generator=torch.Generator().manual_seed(block))[:width]
        nothing = 0xFF if dtype == torch.uint8 else float("nan")
        cache = torch.full((width + 2, block, rows.shape[1]), nothing, dtype=dtype)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, width * block - 190))
        cache[order] = padded.view(width, block, -1)
        case.cache, case.tables, case.shape.block = cache, order[None], block
        assert torch.equal(case.run(projections, pool, isa=isa, form=form), expected), f"{block=}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_request(
    isa: str, dtype: torch.dtype, form: str, pool: _C.ThreadPool
) -> None:
    case = Case(SMALL, [3, 4, 2], [90, 500, 20], dtype)
    projections = Projections(case.shape, pool)
    clean = case.run(projections, pool, isa=isa, form=form)
    case.poison(int(case.tables[1, 20]), 5, 3)
    bad = case.run(projections, pool, isa=isa, form=form)
    assert bad[3:7].isnan().all()
    assert torch.equal(bad[:3], clean[:3])
    assert torch.equal(bad[7:], clean[7:])
    case.q[0, 2, 0] = float("nan")
    bad = case.run(projections, pool, isa=isa, form=form)
    assert bad[0, 2].isnan().all()
    assert torch.equal(bad[0, 3:], clean[0, 3:])
    assert torch.equal(bad[1:3], clean[1:3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(
    isa: str, dtype: torch.dtype, form: str, pool: _C.ThreadPool
) -> None:
    """One key far ahead of the others: its value is the result."""
    case = Case(SMALL, [1], [200], dtype)
    case.q *= 1e4
    projections = Projections(case.shape, pool)
    got = case.run(projections, pool, isa=isa, form=form)
    assert _error(got, case.expected(projections)) < 0.01


@pytest.mark.parametrize("form", [*FORMS, "invariant"])
@pytest.mark.parametrize("shape", [TINY, ODD, SMALL, LITE, WIDE, Shape(3, 24, 10, 160, 24, 5)])
def test_fp8_rows_are_computed_as_the_values_they_stand_for(
    isa: str, shape: Shape, form: str, pool: _C.ThreadPool
) -> None:
    """The same bits as over a cache of those values, rounded to what the instruction set computes in."""
    if isa == "scalar" and shape is LITE:
        pytest.skip("slow, and dimensions mean nothing to it")
    case = Case(shape, [1, 7], [300, 20], torch.uint8)
    projections = Projections(shape, pool)
    got = case.run(projections, pool, isa=isa, form=form)
    values = torch.cat(decode_latents(case.cache, shape.rank, shape.rope), -1)
    case.cache = values if isa in EXACT else values.bfloat16()
    assert torch.equal(got, case.run(projections, pool, isa=isa, form=form))


@pytest.mark.parametrize("form", [*FORMS, "invariant"])
def test_every_fp8_code(isa: str, form: str, pool: _C.ThreadPool) -> None:
    """One key: attention returns its value, here W_UV = 1 times every code there is."""
    shape = Shape(1, 16, 2, 256, 256)
    one = torch.eye(256)[None]
    projections = Projections(shape, pool)
    projections.packed = (*projections.packed[:2], _pack(one.contiguous(), pool))
    case = Case(shape, [1], [1], torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    row = case.cache[case.tables[0, 0], 0]
    row[:256] = codes
    row[256:264] = torch.tensor([1.0, 1.0]).view(torch.uint8)
    got = case.run(projections, pool, isa=isa, form=form)[0, 0]
    expected = codes.view(torch.float8_e4m3fn).float()
    # Where scores are in bf16, the weight of a single key is 1 to 8e-5 only.
    torch.testing.assert_close(got, expected, rtol=0.0 if isa in EXACT else 1e-4, atol=0.0)


def test_strided_queries(isa: str, pool: _C.ThreadPool) -> None:
    case = Case(SMALL, [2, 70], [40, 80])
    projections = Projections(case.shape, pool)
    expected = case.run(projections, pool, isa=isa)
    wide = torch.full((72, 18, 30), float("nan"))
    wide[:, 1:17, :24] = case.q
    case.q = wide[:, 1:17, :24]
    assert torch.equal(case.run(projections, pool, isa=isa), expected)


def test_no_requests(isa: str, pool: _C.ThreadPool) -> None:
    assert Case(TINY, [], []).run(Projections(TINY, pool), pool, isa=isa).numel() == 0


def test_waves_bound_memory_without_changing_results(isa: str, pool: _C.ThreadPool) -> None:
    """More rows than one wave takes: the same bits as each request alone."""
    shape = Shape(128, 8, 8, 16, 8)
    case = Case(shape, [40, 1, 50, 1], [40, 300, 60, 17], torch.bfloat16)
    projections = Projections(shape, pool)
    together = case.run(projections, pool, isa=isa, form="absorbed")
    assert _error(together, case.expected(projections)) < _limit(isa)


def _arguments(pool: _C.ThreadPool) -> dict[str, object]:
    return {
        "w_uk_transposed": _C.LinearWeights(3, 12, 10, "bf16"),
        "w_uk": _C.LinearWeights(3, 10, 12, "bf16"),
        "w_uv": _C.LinearWeights(3, 14, 12, "bf16"),
        "q": torch.zeros(2, 3, 16),
        "latent_cache": torch.zeros(4, 4, 18),
        "block_tables": torch.tensor([[0, -1]]),
        "query_lens": [2],
        "context_lens": [2],
        "scale": 1.0,
        "out": torch.zeros(2, 3, 14),
        "pool": pool,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_lens": [0]}, r"query_lens\[0\]=0 must be between 1"),
        ({"query_lens": [3]}, r"query_lens\[0\]=3 must be between 1 and context_lens\[0\]=2"),
        ({"context_lens": [2, 2]}, "context_lens has 2 entries"),
        ({"context_lens": [9]}, "needs 3 blocks of 4 tokens, block_tables has 2"),
        ({"context_lens": [5]}, r"block_tables\[0, 1\]=-1 must be a block from 0 to 3"),
        ({"q": torch.zeros(1, 3, 15)}, "q has shape"),
        ({"q": torch.zeros(3, 3, 16)}, "q has shape"),
        ({"q": torch.zeros(2, 16, 3).transpose(1, 2)}, "not adjacent"),
        ({"out": torch.zeros(2, 3, 15)}, "out has shape"),
        ({"latent_cache": torch.zeros(4, 4, 11)}, "latent_cache has block size 4 and rows of 11"),
        ({"latent_cache": torch.zeros(4, 18)}, "latent_cache has shape"),
        ({"latent_cache": torch.zeros(4, 4, 16, dtype=torch.uint8)}, "row bytes=32"),
        ({"form": "both"}, "form='both'"),
        ({"w_uv": _C.LinearWeights(2, 14, 12, "bf16")}, "w_uv has 2 matrices"),
        ({"w_uk_transposed": _C.LinearWeights(3, 10, 12, "bf16")}, "w_uk_transposed has 3"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str, pool: _C.ThreadPool) -> None:
    call: Callable[..., str] = _C.mla_attention
    call(**_arguments(pool))
    with pytest.raises(ValueError, match=message):
        call(**(_arguments(pool) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"latent_cache": torch.zeros(4, 4, 18, dtype=torch.float16)},
        {"q": torch.zeros(2, 3, 16, dtype=torch.bfloat16)},
        {"block_tables": torch.zeros(1, 2, dtype=torch.int32)},
    ],
)
def test_wrong_dtypes(change: dict[str, object], pool: _C.ThreadPool) -> None:
    call: Callable[..., str] = _C.mla_attention
    with pytest.raises(TypeError, match=next(iter(change))):
        call(**(_arguments(pool) | change))
