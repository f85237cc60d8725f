"""Workers that do not come back: an error in time, nobody left waiting, nothing computed before they are back."""

import gc
import threading
import time

import pytest
import torch

from moejet import _C
from moejet.environment import env_worker_timeout
from moejet.experts import bridge as bridge_module
from moejet.experts.simulated_stream import SimulatedStream
from moejet.testing.bridge_steps import LAYERS, MakeStream, example, make_layers, make_step

LIMIT, STUCK = 0.2, 1.2  # seconds; the work of these layers adds less than a millisecond


@pytest.fixture
def own_pool():
    pool = _C.ThreadPool([0, 1], pin=False)
    yield pool
    pool.close()


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_stuck_worker_is_an_error_in_time(
    own_pool: _C.ThreadPool, make_stream: MakeStream, layer: int
) -> None:
    stream = make_stream()
    step, expected = make_step(make_layers(own_pool), stream, worker_timeout_s=LIMIT)
    assert torch.equal(step.run(), expected)
    step.bridge._native.fail_once(layer, 1, STUCK)
    step.launch()
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=rf"^layer {layer}: worker 1 did not finish within 0\.2 s"
    ):
        step.bridge.run_step(3)
    stream.synchronize()  # nothing waits for the CPU any more
    assert LIMIT <= time.monotonic() - start < STUCK
    # Nothing is computed while it is missing: neither here nor by others.
    step.launch()
    for call in (lambda: step.bridge.run_step(3), step.bridge.reset):
        with pytest.raises(RuntimeError, match="did not finish"):
            call()
    stream.synchronize()
    assert step.out.isnan().all()
    with pytest.raises(RuntimeError, match="worker 1 is not back from work"):
        own_pool.probe()
    assert time.monotonic() - start < STUCK
    time.sleep(max(0.0, start + STUCK + 0.2 - time.monotonic()))
    assert len(own_pool.probe()) == 2
    step.bridge.reset()
    for _ in range(3):
        assert torch.equal(step.run(), expected)


def test_eager_layers_have_the_same_limit(own_pool: _C.ThreadPool) -> None:
    layers = make_layers(own_pool)
    with SimulatedStream() as stream:
        step, expected = make_step(layers, stream, worker_timeout_s=LIMIT)
        step.bridge._native.fail_once(1, 1, STUCK)
        (x, ids, mix), expected = example(layers, 3, 1)
        start = time.monotonic()

        def run() -> torch.Tensor:
            values = x
            for layer in range(LAYERS):
                step.bridge.submit(layer, values, ids[layer], mix[layer])
                values = step.bridge.collect(layer)
            return values

        with pytest.raises(RuntimeError, match="layer 1: worker 1 did not finish"):
            run()
        assert time.monotonic() - start < STUCK
        time.sleep(max(0.0, start + STUCK + 0.2 - time.monotonic()))
        step.bridge.reset()
        assert torch.equal(run(), expected)


def test_a_worker_that_another_bridge_waits_for(own_pool: _C.ThreadPool) -> None:
    """Also before the first layer, when workers are woken."""
    layers = make_layers(own_pool)
    with SimulatedStream() as first, SimulatedStream() as second:
        step, _ = make_step(layers, first, worker_timeout_s=LIMIT)
        other, expected = make_step(layers, second, worker_timeout_s=LIMIT)
        step.bridge._native.fail_once(0, 1, STUCK)
        step.launch()
        with pytest.raises(RuntimeError, match="did not finish"):
            step.bridge.run_step(3)
        start = time.monotonic()
        second.hang()
        other.launch()
        timer = threading.Timer(0.1, second.hang, (False,))
        timer.start()
        with pytest.raises(RuntimeError, match="layer 0: worker 1 is not back"):
            other.bridge.run_step(3)
        timer.join()
        with pytest.raises(RuntimeError, match="worker 1 is not back"):
            other.bridge.reset()
        assert time.monotonic() - start < STUCK - LIMIT
        time.sleep(STUCK)
        other.bridge.reset()
        assert torch.equal(other.run(), expected)
        step.bridge.reset()


def test_what_a_missing_worker_may_use_is_kept(
    own_pool: _C.ThreadPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "_abandoned", [])
    monkeypatch.setattr(bridge_module, "_RELEASE_SECONDS", 0.1)
    with SimulatedStream() as stream:
        step, _ = make_step(make_layers(own_pool), stream, worker_timeout_s=LIMIT)
        step.bridge._native.fail_once(0, 1, STUCK)
        step.launch()
        with pytest.raises(RuntimeError, match="did not finish"):
            step.bridge.run_step(3)
        with pytest.raises(RuntimeError, match="worker 1 is not back"):
            step.bridge.close()
        del step
        gc.collect()
        assert len(bridge_module._abandoned) == 1
        time.sleep(STUCK)


def test_closing_a_pool_without_its_worker() -> None:
    pool = _C.ThreadPool([0, 1], pin=False)
    with SimulatedStream() as stream:
        step, _ = make_step(make_layers(pool), stream, worker_timeout_s=LIMIT)
        step.bridge._native.fail_once(0, 1, 3.5)
        step.launch()
        with pytest.raises(RuntimeError, match="did not finish"):
            step.bridge.run_step(3)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="worker 1 of this ThreadPool cannot be ended"):
            pool.close()
        assert time.monotonic() - start < 3
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            pool.probe()
        time.sleep(max(0.0, 3.7 - (time.monotonic() - start)))  # it comes back, and ends


def test_the_limit_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEJET_WORKER_TIMEOUT", raising=False)
    assert env_worker_timeout() == 3.0
    monkeypatch.setenv("MOEJET_WORKER_TIMEOUT", "0.5")
    assert env_worker_timeout() == 0.5
    for wrong in ("0", "soon", "-1", "nan"):
        monkeypatch.setenv("MOEJET_WORKER_TIMEOUT", wrong)
        with pytest.raises(ValueError, match=f"MOEJET_WORKER_TIMEOUT='{wrong}'"):
            env_worker_timeout()
