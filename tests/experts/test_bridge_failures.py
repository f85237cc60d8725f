"""The bridge when something goes wrong: no stream is left waiting, errors arrive, the next step is right."""

import threading
import time

import pytest
import torch

from moejet import _C
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.simulated_stream import SimulatedStream
from moejet.testing.bridge_steps import (
    EXPERTS,
    HIDDEN,
    INTER,
    LAYERS,
    MAX_TOKENS,
    TOP_K,
    MakeStream,
    example,
    make_bridge,
    make_layers,
    make_step,
)
from moejet.testing.fake_cuda import FakeStream


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_failing_worker_lets_the_stream_through(
    layers: list[CpuExperts], make_stream: MakeStream, layer: int, worker: int
) -> None:
    stream = make_stream(max_delay_s=1e-4)
    step, expected = make_step(layers, stream)
    for _ in range(2):
        assert torch.equal(step.run(), expected)
        step.bridge._native.fail_once(layer, worker)
        step.launch()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=f"^layer {layer}: worker {worker} failed as asked"):
            step.bridge.run_step(3)
        stream.synchronize()  # nothing waits any more
        assert time.monotonic() - start < 5
        assert step.out.isnan().all()
        with pytest.raises(RuntimeError, match=r"an earlier step failed .*as asked.*call reset"):
            step.bridge.run_step(3)
        step.bridge.reset()
    assert torch.equal(step.run(), expected)


@pytest.mark.parametrize("bad", [-2, EXPERTS, 1 << 30])
def test_ids_from_the_stream_are_checked(
    layers: list[CpuExperts], make_stream: MakeStream, bad: int
) -> None:
    stream = make_stream()
    step, expected = make_step(layers, stream)
    good = int(step.ids[1, 2, 0])
    step.ids[1, 2, 0] = bad
    step.launch()
    with pytest.raises(RuntimeError, match=rf"layer 1: topk_ids\[2, 0\]={bad} must be -1"):
        step.bridge.run_step(3)
    stream.synchronize()
    step.bridge.reset()
    step.ids[1, 2, 0] = good
    assert torch.equal(step.run(), expected)


def test_a_pool_that_is_closed_meanwhile(make_stream: MakeStream) -> None:
    pool = _C.ThreadPool([0, 1], pin=False)
    stream = make_stream()
    step, expected = make_step(make_layers(pool), stream)
    assert torch.equal(step.run(), expected)
    pool.close()
    step.launch()
    with pytest.raises(RuntimeError, match="closed"):
        step.bridge.run_step(3)
    step.bridge.reset()
    stream.synchronize()


def test_a_stream_that_dies(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    stream = make_stream()
    step, expected = make_step(layers, stream)
    stream.hang()
    step.launch()
    timer = threading.Timer(0.1, stream.fail, ("CUDA_ERROR_ILLEGAL_ADDRESS (700)",))
    timer.start()
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"layer 0: waiting for the GPU .*ILLEGAL_ADDRESS \(700\)"
    ):
        step.bridge.run_step(3)
    assert time.monotonic() - start < 5
    timer.join()
    with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS"):
        step.bridge.reset()
    with pytest.raises(RuntimeError, match="call reset"):
        step.bridge.run_step(3)
    stream.fail(None)
    stream.hang(False)
    step.bridge.reset()
    assert torch.equal(step.run(), expected)


