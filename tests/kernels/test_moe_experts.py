"""Routed experts on the GPU: compiled ahead of time for every architecture, run on a GPU."""

import pytest
import torch

from moejet.ops.gpu_experts import gpu_experts, gpu_experts_ref
from moejet.weights.gpu_weights import GpuWeights, quantize

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.moe_experts import moe_experts
from moejet.testing.aot import assert_fits, launches_compiled_for

# (experts, top_k, hidden, inner) of DeepSeek-V3 and V2-Lite.
V3, V2_LITE = (256, 8, 7168, 2048), (64, 6, 2048, 1408)
# Loop-invariant values that ptxas parks to keep a register count at a step of the occupancy.
PARKED_BYTES = 32


def compile_experts(card, model, format, tokens):
    experts, top_k, dim, inner = model

    def meta(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    with launches_compiled_for(card) as compiled:
        out = moe_experts(
            meta(tokens, dim, dtype=torch.bfloat16),
            meta(tokens, top_k, dtype=torch.int32),
            meta(tokens, top_k, dtype=torch.float32),
            meta(experts, dtype=torch.int32),
            GpuWeights.empty(format, (24, 2, inner, dim), "meta"),
            GpuWeights.empty(format, (24, dim, inner), "meta"),
            out_dtype=torch.bfloat16,
        )
    assert out.shape == (tokens, dim)
    for launch in compiled:
        assert_fits(launch, card)
        assert launch.spilled <= PARKED_BYTES, f"{launch.name}: {launch.spilled} bytes spilled"


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm{card.capability}")
def test_compiles_for_decode(card):
    compile_experts(card, V3, "int4_g32", 1)


@pytest.mark.parametrize(
    ("capability", "format", "tokens"),
    [
        (86, "bf16", 8),
        (120, "fp8", 150),
        (86, "int4_g32", 600),
        (90, "fp8", 1000),
        (120, "int4_g32", 1000),
    ],
)
def test_compiles_for_more_tokens(capability, format, tokens):
    compile_experts(CARDS[capability], V2_LITE, format, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["int4_g32", "int8", "fp8", "bf16"])
@pytest.mark.parametrize(("dim", "inner"), [(2048, 1408), (416, 224)])
def test_on_the_gpu(dim, inner, format, dtype):
    torch.manual_seed(0)
    experts, slots, top_k = 16, 9, 6
    gate_up = quantize(torch.randn(slots, 2, inner, dim, device="cuda") * dim**-0.5, format)
    down = quantize(torch.randn(slots, dim, inner, device="cuda") * inner**-0.5, format)
    slot_of_expert = torch.full((experts,), -1, dtype=torch.int32)
    slot_of_expert[torch.randperm(experts)[:slots]] = torch.arange(slots, dtype=torch.int32)
    # Inner activations and int4 weights are rounded to x's type.
    limit = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for tokens in (1, 2, 8, 10, 11, 40, 64, 200, 700, 3000):
        x = torch.randn(tokens, dim + 8, device="cuda").to(dtype)[:, :dim]
        ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].int().cuda()
        arguments = (
            x, ids, torch.rand(tokens, top_k, device="cuda"), slot_of_expert.cuda(), gate_up, down
        )  # fmt: skip
        got = gpu_experts(*arguments, out_dtype=torch.float32)
        expected = gpu_experts_ref(*arguments, out_dtype=torch.float64)
        assert (got.double() - expected).norm() <= limit * expected.norm(), tokens
        assert torch.equal(got, gpu_experts(*arguments, out_dtype=torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_a_graph_follows_what_is_resident(tokens):
    gate_up = quantize(torch.randn(4, 2, 128, 256, device="cuda"), "int4_g32")
    down = quantize(torch.randn(4, 256, 128, device="cuda"), "int4_g32")
    x = torch.randn(tokens, 256, device="cuda").bfloat16()
    ids = torch.rand(tokens, 8).argsort(1)[:, :4].int().cuda()
    slot_of_expert = torch.full((8,), -1, dtype=torch.int32, device="cuda")
    arguments = (x, ids, torch.rand(tokens, 4, device="cuda"), slot_of_expert, gate_up, down)
    gpu_experts(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu_experts(*arguments)
    for resident in ([], [3], [0, 2, 5, 7]):
        slot_of_expert.fill_(-1)
        slot_of_expert[resident] = torch.arange(len(resident), dtype=torch.int32, device="cuda")
        ids.copy_(torch.rand(tokens, 8).argsort(1)[:, :4])
        captured.fill_(torch.nan)
        graph.replay()
        expected = gpu_experts_ref(*arguments, out_dtype=torch.float64)
        assert (captured.double() - expected).norm() <= 6e-3 * expected.norm() + 1e-30
