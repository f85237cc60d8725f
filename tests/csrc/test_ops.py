"""Row operations in C++ against float64, on ragged sizes and strided rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.ops.rope import apply_rope_ref, rope_table
from moejet.presets import PRESETS

WIDTHS = (1, 7, 16, 64, 257, 2051)
TOKENS = (0, 1, 5)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _rows(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Rows that lie apart: [tokens, width] of a wider tensor, not aligned to anything."""
    return _randn(tokens, width + 3, seed=seed)[:, 1 : width + 1]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embed(isa: str, width: int, dtype: torch.dtype) -> None:
    table = _rows(11, width).to(dtype)
    for ids in ([], [10], [3, 0, 3, 10, 7]):
        token_ids = torch.tensor(ids, dtype=torch.int64)
        out = torch.full((len(ids), width + 2), 9.0)
        _C.embed(table, token_ids, out[:, :width], isa=isa)
        assert torch.equal(out[:, :width], table[token_ids].float())
        assert bool((out[:, width:] == 9.0).all())
        _C.embed(table, token_ids.int(), out[:, :width], isa=isa)
        assert torch.equal(out[:, :width], table[token_ids].float())


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(isa: str, width: int) -> None:
    weight = _randn(width, seed=1)
    for tokens in TOKENS:
        x = _rows(tokens, width)
        out = torch.full((tokens, width + 2), 9.0)
        _C.rms_norm(x, weight, 1e-5, out[:, :width], isa=isa)
        _close(out[:, :width], _normed(x, weight, 1e-5))
        assert bool((out[:, width:] == 9.0).all())
        again = x.clone()
        _C.rms_norm(again, weight, 1e-5, again, isa=isa)
        assert torch.equal(again, out[:, :width])


def test_rms_norm_of_extreme_rows(isa: str) -> None:
    x = torch.stack((torch.zeros(40), torch.full((40,), 1e18), torch.full((40,), 1e-20)))
    x[1, ::2] = -1e18
    out = torch.empty(3, 40)
    _C.rms_norm(x, torch.ones(40), 1e-6, out, isa=isa)
    _close(out, _normed(x, torch.ones(40), 1e-6))
    x[1, 3] = float("nan")
    _C.rms_norm(x, torch.ones(40), 1e-6, out, isa=isa)
    assert out.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("two", [False, True])
def test_add_rms_norm(isa: str, width: int, two: bool) -> None:
    weight = _randn(width, seed=1)
    for tokens in TOKENS:
        h, a, b = (_rows(tokens, width, seed=s) for s in (0, 1, 2))
        expected = h + (a + b if two else a)
        summed, out = h.clone(), torch.empty(tokens, width)
        _C.add_rms_norm(summed, a, b if two else None, weight, 1e-6, out, isa=isa)
        assert torch.equal(summed, expected)
        _close(out, _normed(expected, weight, 1e-6))
        _C.rms_norm(expected, weight, 1e-6, summed, isa=isa)
        assert torch.equal(summed, out)
        _C.add_rms_norm(h, a, b if two else None, isa=isa)
        assert torch.equal(h, expected)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dim", [2, 6, 64, 66, 512])
def test_rope(isa: str, dim: int, interleave: bool) -> None:
    table = rope_table(PRESETS["deepseek-v3"].rope, dim, 5000)
    for tokens, heads in ((0, 3), (1, 1), (1, 5), (4, 3)):
        cos_sin = table[
            torch.randint(5000, (tokens,), generator=torch.Generator().manual_seed(dim))
        ]
        x = _randn(tokens, heads, dim + 5)[..., 5:]
        expected = apply_rope_ref(x.double(), cos_sin.double(), interleave=interleave)
        out = torch.full((tokens, heads, dim + 3), 9.0)
        _C.rope(x, cos_sin, interleave, out[..., :dim], isa=isa)
        torch.testing.assert_close(out[..., :dim].double(), expected, atol=2e-6, rtol=1e-5)
        assert bool((out[..., dim:] == 9.0).all())
        _C.rope(x, cos_sin, interleave, x, isa=isa)
        assert torch.equal(x, out[..., :dim])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "rope_dim"), [(512, 64), (1, 2), (37, 10), (300, 66)])