def test_a_stream_that_never_submits(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    """It is let through when it comes back, also through replays that nobody served."""
    stream = make_stream()
    step, expected = make_step(layers, stream, timeout_s=0.2)
    stream.hang()
    step.launch()
    step.launch()
    with pytest.raises(
        RuntimeError, match=r"layer 0: waiting for the GPU .*nothing came for 0\.2 s"
    ):
        step.bridge.run_step(3)
    with pytest.raises(RuntimeError, match=r"still busy after 0\.1 s"):
        step.bridge.reset(timeout_s=0.1)
    stream.hang(False)
    step.bridge.reset()
    assert torch.equal(step.run(), expected)


def test_a_stream_that_submits_late(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    """After the timeout, with the numbers of the step before still in memory: they must not come out."""
    stream = make_stream()
    step, expected = make_step(layers, stream, timeout_s=0.2)
    assert torch.equal(step.run(), expected)
    stream.hang()
    step.launch()
    with pytest.raises(RuntimeError, match="nothing came"):
        step.bridge.run_step(3)
    stream.hang(False)
    time.sleep(0.1)
    assert (step.out == 123.0).all()  # it waits
    step.bridge.reset()
    assert step.out.isnan().all()
    assert torch.equal(step.run(), expected)


def test_a_step_that_was_launched_late(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    """After run_step has found the stream idle."""
    stream = make_stream()
    step, expected = make_step(layers, stream)
    assert torch.equal(step.run(), expected)
    with pytest.raises(RuntimeError, match="run out of work"):
        step.bridge.run_step(3)
    step.launch()
    step.bridge.reset()
    assert step.out.isnan().all()
    assert torch.equal(step.run(), expected)


def test_a_step_that_was_not_launched(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    stream = make_stream()
    step, expected = make_step(layers, stream)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="run out of work: launch the step before"):
        step.bridge.run_step(3)
    assert time.monotonic() - start < 5
    step.bridge.reset()
    assert torch.equal(step.run(), expected)


def test_a_step_that_was_not_served(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    """As after an exception between the launch and run_step."""
    stream = make_stream()
    step, expected = make_step(layers, stream)
    for _ in range(3):
        step.launch()
    step.bridge.reset()
    assert step.out.isnan().all()
    assert torch.equal(step.run(), expected)


def test_a_failure_spares_the_step_before(layers: list[CpuExperts]) -> None:
    """The stream may still be copying its result."""
    with SimulatedStream() as stream:
        bridge = make_bridge(layers, stream)
        (x, ids, mix), _ = example(layers, 3, 0)
        bridge.submit(2, x, ids[2], mix[2])
        bridge._native.run_step(3, [2])
        expected = torch.empty(3, HIDDEN)
        layers[2].run_kernels(x, ids[2], mix[2], expected)
        for query, message in ((None, "nothing came"), (lambda: True, "run out of work")):
            with pytest.raises(RuntimeError, match=message):
                bridge._native.run_step(3, timeout_s=0.01, query=query)
            bridge._native.reset()
            assert torch.equal(bridge._out[:3], expected)


def test_a_query_that_raises(layers: list[CpuExperts]) -> None:
    with SimulatedStream() as stream:
        bridge = make_bridge(layers, stream)
        with pytest.raises(RuntimeError, match=r"layer 0: .*KeyError: 'gone'"):
            bridge._native.run_step(1, query=lambda: {}["gone"])
        with pytest.raises(KeyError, match="gone"):
            bridge._native.reset(1.0, query=lambda: {}["gone"])


def test_one_server_at_a_time(layers: list[CpuExperts], make_stream: MakeStream) -> None:
    stream = make_stream()
    step, expected = make_step(layers, stream)
    stream.hang()
    step.launch()
    server = threading.Thread(target=step.bridge.run_step, args=(3,))
    server.start()
    time.sleep(0.05)
    with pytest.raises(RuntimeError, match="another thread is serving"):
        step.bridge.run_step(3)
    with pytest.raises(RuntimeError, match="another thread is serving"):
        step.bridge.reset()
    stream.hang(False)
    server.join(10)
    assert not server.is_alive()
    stream.synchronize()
    assert torch.equal(step.out, expected)


def test_memory_operations_that_do_not_work(layers: list[CpuExperts], fake_driver: str) -> None:
    """Host functions take their place, and the reason is known."""
    stream = FakeStream(fake_driver, host_functions=False, seed=0, max_delay_s=0.0)
    try:
        stream.library.fake_support_memory_operations(False)
        step, expected = make_step(layers, stream)
        assert stream.signals.mode == "host_functions"
        assert stream.signals.reason == "CUDA_ERROR_NOT_SUPPORTED (801)"
        assert torch.equal(step.run(), expected)
        stream.library.fake_support_memory_operations(True)
        make_bridge(layers, stream)
        assert (stream.signals.mode, stream.signals.reason) == ("memory_operations", "")
        stream.library.fake_let_writes_arrive(False)
        make_bridge(layers, stream)
        assert "within 2 s" in stream.signals.reason
        stream.library.fake_let_writes_arrive(True)
        stream.library.fake_support_memory_operations_in_graphs(False)
        step, expected = make_step(layers, stream)
        assert stream.signals.mode == "host_functions"
        assert stream.signals.reason == "in a graph: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)"
        assert torch.equal(step.run(), expected)
        assert stream.library.fake_num_streams() == 0  # but for those of the test
    finally:
        stream.library.fake_support_memory_operations_in_graphs(True)
        stream.library.fake_let_writes_arrive(True)
        stream.library.fake_support_memory_operations(True)
        stream.close()


def test_memory_operations_are_tried_when_the_stream_is_idle(
    layers: list[CpuExperts], fake_driver: str
) -> None:
    """What it has to do before that says nothing about them, however long it takes."""
    stream = FakeStream(fake_driver, host_functions=False, seed=0, max_delay_s=0.0)
    source, target = torch.ones(3), torch.zeros(3)
    stream.hang()
    stream.copy(target, source)
    timer = threading.Timer(2.3, stream.hang, (False,))
    timer.start()
    try:
        step, expected = make_step(layers, stream)
        assert torch.equal(target, source)
        assert (stream.signals.mode, stream.signals.reason) == ("memory_operations", "")
        assert torch.equal(step.run(), expected)
    finally:
        timer.join()
        stream.close()


def test_drivers_that_cannot_be_used(layers: list[CpuExperts]) -> None:
    with SimulatedStream() as stream:
        bridge = make_bridge(layers, stream)
        for library, message in (
            ("libnothing.so.9", r"cannot be loaded \(libnothing.so.9.*install the NVIDIA driver"),
            ("libc.so.6", "libc.so.6 has no cuLaunchHostFunc: install a newer"),
        ):
            with pytest.raises(RuntimeError, match=message):
                _C.CudaSignals(bridge._native, library, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (3, HIDDEN + 1)}, r"x has shape \[3, 97\], expected \[3, 96\]"),
        ({"x": (0, HIDDEN)}, "x has 0 rows: the bridge takes 1 to max_tokens=40"),
        ({"x": (MAX_TOKENS + 1, HIDDEN)}, "x has 41 rows"),
        ({"ids": (3, TOP_K + 1)}, r"topk_ids has shape \[3, 3\], expected \[3, 2\]"),
        ({"mix": (2, TOP_K)}, r"topk_weights has shape \[2, 2\], expected \[3, 2\]"),
    ],
)
def test_wrong_tensors_are_refused(
    layers: list[CpuExperts], change: dict[str, tuple[int, int]], message: str
) -> None:
    with SimulatedStream() as stream:
        bridge = make_bridge(layers, stream)
        shapes = {"x": (3, HIDDEN), "ids": (3, TOP_K), "mix": (3, TOP_K), **change}
        tensors = [torch.zeros(shapes["x"]), torch.zeros(shapes["ids"], dtype=torch.int32)]
        with pytest.raises(ValueError, match=message):
            bridge.submit(0, *tensors, torch.zeros(shapes["mix"]))


def test_wrong_use_is_refused(layers: list[CpuExperts], pool: _C.ThreadPool) -> None:
    with pytest.raises(ValueError, match="layers is empty"), SimulatedStream() as stream:
        make_bridge([], stream)
    other = _C.ThreadPool([0], pin=False)
    with (
        pytest.raises(ValueError, match=r"layers\[3\] has another pool"),
        SimulatedStream() as stream,
    ):
        make_bridge([*layers, make_layers(other)[0]], stream)
    wide = CpuExperts(EXPERTS, HIDDEN + 32, INTER, format="int8", pool=pool)
    with (
        pytest.raises(ValueError, match=r"layers\[3\] has hidden size 128"),
        SimulatedStream() as s,
    ):
        make_bridge([*layers, wide], s)
    with SimulatedStream() as stream:
        bridge = make_bridge(layers, stream)
        with pytest.raises(ValueError, match="layer=1 was not submitted"):
            bridge.collect(1)
        (x, ids, mix), _ = example(layers, 2, 0)
        bridge.submit(1, x, ids[1], mix[1])
        with pytest.raises(ValueError, match="layer=1 was submitted already"):
            bridge.submit(1, x, ids[1], mix[1])
        bridge.reset()
        for num_tokens in (0, MAX_TOKENS + 1, -1):
            with pytest.raises(ValueError, match=f"num_tokens={num_tokens} must be between 1 and"):
                bridge.run_step(num_tokens)
        native = bridge._native
        for layer in (-1, LAYERS):
            for call in (native.submit, native.wait, lambda n: native.run_step(1, [n])):
                with pytest.raises(ValueError, match=f"layer={layer} must be between 0 and 2"):
                    call(layer)
        with pytest.raises(ValueError, match="worker=2 must be between 0 and 1"):
            native.fail_once(0, 2)


def test_wrong_memory_is_refused(layers: list[CpuExperts], pool: _C.ThreadPool) -> None:
    flags = torch.zeros(2 * LAYERS + 2, _C.FLAG_WORDS, dtype=torch.int32)
    good = {
        "x": torch.zeros(4, HIDDEN),
        "topk_ids": torch.zeros(4, TOP_K, dtype=torch.int32),
        "topk_weights": torch.zeros(4, TOP_K),
        "out": torch.zeros(4, HIDDEN),
        "flags": flags[:-1],
    }
    weights = [layer.weights for layer in layers]
    _C.ExpertBridge(pool, weights, **good)
    shifted = flags.flatten()[1 : 1 + (2 * LAYERS + 1) * _C.FLAG_WORDS].view(-1, _C.FLAG_WORDS)
    for name, bad, error, message in (
        ("x", torch.zeros(4, HIDDEN, dtype=torch.float16), TypeError, "x"),
        ("topk_ids", torch.zeros(4, TOP_K, dtype=torch.int64), TypeError, "topk_ids"),
        ("topk_weights", torch.zeros(5, TOP_K), ValueError, "topk_weights"),
        ("out", torch.zeros(4, HIDDEN * 2)[:, ::2], ValueError, "out"),
        ("flags", flags, ValueError, "flags"),
        ("flags", shifted, ValueError, "flags must begin on a 64-byte boundary"),
    ):
        with pytest.raises(error, match=message):
            _C.ExpertBridge(pool, weights, **{**good, name: bad})
