import pytest
import torch

from moejet.kernels import linear as module
from moejet.kernels.linear import linear
from moejet.ops.gpu_linear import gpu_linear_ref
from moejet.weights.gpu_weights import dequantize, quantize

QUANTISED = ["int4_g32", "int8", "fp8"]
# fp32: sums in another order. fp16: x is exact in the reference, int4 weights are rounded to 11 bits.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 6e-4}


def check(x, weights, bias=None):
    got = linear(x, weights, bias, out_dtype=torch.float32)
    expected = gpu_linear_ref(x, weights, bias, out_dtype=torch.float64)
    assert got.shape == expected.shape
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[x.dtype], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 70, 160), (9, 33, 96), (19, 130, 256)])
def test_matches_the_reference(tokens, rows, cols, format, dtype):
    x = torch.randn(tokens, cols + 8).to(dtype)[:, :cols]
    check(x, quantize(torch.randn(rows, cols), format))


@pytest.mark.parametrize(("format", "cols"), [("int8", 203), ("fp8", 203), ("int4_g32", 32)])
def test_ragged_inputs(format, cols):
    check(torch.randn(3, cols), quantize(torch.randn(5, cols), format))


@pytest.mark.parametrize("format", QUANTISED)
def test_a_matrix_per_head(format):
    x = torch.randn(4, 3, 192).transpose(0, 1).half()  # [3, 4, 192], heads and tokens apart
    check(x, quantize(torch.randn(4, 40, 192), format))


@pytest.mark.parametrize("format", QUANTISED)
def test_inputs_divided_among_programs(format):
    cols = 12 * 128 + 64  # 13 blocks of inputs: a split has at least six, so two of seven and six
    weights, x = quantize(torch.randn(24, cols), format), torch.randn(2, cols).half()
    config = module._config(2, 24, cols, 1, format, 2, module.card_of(x.device))
    assert config.splits == 2
    check(x, weights, torch.randn(24))


def test_bias_is_added_once():
    check(torch.randn(2, 64), quantize(torch.randn(8, 64), "int8"), torch.randn(8))


def test_no_tokens():
    for format, dtype in (("int4_g32", torch.float32), ("bf16", torch.bfloat16)):
        weights, x = quantize(torch.randn(8, 64), format), torch.empty(0, 64, dtype=dtype)
        assert linear(x, weights, out_dtype=torch.float32).shape == (0, 8)


def test_plain_weights_take_their_own_dtype_and_fp32():
    weights, x = quantize(torch.randn(33, 96), "fp16"), torch.randn(9, 96)
    check(x.half(), weights, torch.randn(33))
    check(x, weights)
    with pytest.raises(TypeError, match="copy the whole matrix"):
        linear(x.bfloat16(), weights, out_dtype=torch.float32)


@pytest.mark.parametrize("format", QUANTISED)
def test_slabs_hold_the_values(format):
    weights = quantize(torch.randn(50, 160), format)
    out = torch.full((40, 160), torch.nan)
    module._dequantize_kernel[(2, 2)](
        weights.codes, weights.scales, out, 10, 40, 160,
        weights.codes.stride(0), weights.scales.stride(0),
        FORMAT=format, PACKED=False, BLOCK_N=32, BLOCK_K=128,
    )  # fmt: skip
    assert torch.equal(out, dequantize(weights)[10:])


def test_every_fp8_code():
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    weights = quantize(torch.zeros(254, 1), "fp8")
    weights.codes.copy_(codes[:, None])
    weights.scales.fill_(1.0)
    got = linear(torch.ones(1, 1), weights, out_dtype=torch.float32)
    assert torch.equal(got[0], codes.view(torch.float8_e4m3fn).float())
