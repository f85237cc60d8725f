import pytest
import torch

from moejet.kernels.hand_over import hand_over as launch
from moejet.ops.hand_over import HandOver, hand_over, hand_over_ref

EXPERTS, HIDDEN, TOP_K = 9, 70, 3


def _target(num_tokens: int, dtype: torch.dtype, width: int = HIDDEN, top_k: int = TOP_K):
    target = HandOver.allocate(num_tokens + 2, width, top_k, dtype=dtype, pin_memory=False)
    for part in (target.x, target.topk_ids, target.topk_weights):
        part.fill_(77)
    return target


def _parts(target: HandOver, num_tokens: int):
    part = target.first(num_tokens)
    return part.x, part.topk_ids, part.topk_weights


@pytest.mark.parametrize(
    ("num_tokens", "width", "top_k", "dtype", "ids_dtype"),
    [
        (1, 70, 3, torch.float32, torch.int32),
        (5, 1500, 8, torch.float16, torch.int32),
        (3, 1, 1, torch.float32, torch.int64),
        (4, 64, 6, torch.float16, torch.int64),
        (0, 16, 2, torch.float32, torch.int32),
    ],
)
@pytest.mark.parametrize(("has_slots", "has_uses"), [(True, True), (False, True), (True, False)])
def test_against_the_reference(num_tokens, width, top_k, dtype, ids_dtype, has_slots, has_uses):
    x = torch.randn(num_tokens, width + 5)[:, :width].to(dtype)
    ids = torch.randint(-1, EXPERTS, (num_tokens, top_k), dtype=ids_dtype)
    weights = torch.rand(num_tokens, top_k)
    slots = torch.randint(-1, 3, (EXPERTS,), dtype=torch.int32) if has_slots else None
    made = []
    for function in (launch, hand_over_ref):
        uses = torch.full((EXPERTS,), 2**31 - 2, dtype=torch.int32) if has_uses else None
        target = _target(num_tokens, dtype, width, top_k)
        function(x, ids, weights, *_parts(target, num_tokens), slots, uses, num_experts=EXPERTS)
        made.append((target, uses))
    (ours, our_uses), (theirs, their_uses) = made
    assert torch.equal(ours.x, theirs.x)
    assert torch.equal(ours.topk_ids, theirs.topk_ids)
    assert torch.equal(ours.topk_weights, theirs.topk_weights)
    for part in (ours.x, ours.topk_ids, ours.topk_weights):
        assert (part[num_tokens:] == 77).all()
    if has_uses:
        assert torch.equal(our_uses, their_uses)


@pytest.mark.parametrize("function", [launch, hand_over_ref])
def test_who_is_masked_and_who_is_counted(function):
    """Padding is neither; experts of the device are counted; ids that are none arrive as they are."""
    ids = torch.tensor([[4, 0, 2], [-1, -1, -1], [2, EXPERTS, -7]], dtype=torch.int32)
    slots = torch.full((EXPERTS,), -1, dtype=torch.int32)
    slots[2], slots[8] = 0, 1
    uses = torch.zeros(EXPERTS, dtype=torch.int32)
    target = _target(3, torch.float32)
    x, weights = torch.randn(3, HIDDEN), torch.rand(3, 3)
    function(x, ids, weights, *_parts(target, 3), slots, uses, num_experts=EXPERTS)
    assert target.topk_ids[:3].tolist() == [[4, 0, -1], [-1, -1, -1], [-1, EXPERTS, -7]]
    assert uses.tolist() == [1, 0, 2, 0, 1, 0, 0, 0, 0]
    assert torch.equal(target.x[:3], x)
    assert torch.equal(target.topk_weights[:3], weights)


def test_one_launch_and_no_other_operation(monkeypatch):
    """What was a gather through a table and three copies."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.interpreter import InterpretedFunction

    launches, operations = [], []
    run = InterpretedFunction.run

    def count(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(str(func))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(InterpretedFunction, "run", count)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    x, ids = torch.randn(2, HIDDEN), torch.zeros(2, TOP_K, dtype=torch.int32)
    weights, uses = torch.rand(2, TOP_K), torch.zeros(EXPERTS, dtype=torch.int32)
    target = _target(2, torch.float32).first(2)
    with Record():
        hand_over(x, ids, weights, target, num_experts=EXPERTS, slot_of_expert=uses - 1, uses=uses)
    assert launches == ["_hand_over_kernel"]
    assert operations == ["aten.sub.Tensor"]  # the test's own, so that the record works
    assert uses[0] == 2 * TOP_K
