"""Experts that stream through the ring, over copies that run on another thread at any later time."""

import random
import time

import pytest
import torch

from moejet import _C
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.expert_ring import ExpertRing
from moejet.experts.ring_copies import CudaCopies, ThreadCopies
from moejet.experts.ring_size import DEPTH, RingSize
from moejet.ops.gpu_experts import gpu_experts
from moejet.ops.unpack_experts import unpack_experts
from moejet.testing.packed_experts import PackedExperts

HIDDEN, INNER, EXPERTS, TOKENS, TOP_K = 64, 32, 7, 5, 3
# Ids in RAM of three layers: all, the end, two runs; chunks of two.
IN_RAM = (tuple(range(EXPERTS)), (4, 5, 6), (0, 1, 2, 5))
NUM_CHUNKS = 4 + 2 + 2 + 1


class Model:
    """Layers with all experts in RAM and on the "GPU", and a step through the ring."""

    def __init__(
        self, format: str, pool, *, in_ram=IN_RAM, experts_per_chunk: int = 2, device: str = "cpu"
    ):
        self.device = torch.device(device)
        self.layers = [
            PackedExperts.make(
                format,
                hidden_size=HIDDEN,
                intermediate_size=INNER,
                num_experts=EXPERTS,
                pool=pool,
                device=self.device,
            )
            for _ in in_ram
        ]
        for number, layer in enumerate(self.layers):
            # Layers differ.
            layer.cpu.fill_random(number + 1)
            everything = torch.arange(EXPERTS, dtype=torch.int32)
            packed = layer.packed(everything.tolist()).to(self.device)
            there = layer.resident
            unpack_experts(
                packed, everything.to(self.device), layer.layout, there.gate_up, there.down
            )
        self.in_ram = in_ram
        size = RingSize.of(HIDDEN, INNER, experts_per_chunk, [(format, format)])
        layers = [(layer.cpu, ids) for layer, ids in zip(self.layers, in_ram, strict=True)]
        self.ring = ExpertRing(layers, size, self.device)

    def inputs(self, seed: int):
        torch.manual_seed(seed)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).int()
        made = torch.randn(TOKENS, HIDDEN), ids, torch.rand(TOKENS, TOP_K)
        return [part.to(self.device) for part in made]

    def add(self, layer: int, seed: int) -> None:
        """A layer through the ring, compared with the same experts in slots."""
        x, ids, mix = self.inputs(seed)
        there = self.layers[layer].resident
        table = torch.full((EXPERTS,), -1, dtype=torch.int32, device=self.device)
        chosen = list(self.in_ram[layer])
        table[chosen] = there.slot_of_expert[chosen]
        expected = gpu_experts(x, ids, mix, table, there.gate_up, there.down)
        got = torch.ones(TOKENS, HIDDEN, device=self.device)
        self.ring.add(layer, x, ids, mix, got)
        torch.testing.assert_close(got - 1.0, expected, rtol=1e-5, atol=1e-5)

    def step(self, seed: int) -> None:
        with self.ring.step():
            for layer in range(len(self.layers)):
                self.add(layer, seed)

    def fail_after(self, layers: int) -> None:
        with self.ring.step():
            for layer in range(layers):
                self.add(layer, 1)
            raise RuntimeError("in the middle")


@pytest.fixture(scope="module")
def pool():
    """Of two memory nodes, among which experts are divided."""
    made = _C.ThreadPool([0], False, [0], [-1] * 2)
    yield made
    made.close()


def late(seed: int):
    """Delays before copies, so that whoever does not wait finds the bytes of another chunk."""
    chance = random.Random(seed)
    return ThreadCopies(lambda: time.sleep(chance.choice((0.0, 0.0, 0.003))))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("format", ["int4_g32", "fp8"])
def test_steps(format, in_place, pool):
    model = Model(format, pool)
    model.ring.prepare(in_place=in_place, copies=late(3))
    for seed in range(4):
        model.step(seed)
    done = model.ring.transfers()
    ahead = min(DEPTH, NUM_CHUNKS) if in_place else 0
    assert done.chunks == 4 * NUM_CHUNKS + ahead
    each = model.layers[0].layout.expert_bytes
    first = 4 if in_place else 0
    assert done.streamed_bytes >= each * (4 * sum(map(len, IN_RAM)) + first)
    model.ring.close()
    assert model.ring.layer_bytes == EXPERTS * each


def test_fewer_chunks_than_buffers(pool):
    model = Model("bf16", pool, in_ram=((3, 4),), experts_per_chunk=4)
    model.ring.prepare(in_place=True, copies=late(1))
    for seed in range(5):
        model.step(seed)
    model.ring.close()


