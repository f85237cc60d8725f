"""Nothing is lost: memory stays flat over thousands of calls and over objects that come and go."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moejet import _C
from moejet.testing.moe_layers import FORMATS, activations, routing

TOKENS = (1, 2, 17, 70)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(step: Callable[[int], None], count: int) -> tuple[int, int, int]:
    """(resident bytes, virtual bytes, threads) that `count` steps add after a tenth as warm-up."""

    def state() -> tuple[int, int, int]:
        gc.collect()
        return resident_bytes(), virtual_bytes(), len(os.listdir("/proc/self/task"))

    for i in range(max(count // 10, 8)):
        step(i)
    before = state()
    for i in range(count):
        step(i)
    after = state()
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]


@pytest.mark.parametrize("format", FORMATS)
def test_layer_calls_leave_nothing_behind(format: str, pool: _C.ThreadPool) -> None:
    experts = _C.ExpertWeights(4, 96, 80, format)
    dense = _C.LinearWeights(3, 100, 96, format)
    experts.fill_random(1, pool)
    dense.fill_random(2, pool)
    calls = []
    for tokens in TOKENS:
        x, (ids, mix) = activations(tokens, 96), routing(tokens, 4, 2)
        calls.append((x, ids, mix, torch.empty(tokens, 96), torch.empty(tokens, 3, 100)))
    isas = [n for n, state in _C.cpu_info()["isas"].items() if state["usable"] and n != "scalar"]

    def step(i: int) -> None:
        x, ids, mix, out, wide = calls[i % len(calls)]
        isa = isas[i // len(calls) % len(isas)]
        _C.moe_forward(experts, x, ids, mix, out, pool, isa)
        _C.linear_forward(dense, x, wide, pool, isa)

    # 128 KB over 2,000 calls: 64 bytes each would be seen.
    resident, _, threads = growth(step, 2000)
    assert resident < 128 * 1024
    assert threads == 0


def test_refused_calls_leave_nothing_behind(pool: _C.ThreadPool) -> None:
    experts = _C.ExpertWeights(4, 96, 80, "int8")
    x, (ids, mix) = activations(20, 96), routing(20, 4, 2)
    out = torch.empty(20, 95)
    bad = torch.full((80, 96), float("nan"))

    def step(i: int) -> None:
        with pytest.raises(ValueError, match="out has shape"):
            _C.moe_forward(experts, x, ids, mix, out, pool)
        with pytest.raises(ValueError, match="NaN"):
            experts.set_projection(0, "gate", bad, pool)
        with pytest.raises(RuntimeError, match="as asked"):
            pool.probe(fail_worker=i % 2)

    assert growth(step, 1000)[0] < 256 * 1024


def test_pools_and_weights_come_and_go() -> None:
    x, (ids, mix) = activations(5, 96), routing(5, 4, 2)
    out = torch.empty(5, 96)

    def step(i: int) -> None:
        own = _C.ThreadPool([0, 1, 2], pin=False)
        experts = _C.ExpertWeights(4, 96, 80, FORMATS[i % len(FORMATS)])
        experts.fill_random(i, own)
        _C.moe_forward(experts, x, ids, mix, out, own)
        assert out.isfinite().all()
        if i % 2 == 0:
            own.close()

    # One lost mapping of weights or one lost thread stack in a hundred would show.
    resident, virtual, threads = growth(step, 300)
    assert resident < 512 * 1024
    # A thread may make glibc reserve one more arena of 64 MiB.
    assert virtual % (64 << 20) < 4 << 20
    assert threads == 0
