"""Packed experts into the GPU's layout: compiled ahead of time, run on a GPU."""

import pytest
import torch

from moejet.config import EXPERT_FORMATS, GGUF_FORMATS
from moejet.experts.cpu_experts import create_pool
from moejet.experts.resident_experts import ResidentExperts, expert_slots
from moejet.ops.unpack_experts import unpack_experts_ref
from moejet.testing.packed_experts import PackedExperts
from moejet.weights.packed_layout import PackedLayout

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.unpack_experts import unpack_experts
from moejet.testing.aot import assert_fits, launches_compiled_for

# Each kernel for the oldest card, which has the least of everything, and one for others.
CARDS_AND_FORMATS = [
    *((86, format) for format in ("int4_g32", "fp8", "q6_k")),
    *((90, "bf16"), (120, "int8"), (120, "q5_k")),
]


@pytest.mark.parametrize(("capability", "format"), CARDS_AND_FORMATS)
def test_compiles(capability, format):
    card = CARDS[capability]
    hidden, inner, chunk = 7168, 2048, 4
    layout = PackedLayout(hidden, inner, format, format)
    meta = torch.device("meta")
    gate_up, down = expert_slots(chunk, hidden, inner, format, format, meta)
    packed = torch.empty(chunk * layout.expert_bytes, dtype=torch.uint8, device=meta)
    slots = torch.empty(chunk, dtype=torch.int32, device=meta)
    with launches_compiled_for(card) as compiled:
        unpack_experts(packed, slots, layout, gate_up, down)
    assert len(compiled) == 2
    for launch in compiled:
        assert_fits(launch, card)
        assert launch.spilled == 0, f"{launch.name}: {launch.spilled} bytes spilled"


@pytest.mark.gpu
@pytest.mark.parametrize("format", [*EXPERT_FORMATS, *GGUF_FORMATS])
def test_on_the_gpu(format):
    pool = create_pool(1)
    odd = [] if format in (*GGUF_FORMATS, "int4_g32") else [(131, 33), (257, 258)]
    for hidden, inner in ((512, 256), (256, 1280), *odd):
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_experts": 3}
        made = PackedExperts.make(format, pool=pool, **sizes)
        for order in ([2, 0, 1], [1]):
            slots = torch.tensor(order, dtype=torch.int32)
            packed = made.packed(order)
            got, expected = [], []
            for place, found in (("cuda", got), ("cpu", expected)):
                empty = ResidentExperts(
                    range(3), 3, hidden, inner, format=format, down_format=format,
                    device=torch.device(place),
                )  # fmt: skip
                for part in empty.state("").values():
                    part.view(torch.uint8).fill_(0xA5)
                run = unpack_experts if place == "cuda" else unpack_experts_ref
                run(packed.to(place), slots.to(place), made.layout, empty.gate_up, empty.down)
                found.extend(part.view(torch.uint8).cpu() for part in empty.state("").values())
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    pool.close()
