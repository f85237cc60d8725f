"""The bridge between a stream and the CPU's experts, on simulated streams and on a stand-in for the CUDA driver."""

import ctypes
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.experts.bridge import CpuBridge
from moejet.experts.cpu_experts import CpuExperts
from moejet.testing.simulated_stream import SimulatedStream

EXPERTS, HIDDEN, INTER, TOP_K, LAYERS, MAX_TOKENS = 5, 96, 80, 2, 3, 40


class FakeStream:
    """A stream of fake_cuda.cpp, driven by the code that drives CUDA streams."""

    device = torch.device("cpu")
    pin_memory = False

    def __init__(self, path: str, *, host_functions: bool, seed: int, max_delay_s: float) -> None:
        self.library = ctypes.CDLL(path)
        self.library.fake_create.restype = ctypes.c_void_p
        self._path, self._host_functions = path, host_functions
        self.handle = self.library.fake_create(seed, int(max_delay_s * 1e6))
        self.is_capturing = False
        self._kept: list[Tensor] = []  # what operations in progress use
        self._captured: list[Tensor] = []

    def attach(self, native: _C.ExpertBridge) -> None:
        self.signals = _C.CudaSignals(native, self._path, self.handle, self._host_functions)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.is_contiguous()
        assert source.is_contiguous()
        assert (target.dtype, target.shape) == (source.dtype, source.shape)
        self._kept += [target, source]
        self._call(
            "fake_copy",
            *(ctypes.c_void_p(t.data_ptr()) for t in (target, source)),
            ctypes.c_size_t(source.nbytes),
        )

    def submit(self, layer: int) -> None:
        self.signals.submit(layer, self.handle)

    def wait(self, layer: int) -> None:
        self.signals.wait(layer, self.handle)

    def settle(self) -> None:
        self.synchronize()

    def state(self) -> dict[str, Any]:
        return {"signals": self.signals, "stream": self.handle}

    def synchronize(self) -> None:
        deadline = time.monotonic() + 30
        while self._call("cuStreamQuery") != 0:
            assert time.monotonic() < deadline
            time.sleep(0.0002)
        if not self.is_capturing:
            self._kept.clear()

    def fail(self, failing: bool) -> None:
        self._call("fake_fail", 700 if failing else 0)

    def hang(self, hangs: bool = True) -> None:
        self._call("fake_hang", hangs)

    def start_capture(self) -> None:
        self.is_capturing = True
        self._call("fake_begin_capture")

    def end_capture(self) -> Callable[[], None]:
        self.is_capturing = False
        self.library.fake_end_capture.restype = ctypes.c_void_p
        graph = ctypes.c_void_p(self._call("fake_end_capture"))
        self._captured += self._kept
        self._kept = []
        return lambda: self._call("fake_replay", graph)

    def close(self) -> None:
        self._call("fake_destroy")

    def _call(self, name: str, *arguments: object) -> Any:
        return getattr(self.library, name)(ctypes.c_void_p(self.handle), *arguments)


class ThreadStream(SimulatedStream):
    """With the interface of FakeStream."""

    def fail(self, failing: Any) -> None:
        super().fail("CUDA_ERROR_ILLEGAL_ADDRESS (700)" if failing is True else failing or None)

    def start_capture(self) -> None:
        self._context = self.capture()
        self._graph_made = self._context.__enter__()

    def end_capture(self) -> Callable[[], None]:
        self._context.__exit__(None, None, None)
        return self._graph_made.replay


AnyStream = FakeStream | ThreadStream
MakeStream = Callable[..., AnyStream]


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("fake") / "libfakecuda.so"
    source = Path(__file__).with_name("fake_cuda.cpp")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return str(library)


@pytest.fixture(params=["simulated", "memory_operations", "host_functions"])
def make_stream(request: pytest.FixtureRequest, fake_driver: str) -> Iterator[MakeStream]:
    made: list[AnyStream] = []

    def make(seed: int = 0, max_delay_s: float = 0.0) -> AnyStream:
        if request.param == "simulated":
            made.append(ThreadStream(seed=seed, max_delay_s=max_delay_s))
        else:
            functions = request.param == "host_functions"
            made.append(
                FakeStream(
                    fake_driver, host_functions=functions, seed=seed, max_delay_s=max_delay_s
                )
            )
        return made[-1]

    yield make
    for stream in made:
        stream.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[_C.ThreadPool]:
    made = _C.ThreadPool([0, 1], pin=False)
    yield made
    made.close()


@pytest.fixture(scope="module")
def layers(pool: _C.ThreadPool) -> list[CpuExperts]:
    return make_layers(pool)


def make_layers(
    pool: _C.ThreadPool, format: str = "int4_g32", isa: str = "auto"
) -> list[CpuExperts]:
    made = []
    for seed in range(LAYERS):
        experts = CpuExperts(EXPERTS, HIDDEN, INTER, format=format, pool=pool, isa=isa)
        experts.fill_random(seed)
        made.append(experts)
    return made


