"""Products with quantised weights: compiled ahead of time for every architecture, run on a GPU."""

import pytest
import torch

from moejet.ops.gpu_linear import gpu_linear, gpu_linear_ref
from moejet.weights.gpu_weights import GpuWeights, dequantize, quantize

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.linear import linear
from moejet.testing.aot import assert_fits, launches_compiled_for

QUANTISED = ["int4_g32", "int8", "fp8"]
# Loop-invariant values that ptxas parks to keep a register count at a step of the occupancy.
PARKED_BYTES = 32
# (heads, outputs, inputs): DeepSeek-V3's o_proj, lm_head and an absorbed projection; V2-Lite's kv_a, whose outputs are
# so few that programs share the inputs.
SHAPES = {"o": (1, 7168, 16384), "head": (1, 129280, 7168), "uk": (128, 512, 128), "kva": (1, 576, 2048)}  # fmt: skip


def compile_linear(card, heads, rows, cols, format, tokens):
    lead = () if heads == 1 else (heads,)
    weights = GpuWeights.empty(format, (*lead, rows, cols), "meta")
    x = torch.empty(tokens, *lead, cols, dtype=torch.bfloat16, device="meta")
    with launches_compiled_for(card) as compiled:
        out = linear(x, weights, out_dtype=torch.bfloat16)
    assert out.shape == (tokens, *lead, rows)
    for launch in compiled:
        assert_fits(launch, card)
        assert launch.spilled <= PARKED_BYTES, f"{launch.name}: {launch.spilled} bytes spilled"
    return compiled


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm{card.capability}")
def test_compiles_for_decode(card):
    compiled = compile_linear(card, *SHAPES["o"], "int4_g32", 1)
    assert all(launch.spilled == 0 for launch in compiled)


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm{card.capability}")
def test_compiles_for_prefill(card):
    compile_linear(card, *SHAPES["o"], "fp8", 100)


@pytest.mark.parametrize(
    ("capability", "shape", "format", "tokens"),
    [
        (86, "head", "int8", 16),
        (120, "head", "fp8", 1),
        (90, "uk", "int4_g32", 4),
        (120, "o", "int4_g32", 100),
        (90, "o", "int8", 100),
        (90, "o", "int4_g32", 16),
    ],
)
def test_compiles_other_shapes(capability, shape, format, tokens):
    compile_linear(CARDS[capability], *SHAPES[shape], format, tokens)


def test_few_outputs_are_computed_in_parts():
    assert len(compile_linear(CARDS[120], *SHAPES["kva"], "int8", 1)) == 2


def test_compiles_slabs():
    compiled = compile_linear(CARDS[86], 1, 8200, 1536, "int4_g32", 2048)
    assert len(compiled) == 2  # of 8192 rows and of 8, by one kernel
    assert compiled[0].asm is compiled[1].asm


def assert_right(x, weights, bias=None):
    got = gpu_linear(x, weights, bias, out_dtype=torch.float32)
    expected = gpu_linear_ref(x, weights, bias, out_dtype=torch.float64)
    # bf16 and fp16: int4 weights are rounded to the type of x; where torch multiplies, all weights and results are.
    limit = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[x.dtype]
    assert got.shape == expected.shape
    assert (got.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        *((f, t) for f in QUANTISED for t in (torch.float32, torch.bfloat16, torch.float16)),
        ("bf16", torch.bfloat16),
        ("bf16", torch.float32),
        ("fp16", torch.float16),
    ],
)
@pytest.mark.parametrize(
    ("rows", "cols"), [(7168, 2048), (1536, 7168), (576, 2048), (100, 1408), (33, 96)]
)
def test_on_the_gpu(rows, cols, format, dtype):
    torch.manual_seed(rows)
    weights = quantize(torch.randn(rows, cols, device="cuda") * cols**-0.5, format)
    for tokens in (1, 5, 8, 9, 16, 17, 33, 100, 300, 1500):
        wide = torch.randn(tokens, cols + 8, device="cuda").to(dtype)
        assert_right(wide[:, :cols], weights, torch.randn(rows, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("format", [*QUANTISED, "bf16"])
@pytest.mark.parametrize(
    ("heads", "rows", "cols"), [(128, 512, 128), (16, 128, 512), (20, 512, 192)]
)
def test_heads_on_the_gpu(heads, rows, cols, format):
    weights = quantize(torch.randn(heads, rows, cols, device="cuda"), format)
    for tokens in (1, 7, 64):
        x = torch.randn(heads, tokens, cols, device="cuda").bfloat16().transpose(0, 1)
        assert_right(x, weights)


@pytest.mark.gpu
def test_every_int4_and_int8_code_on_the_gpu():
    """One input at a time: each output is one weight, whatever its scale."""
    for format in ("int4_g32", "int8"):
        weights = quantize(torch.randn(256, 128, device="cuda"), format)
        weights.codes.view(torch.uint8).copy_(
            torch.arange(256, device="cuda")[:, None].expand(weights.codes.shape)
        )
        exponents = torch.linspace(-60, 15, weights.scales.numel(), device="cuda")
        weights.scales.copy_(exponents.round().exp2().view(weights.scales.shape))
        got = gpu_linear(torch.eye(128, device="cuda").bfloat16(), weights, out_dtype=torch.float32)
        assert torch.equal(got.T, dequantize(weights))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 20])
def test_every_fp8_code_on_the_gpu(tokens):
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8).cuda()
    weights = quantize(torch.zeros(254, 128, device="cuda"), "fp8")
    weights.codes[:, 77] = codes
    weights.scales.fill_(1.0)
    x = torch.zeros(tokens, 128, device="cuda", dtype=torch.bfloat16)
    x[:, 77] = 1.0
    got = gpu_linear(x, weights, out_dtype=torch.float32)
    assert torch.equal(got, codes.view(torch.float8_e4m3fn).float().expand(tokens, -1))


@pytest.mark.gpu
def test_results_are_the_same_every_time_and_in_a_graph():
    weights = quantize(torch.randn(576, 7168, device="cuda"), "int4_g32")
    x = torch.randn(3, 7168, device="cuda").bfloat16()
    first = gpu_linear(x, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu_linear(x, weights)
    for _ in range(5):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, first)
