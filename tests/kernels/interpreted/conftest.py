"""Kernels under Triton's interpreter, which an environment variable chooses before Triton is imported."""

import os
import threading

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps a program's place in its grid for all threads; simulated streams launch on their own."""
    from triton.runtime.interpreter import InterpretedFunction

    run, lock = InterpretedFunction.run, threading.Lock()

    def run_alone(*args, **kwargs):
        with lock:
            return run(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run_alone)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
