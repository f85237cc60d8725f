import pytest
import torch

from moejet.kernels import moe_experts as module
from moejet.kernels.moe_experts import moe_experts
from moejet.ops.gpu_experts import gpu_experts_ref
from moejet.weights.gpu_weights import quantize

# fp32: sums in another order. fp16: inner activations and int4 weights are rounded to 11 bits.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3}
SLOTS, EXPERTS, DIM, INNER = 3, 5, 160, 96
# Experts 1 and 4 are not resident; slot 2 belongs to no expert.
SLOT_OF_EXPERT = torch.tensor([1, -1, 0, 0, -1], dtype=torch.int32)


def weights(gate_format, down_format=None, dim=DIM, inner=INNER):
    gate_up = quantize(torch.randn(SLOTS, 2, inner, dim) * dim**-0.5, gate_format)
    return gate_up, quantize(
        torch.randn(SLOTS, dim, inner) * inner**-0.5, down_format or gate_format
    )


def routing(tokens, top_k=2, experts=EXPERTS):
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    return ids, torch.rand(tokens, top_k)


def check(x, ids, mix, gate_up, down, slot_of_expert=SLOT_OF_EXPERT):
    arguments = (x, ids, mix, slot_of_expert, gate_up, down)
    got = moe_experts(*arguments, out_dtype=torch.float32).double()
    expected = gpu_experts_ref(*arguments, out_dtype=torch.float64)
    assert (got - expected).norm() <= TOLERANCE[x.dtype] * expected.norm()


# One token, few pairs, and enough of them to be sorted. Slot 0 belongs to experts 2 and 3 and has more than one block.
@pytest.mark.parametrize(
    ("format", "tokens"),
    [
        ("int4_g32", 1),
        ("int4_g32", 9),
        ("int4_g32", 33),
        ("fp8", 1),
        ("fp8", 33),
        ("int8", 9),
        ("bf16", 1),
    ],
)
def test_matches_the_reference(format, tokens):
    x = torch.randn(tokens, DIM + 8).half()[:, :DIM]
    ids, mix = routing(tokens)
    ids[1:10] = torch.tensor([2, 3])
    check(x, ids, mix, *weights(format))


def test_in_fp32_with_two_formats():
    check(torch.randn(3, DIM), *routing(3), *weights("int4_g32", "int8"))


@pytest.mark.parametrize("tokens", [1, 33])
def test_adds_to_what_is_there(tokens):
    gate_up, down = weights("int8")
    x, (ids, mix) = torch.randn(tokens, DIM).half(), routing(tokens)
    ids[0] = torch.tensor([1, 4])  # not here: what is there stays, whatever it is
    before = torch.randn(tokens, DIM)
    before[0] = float("nan")
    into = before.clone()
    arguments = (x, ids, mix, SLOT_OF_EXPERT, gate_up, down)
    assert moe_experts(*arguments, out_dtype=x.dtype, into=into) is into
    expected = gpu_experts_ref(*arguments, out_dtype=torch.float64)[1:]
    got = (into.double() - before.double())[1:]
    assert (got - expected).norm() <= TOLERANCE[x.dtype] * expected.norm() + 1e-6
    assert into[0].isnan().all()


@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_experts_elsewhere_count_for_nothing(tokens):
    gate_up, down = weights("int8")
    ids, mix = routing(tokens)
    nowhere = torch.full((EXPERTS,), -1, dtype=torch.int32)
    x = torch.randn(tokens, DIM).half()
    assert torch.equal(
        moe_experts(x, ids, mix, nowhere, gate_up, down, out_dtype=torch.float32),
        torch.zeros(tokens, DIM),
    )
    ids[0] = torch.tensor([-1, 0])  # a skipped choice
    mix[0, 0] = torch.nan
    check(x, ids.long(), mix.where(ids >= 0, 0.0), gate_up, down)
    got = moe_experts(x, ids, mix, SLOT_OF_EXPERT, gate_up, down, out_dtype=torch.float32)
    assert not got.isnan().any()


def test_no_tokens():
    gate_up, down = weights("int8")
    ids, mix = torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2)
    got = moe_experts(
        torch.empty(0, DIM), ids, mix, SLOT_OF_EXPERT, gate_up, down, out_dtype=torch.float32
    )
    assert got.shape == (0, DIM)


def test_columns_of_the_result_in_several_parts(monkeypatch):
    monkeypatch.setattr(module, "_DOWN_BYTES", 0)
    gate_up, down = weights("int8", dim=576, inner=32)  # 512 columns, then 64
    check(torch.randn(3, 576).half(), *routing(3), gate_up, down)


@pytest.mark.parametrize(("pairs", "block"), [(65, 16), (1100, 32)])
def test_pairs_are_sorted_by_slot(pairs, block):
    ids, slot_of_expert = torch.randint(-1, 9, (pairs, 1)), torch.randperm(9).int() - 3
    slots = 7  # of which the last has no expert
    most = -(-pairs // block) + slots
    order, block_slot, num_blocks = module._sort_pairs(
        ids, slot_of_expert, pairs, slots, most, block
    )
    slot_of_pair = [-1 if e < 0 else int(slot_of_expert[e]) for e in ids.flatten().tolist()]
    at = 0
    for slot in range(slots):
        expected = [p for p in range(pairs) if slot_of_pair[p] == slot]
        expected += [-1] * (-len(expected) % block)
        found = order[at * block : at * block + len(expected)]
        assert found.tolist() == expected
        assert (block_slot[at : at + len(expected) // block] == slot).all()
        at += len(expected) // block
    assert int(num_blocks) == at <= most
