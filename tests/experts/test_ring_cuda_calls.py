"""What the ring asks of CUDA, in which order and of which stream: of a CUDA that writes it down."""

from contextlib import contextmanager

import pytest
import torch

from moejet import _C
from moejet.experts import pinned_weights, ring_copies
from moejet.experts.expert_ring import ExpertRing
from moejet.experts.pinned_weights import PinnedWeights
from moejet.experts.ring_copies import CudaCopies, StagedCopies
from moejet.experts.ring_size import DEPTH, RingSize
from moejet.testing.packed_experts import PackedExperts

CPU = torch.device("cpu")


class RecordedCuda:
    """Streams and events as names in a list of what was asked for; memory registrations as address: size."""

    def __init__(self, most_registered: int = 10**9):
        self.calls: list[tuple] = []
        self.registered: dict[int, int] = {}
        self.most_registered = most_registered
        self.current = _Stream(self, "model")
        self.num_events = 0

    def Stream(self, device):
        return _Stream(self, "copies")

    def Event(self, enable_timing=False, blocking=False):
        self.num_events += 1
        return _Event(self, self.num_events)

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def cudart(self):
        return self

    def cudaHostRegister(self, address, size, flags):
        if sum(self.registered.values()) + size > self.most_registered:
            return 2
        if address in self.registered:
            return 712
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.registered[address]


class _Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_event(self, event):
        self.cuda.calls.append((self.name, "waits", event.number))

    def synchronize(self):
        self.cuda.calls.append((self.name, "synchronize"))


class _Event:
    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number

    def record(self, stream):
        assert stream is self.cuda.current
        self.cuda.calls.append((stream.name, "records", self.number))

    def query(self):
        return ("done", self.number) in self.cuda.calls

    def synchronize(self):
        self.cuda.calls.append(("host", "waits", self.number))

    def elapsed_time(self, end):
        return 2.0


@pytest.fixture
def cuda(monkeypatch):
    made = RecordedCuda()
    monkeypatch.setattr(ring_copies, "_cuda", made)
    monkeypatch.setattr(pinned_weights, "_cuda", made)
    return made


@pytest.fixture(scope="module")
def pool():
    made = _C.ThreadPool([0], False, [0], [-1, -1])
    yield made
    made.close()


def test_order_of_a_copy(cuda):
    copies = CudaCopies(CPU)
    target, source = torch.zeros(8, dtype=torch.uint8), torch.arange(8).to(torch.uint8)
    mark = copies.mark()
    copy = copies.start([(target, source)], mark)
    copies.join(copy)
    copies.wait(copy)
    assert cuda.calls == [
        ("model", "records", mark.number),
        ("copies", "waits", mark.number),
        ("copies", "records", copy.number - 1),
        ("copies", "records", copy.number),
        ("model", "waits", copy.number),
        ("host", "waits", copy.number),
    ]
    assert torch.equal(target, source)
    assert copies.seconds == 0.0  # nobody has said that it is done
    cuda.calls.append(("done", copy.number))
    assert copies.seconds == pytest.approx(2e-3)
    copies.close()
    assert cuda.calls[-1] == ("copies", "synchronize")


def test_a_pinned_buffer_is_filled_again_when_it_was_read(cuda):
    buffers = [torch.empty(64, dtype=torch.uint8) for _ in range(2)]
    copies = StagedCopies(CudaCopies(CPU), buffers)
    started = []
    for number in range(5):
        target = torch.empty(40, dtype=torch.uint8)
        source = torch.full((40,), number, dtype=torch.uint8)
        started.append(copies.start([(target[:24], source[:24]), (target[24:], source[24:])], None))
        copies.join(started[-1])
        assert torch.equal(target, source)
    copies.close()
    ends = [copy.result().number for copy in started]
    for number in range(2, 5):
        begin = cuda.calls.index(("copies", "records", ends[number] - 1))
        assert ("host", "waits", ends[number - 2]) in cuda.calls[:begin]


def test_a_buffer_of_the_ring_is_written_when_it_was_unpacked(cuda, pool):
    """Each copy waits for the mark after the unpacking of what was in its buffer, each unpacking for its copy."""
    made = PackedExperts.make(
        "bf16", hidden_size=32, intermediate_size=32, num_experts=9, pool=pool
    )
    ring = ExpertRing([(made.cpu, range(9))] * 2, RingSize.of(32, 32, 1, [("bf16", "bf16")]), CPU)
    ring.prepare(in_place=True, copies=CudaCopies(CPU))
    x, ids = torch.randn(2, 32), torch.tensor([[0], [8]], dtype=torch.int32)
    for _ in range(2):
        with ring.step():
            for layer in (0, 1):
                ring.add(layer, x, ids, torch.ones(2, 1), torch.zeros(2, 32))
    marks = [call[2] for call in cuda.calls if call[:2] == ("model", "records")]
    waited = [call[2] for call in cuda.calls if call[:2] == ("copies", "waits")]
    assert waited == marks[: len(waited)]  # copy i + DEPTH waits for the mark of chunk i
    assert len(marks) == 36
    assert len(waited) == 36
    ends = [c[2] for c in cuda.calls if c[:2] == ("copies", "records")][1::2]
    joined = [call[2] for call in cuda.calls if call[:2] == ("model", "waits")]
    assert joined == ends[:36]
    assert len(ends) == 36 + DEPTH
    for i, mark in enumerate(marks):
        assert cuda.calls.index(("model", "waits", joined[i])) < cuda.calls.index(
            ("model", "records", mark)
        )
    ring.close()


def test_experts_in_ram_are_registered_and_no_others(cuda, pool):
    made = PackedExperts.make(
        "bf16", hidden_size=64, intermediate_size=64, num_experts=9, pool=pool
    )
    size = RingSize.of(64, 64, 2, [("bf16", "bf16")])
    ring = ExpertRing([(made.cpu, (0, 1, 2, 5, 6, 8))], size, CPU)
    pinned = PinnedWeights(ring._parts(), CPU)
    expected = {}
    for memory, part in zip(made.cpu.weights.buffers(), made.layout.slices, strict=True):
        for first, end in ((0, 3), (5, 7), (8, 9)):
            address = memory.ctypes.data + first * part.nbytes
            assert address % 4096 == 0
            expected[address] = (end - first) * part.nbytes
    assert cuda.registered == expected
    pinned.close()
    pinned.close()
    assert cuda.registered == {}
    again = PinnedWeights(ring._parts(), CPU)
    assert cuda.registered == expected
    del again
    assert cuda.registered == {}


def test_what_is_registered_already_stays_so(cuda):
    first, second = (torch.zeros(4096, dtype=torch.uint8) for _ in range(2))
    owner = PinnedWeights([first], CPU)
    both = PinnedWeights([first, second], CPU)
    assert set(cuda.registered) == {first.data_ptr(), second.data_ptr()}
    both.close()
    assert set(cuda.registered) == {first.data_ptr()}
    owner.close()


def test_a_refused_registration_leaves_nothing_behind(cuda):
    cuda.most_registered = 10_000
    parts = [torch.zeros(4096, dtype=torch.uint8) for _ in range(3)]
    with pytest.raises(RuntimeError, match="cudaHostRegister fails with error 2"):
        PinnedWeights(parts, CPU)
    assert cuda.registered == {}
