"""Streams for the tests of the bridge."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejet import _C
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.simulated_stream import SimulatedStream
from moejet.testing.bridge_steps import AnyStream, MakeStream, make_layers
from moejet.testing.fake_cuda import FakeStream


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
            made.append(SimulatedStream(seed=seed, max_delay_s=max_delay_s))
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
