"""fp8 weights: every code on every set, checkpoints' codes and scales kept, quantisation as torch does it, refusals."""

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.experts.cpu_experts import CpuExperts
from moejet.ops.linear import PackedMatrices, linear
from moejet.testing.moe_layers import Layer, activations, relative_error, routing, run, tolerance

SHAPES = [(200, 257), (129, 128), (128, 129), (1, 1), (17, 31), (384, 640)]


def grid(rows: int, cols: int) -> tuple[int, int]:
    return -(-rows // 128), -(-cols // 128)


def expand(scales: Tensor, rows: int, cols: int) -> Tensor:
    """Block factors to one per weight."""
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]


def checkpoint(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn weights, scale_inv): Gaussian, with blocks of very different size."""
    generator = torch.Generator().manual_seed(seed + 1000 * rows + cols)
    w = (torch.randn(rows, cols, generator=generator) * 90).to(torch.float8_e4m3fn)
    scales = 10.0 ** (torch.rand(grid(rows, cols), generator=generator) * 3 - 5)
    return w, scales


def values(w: Tensor, scales: Tensor) -> Tensor:
    """What the checkpoint's weights stand for, exact in float64."""
    return w.double() * expand(scales, *w.shape).double()


def quantized(w: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: amax / 448 per block of 128 x 128, codes to nearest even."""
    rows, cols = w.shape
    blocks = torch.zeros(grid(rows, cols)[0] * 128, grid(rows, cols)[1] * 128)
    blocks[:rows, :cols] = w
    amax = blocks.abs().reshape(-1, 128, blocks.shape[1] // 128, 128).amax((1, 3))
    scales = amax / 448
    return (w.float() / expand(scales, rows, cols)).to(torch.float8_e4m3fn), scales


def packed(w: Tensor, scales: Tensor | None, format: str = "fp8", isa: str = "auto") -> Tensor:
    """The dequantised matrix after packing."""
    weights = _C.LinearWeights(1, *w.shape, format)
    weights.set(0, w, None, isa, scale_inv=scales)
    return torch.from_numpy(weights.dequantize(0))


@pytest.mark.parametrize("small", ["everywhere", "nowhere", "in one vector"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 300])
def test_every_code_is_exact(isa: str, tokens: int, small: str, pool: _C.ThreadPool) -> None:
    # Every code in every place of a block. Vectors with zero or subnormal codes take another path.
    codes = (torch.arange(300)[:, None] + torch.arange(300)).remainder(256)
    codes[codes % 128 == 127] = 0x35
    if small != "everywhere":
        codes[codes % 128 < 8] += 8
    if small == "in one vector":
        codes[:, 140:144] %= 8
    scales = 2.0 ** torch.arange(-4, 5).reshape(3, 3)
    w = codes.to(torch.uint8)
    matrices = PackedMatrices(1, 300, 300, format="fp8", pool=pool, isa=isa)
    matrices.set(0, w, scales)
    expected = w.view(torch.float8_e4m3fn).float() * expand(scales, 300, 300)
    assert torch.equal(matrices.dequantize(0), expected)
    for first in range(0, 300, tokens if tokens > 2 else 7 * tokens):
        x = torch.eye(300)[first : first + tokens]
        assert torch.equal(linear(x, matrices).T, expected[:, first : first + tokens])


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_checkpoint_weights_are_kept(isa: str, rows: int, cols: int, pool: _C.ThreadPool) -> None:
    w, scales = checkpoint(rows, cols)
    matrices = PackedMatrices(1, rows, cols, format="fp8", pool=pool, isa=isa)
    matrices.set(0, w, scales)
    assert torch.equal(matrices.dequantize(0), w.float() * expand(scales, rows, cols))
    tile_rows = _C.min_tile_rows("fp8", isa)
    for tokens in (1, 2, 7, 16, 33, 130):
        x = activations(tokens, cols, tokens)
        expected = x.double() @ values(w, scales).T
        limit = 5e-3 if tile_rows and tokens >= tile_rows else 3e-6
        error = relative_error(linear(x, matrices), expected)
        assert error < limit * (2 if cols < 32 else 1), f"{tokens=}"


@pytest.mark.parametrize(("hidden", "inter"), [(200, 257), (257, 48), (640, 320)])
def test_experts_from_a_checkpoint(isa: str, hidden: int, inter: int, pool: _C.ThreadPool) -> None:
    experts = CpuExperts(3, hidden, inter, format="fp8", pool=pool, isa=isa)
    layer = Layer(experts.weights, [], [])
    for e in range(3):
        shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
        exact = []
        for i, (name, shape) in enumerate(shapes.items()):
            w, scales = checkpoint(*shape, seed=10 * e + i)
            experts.set_projection(e, name, w, scales)
            exact.append(values(w, scales))
        layer.dequantized.append((exact[0], exact[1], exact[2]))
    for tokens in (1, 3, 16, 40):
        x, (ids, mix) = activations(tokens, hidden), routing(tokens, 3, 2)
        error = relative_error(run(layer, x, ids, mix, pool, isa), layer.truth(x, ids, mix))
        assert error < tolerance("fp8", isa, ids), f"{tokens=}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_quantisation_is_the_references(isa: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(5)).to(dtype)
    codes, scales = quantized(w)
    assert torch.equal(packed(w, None, isa=isa), codes.float() * expand(scales, rows, cols))


def test_every_rounding_is_the_references(isa: str) -> None:
    # All bf16 values up to 448, so all ties and all subnormal results; the block's scale is 1.
    bits = torch.arange(0, 0x43E1, dtype=torch.int32)
    w = (bits << 16).view(torch.float32)
    w = torch.cat([w, -w, torch.zeros(-2 * len(w) % 128)]).reshape(-1, 128)
    w = torch.cat([w, torch.zeros(-len(w) % 128, 128)])
    w[::128, 0] = 448.0
    assert torch.equal(packed(w, None, isa=isa), w.to(torch.float8_e4m3fn).float())


def test_blocks_of_zeros_and_extremes(isa: str) -> None:
    w = torch.zeros(256, 256)
    w[3, 130] = 1e30
    w[4, 130] = -5.0
    w[200, 5] = 3e38
    w[130:, 128:] = 1e-40
    back = packed(w, None, isa=isa)
    w[4, 130] = 0.0  # far below what the block's scale resolves
    w[130:, 128:] = 0.0
    assert torch.allclose(back, w)


@pytest.mark.parametrize("format", ["int4_g32", "int8", "bf16", "fp32"])
def test_other_formats_take_checkpoint_weights(isa: str, format: str) -> None:
    w, scales = checkpoint(200, 257)
    product = w.float() * expand(scales, 200, 257)
    assert torch.equal(
        packed(w.view(torch.uint8), scales, format, isa), packed(product, None, format, isa)
    )


def test_rows_apart(isa: str) -> None:
    wide, scales = checkpoint(150, 300)
    part = wide.view(torch.uint8)[:, 21:]
    assert torch.equal(packed(part, scales, isa=isa), packed(part.contiguous(), scales, isa=isa))


@pytest.mark.parametrize("power", [-149, -120, -110, 110, 118])
def test_scales_at_the_ends_of_the_range(isa: str, power: int, pool: _C.ThreadPool) -> None:
    w = checkpoint(64, 128)[0]
    matrices = PackedMatrices(1, 64, 128, format="fp8", pool=pool, isa=isa)
    matrices.set(0, w, torch.full((1, 1), 2.0**power))
    for tokens in (2, 40):
        x = activations(tokens, 128) * (2.0 ** min(-power - 8, 100) if power < 0 else 1e-3)
        expected = x.double() @ w.double().T * 2.0**power
        got = linear(x, matrices)
        if power < -126 and tokens == 40 and isa in ("avx512_bf16", "amx", "amx_emulated"):
            assert got.isfinite().all()  # bf16 has no such numbers
        else:
            assert relative_error(got, expected) < 5e-3


@pytest.mark.parametrize("tokens", [1, 4, 9, 50])
def test_vector_sets_agree_bit_by_bit(tokens: int, pool: _C.ThreadPool) -> None:
    isas = _C.cpu_info()["isas"]
    if not isas["avx512"]["usable"]:
        pytest.skip("needs two vector sets")
    w, scales = checkpoint(200, 300)
    results = []
    for isa in ("avx2", "avx512"):
        matrices = PackedMatrices(1, 200, 300, format="fp8", pool=pool, isa=isa)
        matrices.set(0, w, scales)
        results.append(linear(activations(tokens, 300), matrices))
    assert torch.equal(*results)


CODES = torch.full((150, 200), 0x38, dtype=torch.uint8)
ONES = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("w", "scales", "error", "message"),
    [
        (CODES.view(torch.float8_e4m3fn), None, ValueError, r"float8_e4m3fn: pass scale_inv"),
        (CODES, None, TypeError, "w has dtype uint8, expected float32"),
        (CODES.float(), ONES, TypeError, "scale_inv belongs to float8_e4m3fn"),
        (CODES.view(torch.float8_e5m2), ONES, TypeError, "scale_inv belongs to float8_e4m3fn"),
        (CODES.view(torch.float8_e5m2), None, TypeError, "float8_e5m2"),
        (CODES[:149], ONES, ValueError, r"w has shape \[149, 200\]"),
        (CODES, torch.ones(2, 1), ValueError, r"scale_inv has shape \[2, 1\]"),
        (CODES, torch.ones(2, 2, dtype=torch.bfloat16), TypeError, "scale_inv has dtype"),
        (CODES, torch.ones(2, 4)[:, ::2], ValueError, "scale_inv is not contiguous"),
        (
            CODES,
            torch.tensor([[1.0, 1.0], [float("nan"), 1]]),
            ValueError,
            r"scale_inv\[1, 0\]=nan",
        ),
        (CODES, torch.tensor([[1.0, -2.0], [1.0, 1.0]]), ValueError, r"scale_inv\[0, 1\]=-2"),
        (CODES, ONES * float("inf"), ValueError, r"scale_inv\[0, 0\]=inf must be finite"),
    ],
)
def test_bad_sources_are_named(
    w: Tensor, scales: Tensor | None, error: type[Exception], message: str
) -> None:
    weights = _C.LinearWeights(1, 150, 200, "fp8")
    with pytest.raises(error, match=message):
        weights.set(0, w, scale_inv=scales)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [(0, 0), (149, 199), (130, 64), (15, 127)])
def test_nan_codes_are_refused(
    isa: str, code: int, place: tuple[int, int], pool: _C.ThreadPool
) -> None:
    w = CODES.clone()
    w[place] = code
    for format in ("fp8", "int8"):
        weights = _C.ExpertWeights(1, 200, 150, format)
        with pytest.raises(ValueError, match=r"NaN in float8_e4m3fn: .* download it again"):
            weights.set_projection(0, "up", w, pool, isa, scale_inv=ONES)


def test_sizes() -> None:
    weights = _C.ExpertWeights(1, 7168, 2048, "fp8")  # reserved, not resident
    assert weights.expert_nbytes == round(3 * 7168 * 2048 * 8.125 / 8)
    assert weights.format == "fp8"