def test_store_latent(isa: str, rank: int, rope_dim: int, dtype: torch.dtype) -> None:
    weight, table = _randn(rank), rope_table(PRESETS["deepseek-v3"].rope, rope_dim, 100)
    for tokens in TOKENS:
        latent = _randn(tokens, rank + rope_dim, seed=3)
        c_kv, k_pe = latent[:, :rank], latent[:, rank:]
        cos_sin = table[torch.arange(tokens) * 19 + 3]
        slots = torch.tensor([9, 0, 11, 4, 5])[:tokens]
        normed, rotated = torch.empty(tokens, rank), torch.empty(tokens, rope_dim)
        _C.rms_norm(c_kv, weight, 1e-6, normed, isa=isa)
        _C.rope(k_pe.unsqueeze(1), cos_sin, True, rotated.unsqueeze(1), isa=isa)
        expected = torch.full((3, 4, rank + rope_dim), 9.0, dtype=dtype)
        cache = expected.clone()
        expected.view(12, -1)[slots] = torch.cat((normed, rotated), dim=1).to(dtype)
        _C.store_latent(c_kv, k_pe, cache, slots, weight, 1e-6, cos_sin, True, isa=isa)
        assert torch.equal(cache, expected)
        cache.fill_(9.0)
        expected.fill_(9.0).view(12, -1)[slots] = latent.to(dtype)
        _C.store_latent(c_kv, k_pe, cache, slots, isa=isa)
        assert torch.equal(cache, expected)


def test_bf16_rounds_to_nearest_even_and_keeps_nan(isa: str) -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00000001, 0x7F800001])
    values = torch.cat((bits.int().view(torch.float32), torch.tensor([float("-inf"), -0.0])))
    cache = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    _C.store_latent(values[None, :6], values[None, 6:], cache, torch.tensor([0]), isa=isa)
    expected = values.bfloat16()
    assert torch.equal(cache[0, 0].isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(cache[0, 0, kept].view(torch.int16), expected[kept].view(torch.int16))


def test_same_bits_on_every_instruction_set_and_pool(isa: str, pool: _C.ThreadPool) -> None:
    x, weight = _randn(300, 1003), _randn(1003)
    cos_sin, heads = _randn(300, 34), _randn(300, 3, 34)

    def results(name: str, workers: _C.ThreadPool | None) -> list[Tensor]:
        normed, added, rotated = torch.empty(300, 1003), x.clone(), torch.empty(300, 3, 34)
        out, cache = torch.empty(300, 1003), torch.empty(300, 1, 1037, dtype=torch.bfloat16)
        _C.rms_norm(x, weight, 1e-6, normed, workers, name)
        _C.add_rms_norm(added, normed, x, weight, 1e-6, out, workers, name)
        _C.rope(heads, cos_sin, True, rotated, workers, name)
        slots = torch.arange(300)
        _C.store_latent(x, heads[:, 0], cache, slots, weight, 1e-6, cos_sin, False, workers, name)
        return [normed, added, out, rotated, cache]

    expected = results("scalar", None)
    for workers in (None, pool):
        for got, want in zip(results(isa, workers), expected, strict=True):
            assert torch.equal(got, want)


_OUT = torch.empty(2, 4)
_X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.embed(_X, torch.tensor([0, 2]), _OUT), ValueError, r"token_ids\[1\]=2"),
        (lambda: _C.embed(_X, torch.tensor([-1, 0]), _OUT), ValueError, r"token_ids\[0\]=-1"),
        (lambda: _C.embed(_X.half(), torch.tensor([0]), _OUT), TypeError, "table has dtype"),
        (lambda: _C.embed(_X, torch.tensor([0]), _OUT), ValueError, "out has shape"),
        (lambda: _C.rms_norm(_X, torch.ones(3), 1e-6, _OUT), ValueError, "weight has shape"),
        (lambda: _C.rms_norm(_X.double(), torch.ones(4), 1e-6, _OUT), TypeError, "x has dtype"),
        (lambda: _C.rms_norm(_X.T, torch.ones(2), 1e-6, _OUT), ValueError, "x has strides"),
        (lambda: _C.rms_norm(_X, torch.ones(8)[::2], 1e-6, _OUT), ValueError, "not contiguous"),
        (lambda: _C.add_rms_norm(_OUT, _X, None, torch.ones(4)), ValueError, "weight and out"),
        (lambda: _C.add_rms_norm(_OUT, _X[:1]), ValueError, "a has shape"),
        (lambda: _C.rope(_X.view(2, 1, 4), _X[:1], True, _OUT), ValueError, "cos_sin has shape"),
        (
            lambda: _C.rope(torch.ones(2, 1, 3), torch.ones(2, 3), True, torch.ones(2, 1, 3)),
            ValueError,
            r"x\.shape\[-1\]=3 must be even",
        ),
        (
            lambda: _C.store_latent(_X, _X, torch.ones(1, 2, 8), torch.tensor([0, 2])),
            ValueError,
            r"slots\[1\]=2 must be from 0 to 1",
        ),
        (
            lambda: _C.store_latent(_X, _X, torch.ones(1, 2, 9), torch.tensor([0, 1])),
            ValueError,
            "cache has shape",
        ),
        (
            lambda: _C.store_latent(_X, _X, torch.ones(1, 2, 8).half(), torch.tensor([0, 1])),
            TypeError,
            "cache has dtype",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
