"""The cache's way from use to slot: what the table says, when it changes, and what the CPU is handed meanwhile."""

import random

import numpy as np
import pytest
import torch

from moejet import _C
from moejet.experts.bridge import CpuBridge
from moejet.experts.cache_policy import CachePolicy, Swap
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.expert_cache import ExpertCache
from moejet.experts.hybrid_experts import HybridExperts
from moejet.experts.resident_experts import ResidentExperts
from moejet.experts.simulated_stream import (
    SimulatedFetchStream,
    SimulatedMark,
    SimulatedStream,
)
from moejet.testing.random_swaps import RandomSwaps
from moejet.weights.gpu_weights import dequantize

EXPERTS, HIDDEN, INTER, TOP_K, FREE = 10, 64, 64, 3, 3
CPU = torch.device("cpu")


class LateFetchStream(SimulatedFetchStream):
    """Counts arrive late as well: the model's marks are done after they have been asked for a few times."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed, max_delay_s=2e-4)
        self._random = random.Random(seed)

    def mark_model(self) -> SimulatedMark:
        mark, answers = super().mark_model(), self._random.randrange(3)

        class Late(SimulatedMark):
            def is_done(self) -> bool:
                nonlocal answers
                answers -= 1
                return answers < 0

        late = Late()
        late.reach()
        assert mark.is_done()
        return late


def _layers(pool: _C.ThreadPool, count: int, format: str = "bf16", fixed=(1,), free: int = FREE):
    made = []
    for seed in range(count):
        cpu = CpuExperts(EXPERTS, HIDDEN, INTER, format=format, pool=pool, isa="avx2")
        cpu.fill_random(seed)
        shape = (EXPERTS, HIDDEN, INTER)
        resident = ResidentExperts(
            fixed, *shape, format=format, down_format=format, device=CPU, num_free=free
        )
        for expert in fixed:  # the same weights as in RAM, so that results can be compared
            for name, w in zip(("gate", "up", "down"), cpu.dequantize(expert), strict=True):
                HybridExperts(None, resident).set_projection(expert, name, w)
        made.append(HybridExperts(cpu, resident))
    return made


def _step(layers, seed: int, tokens: int = 4):
    """Runs all layers, each on fresh tokens, through the bridge and without a device."""
    generator = torch.Generator().manual_seed(seed)
    used = np.zeros((len(layers), EXPERTS), dtype=np.int64)
    for number, layer in enumerate(layers):
        x = torch.randn(tokens, HIDDEN, generator=generator)
        ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].int()
        ids[0, 0] = -1
        weights = torch.rand(tokens, TOP_K, generator=generator)
        layer.submit(x, ids, weights)
        got = layer.collect()
        expected = torch.empty_like(x)
        layer.cpu.run_kernels(x, ids, weights, expected)
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
        used[number] = np.bincount(ids[ids >= 0].numpy(), minlength=EXPERTS)
    return used


def _bridge(layers, stream: SimulatedStream) -> CpuBridge:
    cpu = [layer.cpu for layer in layers]
    bridge = CpuBridge(cpu, stream, top_k=TOP_K, max_tokens=8, dtype=torch.float32)
    for number, layer in enumerate(layers):
        layer.attach(bridge, number)
    return bridge


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", [SimulatedFetchStream, lambda: LateFetchStream(3)])
def test_storms_of_swaps_change_no_result(pool: _C.ThreadPool, make, in_place: bool) -> None:
    layers = _layers(pool, 2)
    policy = RandomSwaps(EXPERTS, [FREE, FREE], fixed=[{1}, {1}], seed=4)
    with SimulatedStream(seed=1, max_delay_s=1e-5) as stream:
        bridge = _bridge(layers, stream)
        cache = ExpertCache(layers, make(), policy, num_buffers=2)
        if in_place:
            cache.read_in_place()
        expected_uses = 0
        for seed in range(60):
            cache.advance()
            expected_uses += int(_step(layers, seed).sum())
            for layer, table in zip(layers, policy.is_cached, strict=True):
                slots = layer.resident.slot_of_expert.numpy()
                assert (slots[table] >= 1).all()
                named = slots[slots >= 0]
                assert len(set(named.tolist())) == len(named)
                assert slots[1] == 0
        for _ in range(8):
            cache.advance()
        cache.close()
        counters = cache.counters
        assert counters.uses == expected_uses
        assert 0 < counters.hits < counters.uses
        assert counters.fetches > 20
        assert counters.fetched_bytes == counters.fetches * layers[0].cpu.packed_layout.expert_bytes
        assert counters.copy_seconds > 0
        # What the cache has computed did not go to the CPU.
        assert bridge.counters()["distinct_experts"] > 0


def test_experts_that_are_divided_among_nodes() -> None:
    pool = _C.ThreadPool([0, 1], pin=False, worker_nodes=[0, 1], memory_nodes=[-1, -1])
    for in_place in (False, True):
        [layer] = _layers(pool, 1, "int8")
        assert len(layer.cpu.packed_slices(3)) == 2
        policy = Scripted(Swap(0, 3, 1, -1))
        with SimulatedStream() as model:
            _bridge([layer], model)
            fetches = GatedFetchStream()
            cache = ExpertCache([layer], fetches, policy, num_buffers=1)
            if in_place:
                cache.read_in_place()
            for _ in range(4):
                cache.advance()
                for fetch in cache._fetches:
                    assert fetch.copied is None or fetch.copied.result(10) is None
                fetches.synchronize()
            assert layer.resident.slot_of_expert[3] == 2
            gate, up, down = layer.cpu.dequantize(3)
            assert torch.equal(dequantize(layer.resident.gate_up[2]), torch.stack((gate, up)))
            assert torch.equal(dequantize(layer.resident.down[2]), down)
            cache.close()
    pool.close()


class Scripted:
    """Names the swaps that it is given."""

    def __init__(self, *swaps: Swap) -> None:
        self.is_cached = np.zeros((1, EXPERTS), dtype=bool)
        self.swaps, self.seen, self.events = list(swaps), [], []

    def observe(self, uses, steps):
        self.seen.append((uses.copy(), steps))

    def choose(self, most):
        chosen, self.swaps = self.swaps[:most], self.swaps[most:]
        for swap in chosen:
            if swap.evicted >= 0:
                self.is_cached[0, swap.evicted] = False
        return chosen

    def finish(self, swap):
        self.is_cached[0, swap.expert] = True
        self.events.append(("finish", swap))

    def give_up(self, swap):
        self.events.append(("give up", swap))


class GatedFetchStream(SimulatedFetchStream):
    """Its operations wait until the gate is opened, or the next part of the work is let through."""

    def hang(self, hangs: bool) -> None:
        self._stream.hang(hangs)

    def synchronize(self) -> None:
        self._stream.synchronize()


def _copies_are_done(cache: ExpertCache) -> None:
    for fetch in cache._fetches:
        fetch.copied.result(10)


def test_one_swap_step_by_step(pool: _C.ThreadPool) -> None:
    """The slot is written only while no entry leads to it, and is named only when it has been written."""
    [layer] = _layers(pool, 1)
    first, second = Swap(0, 7, 2, -1), Swap(0, 4, 2, 7)
    policy, stream = Scripted(first), GatedFetchStream()
    table = lambda: layer.resident.slot_of_expert.tolist()  # noqa: E731
    with SimulatedStream() as model:
        _bridge([layer], model)
        cache = ExpertCache([layer], stream, policy, num_buffers=1)
        stream.hang(True)
        cache.advance()  # nothing is known yet
        assert cache._fetches == []
        cache.advance()
        _copies_are_done(cache)
        assert cache._fetches[0].marks is None
        cache.advance()
        assert cache._fetches[0].marks is not None
        for _ in range(3):
            cache.advance()
            assert table() == [-1, 0] + [-1] * 8
        stream.hang(False)
        stream.synchronize()
        assert table()[7] == -1  # steps that are running see no change
        cache.advance()
        assert table()[7] == 3
        assert policy.events == [("finish", first)]
        gate, up, down = layer.cpu.dequantize(7)
        assert torch.equal(layer.resident.gate_up.codes[3].float(), torch.stack((gate, up)))
        assert torch.equal(layer.resident.down.codes[3].float(), down)
        policy.swaps.append(second)
        stream.hang(True)
        before = layer.resident.down.codes[3].clone()
        cache.advance()  # evicted before anything is written
        assert table()[7] == -1
        _copies_are_done(cache)
        cache.advance()
        assert torch.equal(layer.resident.down.codes[3], before)
        stream.hang(False)
        stream.synchronize()
        cache.advance()
        assert table()[4] == 3
        assert torch.equal(layer.resident.down.codes[3].float(), layer.cpu.dequantize(4)[2])
        cache.close()


def test_a_copy_that_fails_costs_nothing(pool: _C.ThreadPool, monkeypatch, caplog) -> None:
    [layer] = _layers(pool, 1)
    policy = Scripted(Swap(0, 7, 0, -1))
    with SimulatedStream() as model:
        _bridge([layer], model)
        cache = ExpertCache([layer], SimulatedFetchStream(), policy, num_buffers=1)
        with monkeypatch.context() as patch:
            patch.setattr("moejet.experts.expert_cache._copy_slices", lambda *_: 1 / 0)
            cache.advance()
            cache.advance()
            cache._fetches[0].copied.exception(10)
            cache.advance()
        assert policy.events == [("give up", Swap(0, 7, 0, -1))]
        assert "not fetched" in caplog.text
        assert len(cache._free) == 1
        assert (layer.resident.slot_of_expert < 1).all()
        _step([layer], 0)
        cache.close()


def test_counts_go_round_and_padding_is_not_counted(pool: _C.ThreadPool) -> None:
    [layer] = _layers(pool, 1)
    policy = Scripted()
    with SimulatedStream() as model:
        _bridge([layer], model)
        cache = ExpertCache([layer], SimulatedFetchStream(), policy, num_buffers=1)
        layer.uses.fill_(2**31 - 2)
        cache._last_counts.fill(2**31 - 2)
        for seed in range(3):
            cache.advance()
            used = _step([layer], seed)
            cache.advance()
            cache.advance()
            assert (policy.seen[-1][0] == used).all()
            assert seed == 0 or not policy.seen[-2][0].any()
        assert [steps for _, steps in policy.seen] == [1] * 7
        cache.close()


def test_the_policy_sees_to_it_that_what_is_used_is_there(pool: _C.ThreadPool) -> None:
    """All of it together: two experts that every token asks for are soon in their slots."""
    [layer] = _layers(pool, 1, free=2)
    size = layer.cpu.packed_layout.expert_bytes
    policy = CachePolicy(EXPERTS, [2], [size], fixed=[{1}], price=2.0, bytes_per_step=size)
    with SimulatedStream() as model:
        bridge = _bridge([layer], model)
        cache = ExpertCache([layer], SimulatedFetchStream(), policy, num_buffers=4)
        x, weights = torch.randn(2, HIDDEN), torch.rand(2, TOP_K)
        ids = torch.tensor([[5, 1, 8], [8, 5, 5]], dtype=torch.int32)
        for _ in range(40):
            cache.advance()
            layer.submit(x, ids, weights)
            layer.collect()
            for fetch in cache._fetches:
                fetch.copied.result(10)
        assert set(np.flatnonzero(policy.is_cached[0])) == {5, 8}
        before = bridge.counters()["distinct_experts"]
        layer.submit(x, ids, weights)
        layer.collect()
        assert bridge.counters()["distinct_experts"] == before
        assert cache.counters.fetches == 2
        cache.close()
