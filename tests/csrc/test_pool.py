"""The thread pool: life cycle, several pools and callers, exceptions, fork."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from moejet import _C


def cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def test_workers_sit_on_their_cpus() -> None:
    pool = _C.ThreadPool(cpus()[:2])
    assert pool.num_threads == len(cpus()[:2])
    for _ in range(20):
        # Worker 0 is the calling thread, which may be anywhere but on another worker's CPU.
        assert pool.probe()[1:] == cpus()[1:2]


def test_caller_keeps_its_affinity() -> None:
    before = os.sched_getaffinity(0)
    pool = _C.ThreadPool(cpus()[:2])
    for _ in range(100):
        pool.probe()
    assert os.sched_getaffinity(0) == before


def test_close_is_idempotent_and_final() -> None:
    pool = _C.ThreadPool(cpus()[:2])
    pool.probe()
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.probe()


def test_idle_workers_wake_up() -> None:
    pool = _C.ThreadPool([0, 1, 2], pin=False)
    for _ in range(5):
        assert len(pool.probe()) == 3
        threading.Event().wait(0.01)  # far beyond the spinning time: workers sleep


@pytest.mark.parametrize("worker", [0, 1, 2])
def test_exceptions_reach_the_caller(worker: int) -> None:
    pool = _C.ThreadPool([0, 1, 2], pin=False)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=f"worker {worker} failed as asked"):
            pool.probe(fail_worker=worker)
        assert len(pool.probe()) == 3


def test_two_pools_and_many_callers() -> None:
    pools = [_C.ThreadPool(cpus()[:2]), _C.ThreadPool([0, 1, 2], pin=False)]
    weights = _C.ExpertWeights(2, 96, 80, "int8")
    weights.fill_random(1, pools[0])
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1]] * 9)
    mix = torch.ones(9, 2)
    expected = torch.empty(9, 96)
    _C.moe_forward(weights, x, ids, mix, expected, pools[0])
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(30):
            out = torch.empty(9, 96)
            _C.moe_forward(weights, x, ids, mix, out, pools[(number + i) % 2])
            if not torch.equal(out, expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_fork_is_refused_and_the_child_exits() -> None:
    # In a fresh interpreter: forking one with torch's threads would test those.
    program = """
import os, sys
from moejet import _C
pool = _C.ThreadPool([0, 1], pin=False)
pool.probe()
child = os.fork()
if child == 0:
    try:
        pool.probe()
    except RuntimeError as error:
        code = 0 if "fork" in str(error) else 2
    else:
        code = 3
    own = _C.ThreadPool([0, 1], pin=False)
    code = code if len(own.probe()) == 2 else 4
    del pool, own
    sys.exit(code)
_, status = os.waitpid(child, 0)
assert len(pool.probe()) == 2
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cpus is empty"),
        ([0, 0], "0 occurs twice"),
        ([-1], "-1 is no CPU number"),
        ([1 << 20], "is no CPU number"),
        ([1000], "may not run on CPU 1000"),
    ],
)
def test_bad_cpus(arguments: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.ThreadPool(arguments)