@pytest.mark.parametrize("in_place", [True, False])
def test_an_error_in_the_middle(in_place, pool):
    """The next step has what belongs to it, though copies of the failed one are still under way."""
    model = Model("int8", pool)
    model.ring.prepare(in_place=in_place, copies=late(5))
    model.step(0)
    for layers in (0, 1, 2):
        with pytest.raises(RuntimeError, match="in the middle"):
            model.fail_after(layers)
        assert not model.ring.is_active
        model.step(2)
    model.ring.close()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_copy_that_fails(in_place, pool):
    failing = iter([False] * 3 + [True] + [False] * 1000)

    def before() -> None:
        if next(failing):
            raise OSError("no such memory")

    model = Model("bf16", pool)
    model.ring.prepare(in_place=in_place, copies=ThreadCopies(before))
    with pytest.raises(OSError, match="no such memory"):
        model.step(0)
    for seed in range(3):
        model.step(seed)
    model.ring.close()


def test_layers_out_of_order_are_refused(pool):
    model = Model("bf16", pool)
    model.ring.prepare(copies=ThreadCopies())
    with pytest.raises(AssertionError, match="layer 1 comes before"), model.ring.step():
        model.add(1, 0)
    model.step(0)
    model.ring.close()


def test_memory_is_what_the_size_says(pool):
    for format in ("int4_g32", "fp8", "q8_0", "fp32"):
        model = Model(format, pool)
        size = RingSize.of(HIDDEN, INNER, 2, [(format, format)])
        held = sum(tensor.nbytes for tensor in model.ring.tensors)
        # Tables of slots, and the pages at which a second node's part begins.
        assert 0 <= held - size.device_bytes <= 1024 + DEPTH * 2 * 4096


class LateCudaCopies(CudaCopies):
    """The device is late: now and then with copies, now and then with what the model does."""

    def __init__(self, seed: int):
        super().__init__(torch.device("cuda", 0))
        self._chance = random.Random(seed)

    def _sleep(self, stream) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self._chance.choice((0, 0, 300_000, 3_000_000)))

    def mark(self):
        self._sleep(torch.cuda.current_stream())
        return super().mark()

    def start(self, pieces, after):
        self._sleep(self._stream)
        return super().start(pieces, after)


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("format", ["int4_g32", "fp8", "bf16", "q8_0"])
def test_streams_that_run_late(format, in_place, pool):
    model = Model(format, pool, device="cuda:0")
    model.ring.prepare(in_place=in_place, copies=LateCudaCopies(3))
    for seed in range(20):
        model.step(seed)
    torch.cuda.synchronize()
    done = model.ring.transfers()
    assert done.chunks == 20 * NUM_CHUNKS + (min(DEPTH, NUM_CHUNKS) if in_place else 0)
    assert done.copy_seconds > 0.0
    model.ring.close()


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [True, False])
def test_an_error_while_the_streams_are_late(in_place, pool):
    model = Model("int8", pool, device="cuda:0")
    model.ring.prepare(in_place=in_place, copies=LateCudaCopies(4))
    for layers in (0, 1, 2, 0, 2):
        with pytest.raises(RuntimeError, match="in the middle"):
            model.fail_after(layers)
        model.step(layers)
    torch.cuda.synchronize()
    model.ring.close()


@pytest.mark.gpu
def test_copies_run_beside_the_model(pool):
    """Two layers of 400 MB, and a model that takes as long as the copies do: together less than one after the other."""
    hidden, inner, experts = 4096, 1024, 16
    layers = [CpuExperts(experts, hidden, inner, format="bf16", pool=pool) for _ in range(2)]
    for number, layer in enumerate(layers):
        layer.fill_random(number)
    size = RingSize.of(hidden, inner, 2, [("bf16", "bf16")])
    ring = ExpertRing([(cpu, range(experts)) for cpu in layers], size, torch.device("cuda:0"))
    ring.prepare(in_place=True)
    tokens = 64
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    ids = torch.randint(experts, (tokens, 2), device="cuda", dtype=torch.int32)
    weights, sums = torch.rand(tokens, 2, device="cuda"), torch.zeros(tokens, hidden, device="cuda")

    def seconds(cycles: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        with ring.step():
            for layer in (0, 1):
                torch.cuda._sleep(cycles)
                ring.add(layer, x, ids, weights, sums)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        copying = seconds(0)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    torch.cuda.synchronize()
    cycles = int(copying / 2 * 1e4 / begin.elapsed_time(end) * 1e6)
    # Of a layer's eight chunks, four are copied while the model sleeps.
    assert min(seconds(cycles) for _ in range(3)) < 1.8 * copying
    ring.close()
