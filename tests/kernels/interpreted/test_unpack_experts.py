import pytest
import torch

from moejet import _C
from moejet.config import EXPERT_FORMATS
from moejet.kernels.unpack_experts import unpack_experts
from moejet.ops.unpack_experts import unpack_experts_ref
from moejet.testing.packed_experts import PackedExperts
from moejet.weights.gpu_weights import GpuWeights


@pytest.fixture(scope="module")
def pools():
    """By number of memory nodes."""
    made = {nodes: _C.ThreadPool([0], False, [0], [-1] * nodes) for nodes in (1, 2)}
    yield made
    for pool in made.values():
        pool.close()


def parts_of(*both: GpuWeights) -> list[torch.Tensor]:
    return [part for w in both for part in (w.codes, w.scales) if part is not None]


def check(made: PackedExperts, experts: list[int], slots: list[int]) -> None:
    """Slots change as they should, and nothing else does."""
    sources = (made.resident.gate_up, made.resident.down)
    targets = [GpuWeights.empty(w.format, (4, *w.shape[1:])) for w in sources]
    expected = []
    for target, source in zip(parts_of(*targets), parts_of(*sources), strict=True):
        target.view(torch.uint8).fill_(0xA5)
        wanted = target.clone()
        wanted[slots] = source[experts]
        expected.append(wanted)
    chosen = torch.tensor(slots, dtype=torch.int32)
    unpack_experts(made.packed(experts), chosen, made.layout, *targets)
    for target, wanted in zip(parts_of(*targets), expected, strict=True):
        assert torch.equal(target.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("format", [*EXPERT_FORMATS, "q4_0", "q8_0"])
def test_bit_exact(format, pools):
    made = PackedExperts.make(
        format, hidden_size=64, intermediate_size=32, num_experts=2, pool=pools[1]
    )
    check(made, [1, 0], [2, 0])


@pytest.mark.parametrize("format", ["q4_k", "q5_k", "q6_k"])
def test_blocks_of_256_inputs(format, pools):
    hidden = 512 if format == "q4_k" else 256
    made = PackedExperts.make(
        format, "int8", hidden_size=hidden, intermediate_size=16, num_experts=1, pool=pools[1]
    )
    check(made, [0], [3])


@pytest.mark.parametrize("format", ["bf16", "fp8", "int8", "fp32"])
def test_odd_sizes(format, pools):
    """Rows that are no whole words, blocks cut off, two blocks of 128 rows."""
    made = PackedExperts.make(
        format, hidden_size=129, intermediate_size=17, num_experts=1, pool=pools[2]
    )
    check(made, [0], [3])


@pytest.mark.parametrize("formats", [("q4_0", "q8_0"), ("int4_g32", "q4_0")])
def test_half_a_block(formats, pools):
    made = PackedExperts.make(
        *formats, hidden_size=96, intermediate_size=32, num_experts=1, pool=pools[2]
    )
    check(made, [0], [1])


def test_int4_that_becomes_int8(pools):
    made = PackedExperts.make(
        "int4_g32", hidden_size=100, intermediate_size=32, num_experts=1, pool=pools[2]
    )
    for weights in (made.resident.gate_up, made.resident.down):
        weights.codes.zero_()
    slot = torch.zeros(1, dtype=torch.int32)
    unpack_experts_ref(
        made.packed([0]), slot, made.layout, made.resident.gate_up, made.resident.down
    )
    check(made, [0], [2])
