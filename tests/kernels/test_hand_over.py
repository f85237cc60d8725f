"""A layer's tokens on their way to the CPU: compiled ahead of time, and on a GPU into pinned memory."""

import re

import pytest
import torch

from moejet.ops.hand_over import HandOver, hand_over, hand_over_ref

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.hand_over import hand_over as launch
from moejet.testing.aot import assert_fits, launches_compiled_for


def _meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("capability", [86, 90, 120])
def test_compiles(capability):
    card, int32, fp32 = CARDS[capability], torch.int32, torch.float32
    x = _meta(4, 7168, dtype=torch.bfloat16)
    ids, weights = _meta(4, 8, dtype=int32), _meta(4, 8, dtype=fp32)
    tables = _meta(256, dtype=int32), _meta(256, dtype=int32)
    with launches_compiled_for(card) as compiled:
        for slots, uses in (tables, (None, None)):
            launch(x, ids, weights, x, ids, weights, slots, uses, num_experts=256)
    assert len(compiled) == 2
    for kernel in compiled:
        assert_fits(kernel, card)
        assert kernel.spilled == 0
    # 16 bytes per thread, as the time on the bus is counted; one atomic addition without a fence.
    assert "st.global.v4.b32" in compiled[0].asm["ptx"]
    assert re.search(r"(atom|red)\S*relaxed\S*add", compiled[0].asm["ptx"])
    assert not re.search(r"\b(atom|red)\.", compiled[1].asm["ptx"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 7168), (33, 2048), (2048, 1000), (3, 7)])
def test_into_pinned_memory(num_tokens, width, dtype):
    experts, top_k = 64, 6
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, width, generator=generator).to("cuda", dtype)
    ids = torch.randint(-1, experts, (num_tokens, top_k), generator=generator).int().cuda()
    weights = torch.rand(num_tokens, top_k, generator=generator).cuda()
    slots = torch.randint(-1, 2, (experts,), generator=generator).int().cuda()
    made = []
    for uses_reference in (False, True):
        uses = torch.zeros(experts, dtype=torch.int32, device="cuda")
        target = HandOver.allocate(num_tokens, width, top_k, dtype=dtype, pin_memory=True)
        target.x.fill_(float("nan"))
        if uses_reference:
            parts = (target.x, target.topk_ids, target.topk_weights)
            hand_over_ref(x, ids, weights, *parts, slots, uses, num_experts=experts)
        else:
            hand_over(x, ids, weights, target, num_experts=experts, slot_of_expert=slots, uses=uses)
        torch.cuda.synchronize()
        made.append((target, uses.cpu()))
    (ours, our_uses), (theirs, their_uses) = made
    assert torch.equal(ours.x, theirs.x)
    assert torch.equal(ours.topk_ids, theirs.topk_ids)
    assert torch.equal(ours.topk_weights, theirs.topk_weights)
    assert torch.equal(our_uses, their_uses)
    assert int(our_uses.sum()) == int((ids >= 0).sum())
