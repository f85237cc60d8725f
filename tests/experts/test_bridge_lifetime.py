"""Which stream a bridge asks, and how long its memory lives."""

import ctypes
import gc
import logging
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moejet.experts import bridge as bridge_module
from moejet.experts.bridge import CpuBridge, CudaStream
from moejet.experts.cpu_experts import CpuExperts
from moejet.testing.bridge_steps import (
    HIDDEN,
    LAYERS,
    MakeStream,
    example,
    make_bridge,
    make_step,
)
from moejet.testing.fake_cuda import FakeStream


class Cuda:
    """PyTorch's current stream, on a stand-in for the driver."""

    def __init__(self, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver = driver
        self.is_capturing = False
        self.streams: list[FakeStream] = []
        self.current = self.create()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.torch(self.current))
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda: self.current.is_capturing
        )

    def create(self) -> FakeStream:
        stream = FakeStream(self.driver, host_functions=False, seed=0, max_delay_s=0.0)
        self.streams.append(stream)
        return stream

    @staticmethod
    def torch(stream: FakeStream) -> Any:
        return SimpleNamespace(cuda_stream=stream.handle)

    def bridge(self, layers: list[CpuExperts], **changes: Any) -> CpuBridge:
        stream = CudaStream(torch.device("cpu"), driver=self.driver)
        stream.pin_memory = False
        return CpuBridge(
            layers, stream, top_k=2, max_tokens=4, dtype=torch.float32, timeout_s=5.0, **changes
        )


@pytest.fixture
def cuda(fake_driver: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Cuda(fake_driver, monkeypatch)
    yield made
    for stream in made.streams:
        stream.call_driver("fake_destroy")


def late(stream: FakeStream) -> threading.Timer:
    """The stream hangs for longer than the time after which it is asked how it is."""
    stream.hang()
    timer = threading.Timer(0.1, stream.hang, (False,))
    timer.start()
    return timer


def test_the_stream_of_the_last_eager_layer_is_asked(layers: list[CpuExperts], cuda: Cuda) -> None:
    """As where another thread, with another current stream, serves or resets."""
    used = cuda.current
    bridge = cuda.bridge(layers)
    (x, ids, mix), _ = example(layers, 3, 0)
    expected = torch.empty(3, HIDDEN)
    layers[0].run_kernels(x, ids[0], mix[0], expected)
    timer = late(used)
    bridge.submit(0, x, ids[0], mix[0])
    cuda.current = cuda.create()
    bridge._serve(3, [0])
    assert torch.equal(bridge._out[:3], expected)
    timer.join()
    timer = late(used)
    used.copy(torch.zeros(3), torch.ones(3))
    bridge.reset()
    assert used.call_driver("cuStreamQuery") == 0
    timer.join()
    bridge.close()


def test_the_stream_of_a_capture_is_not_asked(layers: list[CpuExperts], cuda: Cuda) -> None:
    """It has nothing to do when the graph is replayed on another."""
    replaying, capturing = cuda.current, cuda.create()
    bridge = cuda.bridge(layers)
    inputs = [torch.zeros(1, HIDDEN), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2)]
    cuda.current = capturing
    with capturing.capture() as graph:
        for layer in range(LAYERS):
            bridge.submit(layer, *inputs)
            bridge.collect(layer)
    cuda.current = replaying
    timer = late(replaying)
    replaying.call_driver("fake_replay", ctypes.c_void_p(graph.handle))
    cuda.current = capturing
    bridge.run_step(1)
    timer.join()
    bridge.close()
    assert replaying.call_driver("cuStreamQuery") == 0


def test_a_named_stream_is_asked_and_remembered(layers: list[CpuExperts], cuda: Cuda) -> None:
    named = cuda.create()
    bridge = cuda.bridge(layers)
    timer = late(named)
    for layer in range(LAYERS):
        bridge.stream._attached.submit(layer, named.handle)
        bridge.stream._attached.wait(layer, named.handle)
    bridge._handed.topk_ids.fill_(-1)
    bridge.run_step(1, cuda.torch(named))
    timer.join()
    timer = late(named)
    named.copy(torch.zeros(3), torch.ones(3))
    bridge.reset()
    assert named.call_driver("cuStreamQuery") == 0
    timer.join()
    bridge.close()


def test_one_bridge_for_a_cuda_stream_at_a_time(layers: list[CpuExperts], cuda: Cuda) -> None:
    bridge = cuda.bridge(layers)
    options = {"top_k": 2, "max_tokens": 4}
    with pytest.raises(ValueError, match="serves another CpuBridge"):
        CpuBridge(layers, bridge.stream, **options)
    bridge.close()
    CpuBridge(layers, bridge.stream, **options).close()


@pytest.mark.parametrize("is_closed", [True, False])
def test_memory_is_freed_when_the_stream_is_idle(
    layers: list[CpuExperts], cuda: Cuda, is_closed: bool
) -> None:
    """By close or by the collector, although it waits for layers that nobody serves."""
    bridge = cuda.bridge(layers)
    signals = bridge.stream._attached
    for layer in range(LAYERS):
        signals.submit(layer, cuda.current.handle)
        signals.wait(layer, cuda.current.handle)
    del signals
    flags = weakref.ref(bridge._flags)
    if is_closed:
        bridge.close()
        bridge.close()
        assert bridge.counters()["layers"] == 0
        with pytest.raises(RuntimeError, match="closed"):
            bridge.run_step(1)
        with pytest.raises(RuntimeError, match="closed"):
            bridge.reset()
    else:
        del bridge
    gc.collect()
    assert cuda.current.call_driver("cuStreamQuery") == 0
    assert flags() is None


def test_memory_that_a_stream_may_use_is_kept(
    layers: list[CpuExperts],
    make_stream: MakeStream,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bridge_module, "_abandoned", [])
    monkeypatch.setattr(bridge_module, "_RELEASE_SECONDS", 0.1)
    stream = make_stream()
    step, _ = make_step(layers, stream)
    flags = weakref.ref(step.bridge._flags)
    stream.hang()
    step.launch()
    with pytest.raises(RuntimeError, match=r"still busy after 0\.05 s"):
        step.bridge.close(timeout_s=0.05)
    with caplog.at_level(logging.WARNING):
        del step
        gc.collect()
    assert "memory is not freed" in caplog.text
    assert flags() is not None
    [(native, _)] = bridge_module._abandoned
    stream.hang(False)
    native.reset(5.0, **stream.state())
    stream.synchronize()


def test_a_collected_bridge_leaves_a_closed_stream_alone(
    layers: list[CpuExperts], make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "_abandoned", [])
    stream = make_stream()
    bridge = make_bridge(layers, stream)
    stream.close()
    del bridge
    gc.collect()
    assert bridge_module._abandoned == []
