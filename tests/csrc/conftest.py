import os
from collections.abc import Callable, Iterator

import pytest

from moejet import _C

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, usable_isa: Callable[[str], str]) -> str:
    """Every instruction set in turn."""
    return usable_isa(request.param)


@pytest.fixture(scope="session")
def pool() -> Iterator[_C.ThreadPool]:
    """Two workers, also on a machine with one CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    made = _C.ThreadPool(cpus[:2]) if len(cpus) > 1 else _C.ThreadPool([0, 1], pin=False)
    yield made
    made.close()
