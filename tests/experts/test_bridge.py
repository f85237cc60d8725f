"""The bridge between a stream and the CPU's experts, on simulated streams and on a stand-in for the CUDA driver."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moejet import _C
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.simulated_stream import SimulatedStream
from moejet.testing.bridge_steps import (
    HIDDEN,
    LAYERS,
    MAX_TOKENS,
    MakeStream,
    Step,
    example,
    make_bridge,
    make_layers,
    make_step,
)
from moejet.testing.fake_cuda import FakeStream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, MAX_TOKENS])
def test_replays_equal_the_kernels(
    layers: list[CpuExperts], make_stream: MakeStream, num_tokens: int, dtype: torch.dtype
) -> None:
    stream = make_stream()
    step = Step(make_bridge(layers, stream, dtype=dtype), stream, num_tokens, dtype)
    for seed in range(5):
        inputs, expected = example(layers, num_tokens, seed, dtype)
        step.set(*inputs)
        assert torch.equal(step.run(), expected)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("isa", ["scalar", "amx_emulated"])
def test_every_format(isa: str, usable_isa: Callable[[str], str], pool: _C.ThreadPool) -> None:
    for format in ("int8", "fp8", "bf16"):
        layers = make_layers(pool, format, usable_isa(isa))
        with SimulatedStream() as stream:
            step, expected = make_step(layers, stream, 20)
            assert torch.equal(step.run(), expected)


def test_thousands_of_handovers_with_random_delays(
    layers: list[CpuExperts], make_stream: MakeStream
) -> None:
    """Graphs of several sizes in turn, and up to three replays launched before the first one is served."""
    stream = make_stream(seed=1, max_delay_s=30e-6)
    bridge = make_bridge(layers, stream)
    steps = [Step(bridge, stream, n, torch.float32) for n in (1, 4)]
    examples = [[example(layers, step.num_tokens, seed) for seed in range(6)] for step in steps]
    chosen = random.Random(2)
    # A thread of the interpreter takes long for each operation.
    for _ in range(50 if isinstance(stream, SimulatedStream) else 350):
        number = chosen.randrange(len(steps))
        step = steps[number]
        inputs, expected = chosen.choice(examples[number])
        step.set(*inputs)
        replays = chosen.randint(1, 3)
        for _ in range(replays):
            step.launch()
        for _ in range(replays):
            if chosen.random() < 0.3:
                time.sleep(chosen.random() * 300e-6)
            bridge.run_step(step.num_tokens)
        stream.synchronize()
        assert torch.equal(step.out, expected)
    assert bridge.counters()["layers"] == bridge.counters()["steps"] * LAYERS >= 150


def test_eager_layers_are_served_by_collect(
    layers: list[CpuExperts], make_stream: MakeStream
) -> None:
    stream = make_stream(seed=3, max_delay_s=1e-4)
    bridge = make_bridge(layers, stream)
    for seed in range(10):
        (x, ids, mix), expected = example(layers, 1 + seed, seed)
        for layer in range(LAYERS):
            bridge.submit(layer, x, ids[layer], mix[layer])
            x = bridge.collect(layer)
        assert torch.equal(x, expected)
    counters = bridge.counters()
    assert (counters["steps"], counters["layers"]) == (10, 10 * LAYERS)


def test_rows_without_experts_are_zero(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    stream = make_stream()
    bridge = make_bridge(layers, stream, dtype=torch.bfloat16, out_dtype=torch.float32)
    (x, ids, mix), _ = example(layers, 6, 0, torch.bfloat16)
    for dead in ([0, 5], range(6)):
        some = ids[0].clone()
        some[list(dead)] = -1
        bridge._out.fill_(float("nan"))
        bridge.submit(0, x, some, mix[0])
        out = bridge.collect(0)
        assert out.dtype == torch.float32
        assert torch.equal(out[list(dead)], torch.zeros(len(dead), HIDDEN))
        expected = torch.empty(6, HIDDEN)
        layers[0].run_kernels(x, some, mix[0], expected)
        assert torch.equal(out, expected)
    distinct = bridge.counters()["distinct_experts"]
    alive = ids[0][1:5]
    assert distinct == len(alive[alive >= 0].unique())
    assert bridge.counters()["weight_bytes"] == distinct * layers[0].weights.expert_nbytes


def test_two_bridges_share_a_pool(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    """Also with host functions that wait: the pool is not held while a bridge waits for its stream."""
    wrong: list[str] = []

    def work(number: int) -> None:
        stream = streams[number]
        step, expected = make_step(layers, stream, 1 + number)
        for _ in range(60):
            if not torch.equal(step.run(), expected):
                wrong.append(f"bridge {number}")

    streams = [make_stream(seed=n, max_delay_s=1e-4) for n in range(2)]
    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_fork_is_refused_and_the_child_exits(tmp_path: Path) -> None:
    program = """
import os, sys, torch
from moejet import _C
pool = _C.ThreadPool([0, 1], pin=False)
weights = _C.ExpertWeights(2, 64, 64, "int8")
memory = [torch.zeros(2, 64), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1), torch.ones(2, 64)]
bridge = _C.ExpertBridge(pool, [weights], *memory, torch.ones(3, _C.FLAG_WORDS, dtype=torch.int32))
child = os.fork()
if child == 0:
    code = 0
    for call in (lambda: bridge.run_step(1), bridge.reset):
        try:
            call()
            code = 2
        except RuntimeError as error:
            code = code if "fork" in str(error) else 3
    del bridge, pool
    sys.exit(code)
_, status = os.waitpid(child, 0)
bridge.submit(0)
bridge.run_step(2)
bridge.wait(0)
assert (memory[3] == 0).all()
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_nothing_is_left_behind(layers: list[CpuExperts], fake_driver: str) -> None:
    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def work(count: int) -> None:
        for i in range(count):
            stream = FakeStream(fake_driver, host_functions=i % 2 == 0, seed=i, max_delay_s=0.0)
            step, expected = make_step(layers, stream)
            assert torch.equal(step.run(), expected)
            step.bridge._native.fail_once(0, 1)
            step.launch()
            with pytest.raises(RuntimeError, match="as asked"):
                step.bridge.run_step(3)
            step.bridge.reset()
            stream.close()

    work(40)
    before, threads = resident_bytes(), len(os.listdir("/proc/self/task"))
    work(200)
    assert resident_bytes() - before < 1 << 20
    assert len(os.listdir("/proc/self/task")) == threads


def test_answers_at_once_without_computing(
    layers: list[CpuExperts], make_stream: MakeStream
) -> None:
    """To time the stream's share: zeros, which the last layer leaves, and nothing is counted."""
    stream = make_stream()
    step, expected = make_step(layers, stream)
    assert torch.equal(step.run(), expected)
    counted = step.bridge.counters()
    with step.bridge.answering_at_once():
        assert not step.run().any()
    after = step.bridge.counters()
    for name in ("steps", "layers", "layer_s", "distinct_experts", "weight_bytes"):
        assert after[name] == counted[name]
    assert torch.equal(step.run(), expected)
    assert step.bridge.counters()["layers"] == counted["layers"] + LAYERS
