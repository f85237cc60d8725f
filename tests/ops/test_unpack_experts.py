"""Packed experts become, bit for bit, what the GPU makes of the same checkpoint."""

import pytest
import torch

from moejet import _C
from moejet.config import EXPERT_FORMATS, GGUF_FORMATS
from moejet.experts.cpu_experts import create_pool
from moejet.ops.unpack_experts import unpack_experts
from moejet.testing.packed_experts import PackedExperts
from moejet.weights.gpu_weights import GpuWeights, quantize
from moejet.weights.packed_layout import PackedLayout

FORMATS = (*EXPERT_FORMATS, *GGUF_FORMATS)


@pytest.fixture(scope="module", params=[1, 3], ids=["1node", "3nodes"])
def pool(request):
    # Virtual nodes: divided alike, placed anywhere.
    made = _C.ThreadPool([0], False, [0], [-1] * request.param)
    yield made
    made.close()


def _sizes(format: str) -> list[tuple[int, int]]:
    """(hidden, inner): both are rows of one matrix and inputs of another."""
    if format in ("q4_k", "q5_k", "q6_k"):
        return [(256, 512), (768, 256)]
    if format in ("q4_0", "q8_0"):
        return [(160, 96), (32, 320)]
    if format == "int4_g32":
        return [(160, 96), (352, 32)]
    return [(130, 33), (33, 257), (1, 1), (288, 160)]


def _empty(made: PackedExperts, slots: int) -> tuple[GpuWeights, GpuWeights]:
    """Slots full of what no weight is."""
    found = []
    for weights in (made.resident.gate_up, made.resident.down):
        empty = GpuWeights.empty(weights.format, (slots, *weights.shape[1:]))
        empty.codes.view(torch.uint8).fill_(0xA5)
        if empty.scales is not None:
            empty.scales.view(torch.uint8).fill_(0xA5)
        found.append(empty)
    return found[0], found[1]


def _same(got: GpuWeights, slot: int, expected: GpuWeights, expert: int) -> bool:
    return torch.equal(got.codes[slot], expected.codes[expert]) and (
        got.scales is None
        or (expected.scales is not None and torch.equal(got.scales[slot], expected.scales[expert]))
    )


@pytest.mark.parametrize("format", FORMATS)
def test_bit_exact(format, pool):
    for hidden, inner in _sizes(format):
        made = PackedExperts.make(
            format, hidden_size=hidden, intermediate_size=inner, num_experts=3, pool=pool
        )
        gate_up, down = _empty(made, 5)
        slots = torch.tensor([4, 1], dtype=torch.int32)
        unpack_experts(made.packed([2, 0]), slots, made.layout, gate_up, down)
        for slot, expert in ((4, 2), (1, 0)):
            assert _same(gate_up, slot, made.resident.gate_up, expert)
            assert _same(down, slot, made.resident.down, expert)
        for slot in (0, 2, 3):
            for weights in (gate_up, down):
                assert (weights.codes[slot].view(torch.uint8) == 0xA5).all()


@pytest.mark.parametrize(
    ("format", "down_format"), [("q4_k", "q6_k"), ("int4_g32", "q5_k"), ("bf16", "fp8")]
)
def test_two_formats(format, down_format, pool):
    made = PackedExperts.make(
        format, down_format, hidden_size=256, intermediate_size=256, num_experts=2, pool=pool
    )
    gate_up, down = _empty(made, 2)
    slots = torch.arange(2, dtype=torch.int32)
    unpack_experts(made.packed([0, 1]), slots, made.layout, gate_up, down)
    assert all(_same(gate_up, e, made.resident.gate_up, e) for e in (0, 1))
    assert all(_same(down, e, made.resident.down, e) for e in (0, 1))


def test_int4_whose_groups_do_not_divide_the_inputs(pool):
    """The GPU has int8 of the checkpoint there, or, of packed experts, of the CPU's int4."""
    made = PackedExperts.make(
        "int4_g32", hidden_size=100, intermediate_size=96, num_experts=1, pool=pool
    )
    gate_up, down = _empty(made, 1)
    assert (gate_up.format, down.format) == ("int8", "int4_g32")
    slots = torch.zeros(1, dtype=torch.int32)
    unpack_experts(made.packed([0]), slots, made.layout, gate_up, down)
    expected = quantize(torch.stack(made.cpu.dequantize(0)[:2]), "int8")
    assert torch.equal(gate_up.codes[0], expected.codes)
    assert gate_up.scales is not None
    assert torch.equal(gate_up.scales[0], expected.scales)


def test_nothing_to_unpack(pool):
    made = PackedExperts.make(
        "bf16", hidden_size=32, intermediate_size=32, num_experts=1, pool=pool
    )
    none = torch.empty(0, dtype=torch.int32)
    unpack_experts(torch.empty(0, dtype=torch.uint8), none, made.layout, *_empty(made, 1))


@pytest.mark.parametrize("format", FORMATS)
def test_the_layout_is_that_of_the_extension(format):
    for hidden, inner in ((7168, 2048), (33, 1), (256, 1408)):
        for nodes in (1, 2, 5):
            weights = _C.ExpertWeights(2, hidden, inner, format, [-1] * nodes)
            layout = PackedLayout(hidden, inner, format, format, nodes)
            sizes = [memory.size // 2 for memory in weights.buffers()]
            assert [part.nbytes for part in layout.slices] == sizes
            assert layout.expert_bytes == weights.expert_nbytes


def test_packed_slices_are_the_memory_itself():
    pool = create_pool(1)
    made = PackedExperts.make(
        "bf16", hidden_size=32, intermediate_size=32, num_experts=3, pool=pool
    )
    [two] = made.cpu.packed_slices(1, 3)
    [all_of_them] = made.cpu.weights.buffers()
    assert two.data_ptr() == all_of_them.ctypes.data + made.layout.expert_bytes
    assert two.numel() == 2 * made.layout.expert_bytes
    pool.close()