def random_routing(num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids [L, T, K] i32 with some -1, weights [L, T, K])."""
    ids = torch.rand(LAYERS, num_tokens, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    ids[..., 1][torch.rand(ids.shape[:-1], generator=generator) < 0.3] = -1
    return ids.int(), torch.rand(ids.shape, generator=generator)


def chain(layers: Sequence[CpuExperts], x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
    """Each layer's experts on the previous layer's result, without the bridge."""
    for layer, i, m in zip(layers, ids, mix, strict=True):
        out = torch.empty_like(x)
        layer.run_kernels(x, i, m, out)
        x = out
    return x


class Step:
    """`chain` through a bridge, captured for num_tokens tokens."""

    def __init__(
        self, bridge: CpuBridge, stream: AnyStream, num_tokens: int, dtype: torch.dtype
    ) -> None:
        self.bridge, self.stream, self.num_tokens = bridge, stream, num_tokens
        self.x = torch.empty(num_tokens, HIDDEN, dtype=dtype)
        self.ids = torch.empty(LAYERS, num_tokens, TOP_K, dtype=torch.int32)
        self.mix = torch.empty(LAYERS, num_tokens, TOP_K)
        stream.start_capture()
        self.out = self.enqueue()
        self.replay = stream.end_capture()

    def enqueue(self) -> Tensor:
        x = self.x
        for layer in range(LAYERS):
            self.bridge.submit(layer, x, self.ids[layer], self.mix[layer])
            x = self.bridge.collect(layer)
        return x

    def set(self, x: Tensor, ids: Tensor, mix: Tensor) -> None:
        self.x.copy_(x)
        self.ids.copy_(ids)
        self.mix.copy_(mix)

    def launch(self) -> None:
        self.out.fill_(123.0)
        self.replay()

    def run(self) -> Tensor:
        self.launch()
        self.bridge.run_step(self.num_tokens)
        self.stream.synchronize()
        return self.out


def make_bridge(layers: Sequence[CpuExperts], stream: AnyStream, **changes: Any) -> CpuBridge:
    options = {"top_k": TOP_K, "max_tokens": MAX_TOKENS, "dtype": torch.float32, **changes}
    return CpuBridge(layers, stream, **options)


def example(
    layers: Sequence[CpuExperts], num_tokens: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Inputs of a step, and its result."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    inputs = (x, *random_routing(num_tokens, generator))
    return inputs, chain(layers, *inputs)


def make_step(
    layers: Sequence[CpuExperts], stream: AnyStream, num_tokens: int = 3, **changes: Any
) -> tuple[Step, Tensor]:
    """A step that is ready to run, and its result."""
    step = Step(make_bridge(layers, stream, **changes), stream, num_tokens, torch.float32)
    inputs, expected = example(layers, num_tokens, seed=7)
    step.set(*inputs)
    return step, expected


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
        with ThreadStream() as stream:
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
    for _ in range(50 if isinstance(stream, ThreadStream) else 250):
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
    timer = threading.Timer(0.1, stream.fail, (True,))
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
    stream.fail(False)
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
    assert torch.equal(step.run(), expected)


def test_a_query_that_raises(layers: list[CpuExperts]) -> None:
    with ThreadStream() as stream:
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
        stream.hang()
        make_bridge(layers, stream)
        assert "within 2 s" in stream.signals.reason
    finally:
        stream.library.fake_support_memory_operations(True)
        stream.close()


def test_drivers_that_cannot_be_used(layers: list[CpuExperts]) -> None:
    with ThreadStream() as stream:
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
    with ThreadStream() as stream:
        bridge = make_bridge(layers, stream)
        shapes = {"x": (3, HIDDEN), "ids": (3, TOP_K), "mix": (3, TOP_K), **change}
        tensors = [torch.zeros(shapes["x"]), torch.zeros(shapes["ids"], dtype=torch.int32)]
        with pytest.raises(ValueError, match=message):
            bridge.submit(0, *tensors, torch.zeros(shapes["mix"]))


def test_wrong_use_is_refused(layers: list[CpuExperts], pool: _C.ThreadPool) -> None:
    with pytest.raises(ValueError, match="layers is empty"), ThreadStream() as stream:
        make_bridge([], stream)
    other = _C.ThreadPool([0], pin=False)
    with pytest.raises(ValueError, match=r"layers\[3\] has another pool"), ThreadStream() as stream:
        make_bridge([*layers, make_layers(other)[0]], stream)
    wide = CpuExperts(EXPERTS, HIDDEN + 32, INTER, format="int8", pool=pool)
    with pytest.raises(ValueError, match=r"layers\[3\] has hidden size 128"), ThreadStream() as s:
        make_bridge([*layers, wide], s)
    with ThreadStream() as stream:
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
